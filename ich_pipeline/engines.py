"""Where and how a network runs: device, precision, PyTorch or OpenVINO, and its weights."""

import ctypes
import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from ich_pipeline.errors import ConfigError
from ich_pipeline.files import sha256_of

ENGINES = ("torch", "openvino")
AMP = ("auto", "on", "off")
# Edge of the corner that OpenVINO's conversion looks at: can be halved seven times.
TRACED_SIZE = 128


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` as a device that is there.

    Raises:
        ConfigError: the name is none of these, or the machine has no such device.
    """
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(name)):
        raise ConfigError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps")
    kind, _, index = str(name).partition(":")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices. Use device=cpu.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name}: PyTorch finds no Apple GPU here. Use device=cpu.")
    return torch.device(name)


def keep_heap() -> bool:
    """Let glibc keep freed memory instead of returning it after every layer.

    A third of PyTorch's time on CPU is page faults on activations that are freed and taken again (docs/speed.md).
    Not undone: it holds for the process.

    Returns:
        Whether the C library took the settings (glibc only).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
    return all(libc.mallopt(key, value) == 1 for key, value in settings)


def load_network(network: nn.Module, weights: str | Path, device: str | torch.device = "auto") -> nn.Module:
    """Put a bundle's weights into its network, strictly, and the network on its device in evaluation mode.

    Args:
        network: what `network_def` builds; one with nothing to learn needs no file.
        weights: `models/model.pt` of a bundle: a state dict, or a dict with one under `model`.
        device: see `pick_device`.

    Raises:
        ConfigError: no such file, its SHA-256 is not the metadata's, it holds more than tensors, or it does not fit
            the network.
    """
    path = Path(weights)
    if not network.state_dict():
        return network.to(pick_device(device)).eval()
    if not path.is_file():
        raise ConfigError(
            f"no weights at {path}: this bundle is not trained. Train it (ich-pipeline train bundle=...) or name a "
            "trained bundle's folder."
        )
    check_hash(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConfigError(f"{path} is not loaded: it holds code, not only tensors. Save a state dict.") from error
    try:
        network.load_state_dict(state.get("model", state), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit the network of its bundle: {error}") from error
    return network.to(pick_device(device)).eval()


def check_hash(weights: Path) -> str:
    """SHA-256 of a weights file, which must be the one in its bundle's metadata.

    Raises:
        ConfigError: the metadata holds no hash or another one.
    """
    metadata_file = weights.parent.parent / "configs" / "metadata.json"
    expected = json.loads(metadata_file.read_text()).get("weights_sha256") if metadata_file.is_file() else None
    found = sha256_of(weights)
    if found != expected:
        raise ConfigError(
            f"{weights}: SHA-256 {found}, but {metadata_file} says {expected}. The file was changed or cut off; train "
            "or fetch it again."
        )
    return found


@cache
def bf16_is_faster() -> bool:
    """Time a small convolution both ways on this processor: bf16 pays only where it has instructions for it."""
    layer = nn.Conv3d(16, 16, 3, padding=1).eval()
    image = torch.zeros(1, 16, 16, 64, 64)

    def seconds(enabled: bool) -> float:
        best = float("inf")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(4):
                start = time.perf_counter()
                layer(image)
                best = min(best, time.perf_counter() - start)
        return best

    return seconds(True) < 0.9 * seconds(False)


def amp_mode(amp: str | bool) -> str:
    """`auto`, `on` or `off`; YAML 1.1 reads a bare on or off as a boolean.

    Raises:
        ConfigError: none of these.
    """
    mode = ("on" if amp else "off") if isinstance(amp, bool) else amp
    if mode not in AMP:
        raise ConfigError(f"amp={amp!r}: expected one of {', '.join(AMP)}")
    return mode


def autocast(device: torch.device, amp: str | bool) -> AbstractContextManager[Any]:
    """Mixed precision for a device: bf16 (float16 on CUDA devices without it); on CPU by default where it is faster.

    Raises:
        ConfigError: `amp` is not auto, on or off.
    """
    amp = amp_mode(amp)
    if amp == "off" or device.type == "mps":
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    return torch.autocast("cpu", torch.bfloat16) if amp == "on" or bf16_is_faster() else nullcontext()


@cache
def openvino_core() -> Any:
    """The one OpenVINO core of this process, kept to its end.

    Every core gives the thread an alternate signal stack of its own. When several go in the order in which they came,
    the thread is left with one that is unmapped, and the next signal that Python handles (Ctrl-C, the end of a data
    loader's worker) ends the process by SIGSEGV.
    """
    import openvino as ov

    return ov.Core()


class OpenVINOStage(nn.Module):
    """A module converted to OpenVINO at its first call, with every size left open.

    Args:
        module: in evaluation mode; its weights are read once.
        amp: `off` keeps float32; otherwise bf16 where the processor has it.
    """

    def __init__(self, module: nn.Module, amp: str | bool) -> None:
        super().__init__()
        self._module = [module]  # in a list: not a submodule, so no state dict or .to() reaches it
        self._amp = amp_mode(amp)
        self._compiled: Callable[..., Any] | None = None
        self.precision = ""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) CPU tensor in, the module's output out."""
        if self._compiled is None:
            self._compiled = self._compile(image)
        return torch.from_numpy(self._compiled(image.contiguous().numpy())[0])

    def _compile(self, image: torch.Tensor) -> Callable[..., Any]:
        import openvino as ov

        core = openvino_core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hint = "bf16" if has_bf16 and self._amp != "off" else "f32"
        # Traced here and on a corner: OpenVINO would run the whole image several times to check its own tracing, which
        # took 111 of the 135 s that a head cost. Sizes stay open either way.
        corner = image[(slice(1), slice(None), *[slice(TRACED_SIZE)] * (image.ndim - 2))]
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.trace.* is deprecated")
            traced = torch.jit.trace(self._module[0].float(), corner.clone(), check_trace=False)
            model = ov.convert_model(traced, example_input=corner.clone())
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        return compiled


def to_openvino(network: nn.Module, amp: str | bool) -> nn.Module:
    """The network with its stages (or all of it) run by OpenVINO.

    Raises:
        ConfigError: the network says that it cannot be converted, the extra `openvino` is not installed, or the
            network is not on the CPU.
    """
    if getattr(network, "torch_only", False):
        raise ConfigError(f"engine=openvino: {type(network).__name__} runs in PyTorch only. Use engine=torch.")
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError('engine=openvino needs the extra: pip install "ich-pipeline[openvino]"') from error
    if any(p.device.type != "cpu" for p in network.parameters()):
        raise ConfigError("engine=openvino runs on the CPU: use device=cpu")
    stages = getattr(network, "stage_names", None)
    if stages is None:
        return OpenVINOStage(network, amp)
    converted = deepcopy(network)
    for name in stages:
        setattr(converted, name, OpenVINOStage(getattr(converted, name), amp))
    return converted.eval()


class AutocastInferer(Inferer):
    """The forward pass of a training step under mixed precision; a tensor it gives goes to the loss in float32.

    bf16 has float32's range, so no loss scaling is needed; a CUDA device without bf16 trains in float32.
    """

    def __init__(self, amp: str | bool = "auto") -> None:
        self.amp = amp_mode(amp)

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the network; what is not a tensor (a network of several outputs) is returned as it is."""
        if inputs.device.type == "cpu":
            keep_heap()
        old_gpu = inputs.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        with autocast(inputs.device, "off" if old_gpu else self.amp):
            output = network(inputs, *args, **kwargs)
        return output.float() if isinstance(output, torch.Tensor) else output


class EngineInferer(Inferer):
    """Any inferer, run with the configured engine and precision: the same on every route into a bundle.

    Args:
        inferer: what moves windows over the image.
        engine: `torch` or `openvino`.
        amp: `auto`, `on` or `off`, see `autocast`.
    """

    def __init__(self, inferer: Inferer, engine: str = "torch", amp: str | bool = "auto") -> None:
        if engine not in ENGINES:
            raise ConfigError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
        self.inferer = inferer
        self.engine = engine
        self.amp = amp_mode(amp)
        self._converted: tuple[nn.Module, nn.Module] | None = None
        self._torch_precision = ""

    @property
    def regions(self) -> torch.Tensor | None:
        """Where a cascade's first stage found something in the last call, (B, 1, ...) bool; None of other inferers."""
        return getattr(self.inferer, "regions", None)

    @property
    def surroundings(self) -> torch.Tensor | None:
        """Hemorrhage or edema in the last call, (B, 1, ...) probability; None where nobody asked for it."""
        return getattr(self.inferer, "surroundings", None)

    @property
    def in_use(self) -> dict[str, str]:
        """Engine, and the precision of its arithmetic: `f32`, `bf16`, `f16`, or empty before the first call."""
        if self._converted is None:
            return {"engine": self.engine, "precision": self._torch_precision}
        stages = [m for m in self._converted[1].modules() if isinstance(m, OpenVINOStage)]
        return {"engine": self.engine, "precision": "+".join(sorted({s.precision for s in stages if s.precision}))}

    @property
    def takes_boxes(self) -> bool:
        """Whether the wrapped inferer can look at a box that a user drew: it has a method `look_in`."""
        return hasattr(self.inferer, "look_in")

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the wrapped inferer; (B, C, ...) in, its output in float32."""
        return self._run(self.inferer, inputs, network, *args, **kwargs)

    def look_in(self, inputs: torch.Tensor, network: nn.Module, box: Sequence[slice]) -> torch.Tensor:
        """The wrapped inferer's `look_in`: (1, C, ...) and a box of its voxels in, probability in float32."""
        return self._run(self.inferer.look_in, inputs, network, box)

    def _run(
        self, call: Callable[..., torch.Tensor], inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if inputs.device.type == "cpu":
            keep_heap()
        if self.engine == "openvino":
            if self._converted is None or self._converted[0] is not network:
                self._converted = (network, to_openvino(network, self.amp))
            with torch.inference_mode():
                return call(inputs, self._converted[1], *args, **kwargs).float()
        with torch.inference_mode(), autocast(inputs.device, self.amp):
            self._torch_precision = _precision(inputs.device)
            return call(inputs, network, *args, **kwargs).float()


def _precision(device: torch.device) -> str:
    """Precision of convolutions on a device in the current autocast context."""
    if not torch.is_autocast_enabled(device.type):
        return "f32"
    return {torch.bfloat16: "bf16", torch.float16: "f16"}[torch.get_autocast_dtype(device.type)]
