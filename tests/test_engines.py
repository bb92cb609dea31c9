"""Devices, weights and precision are what was asked for, or the refusal says what to do."""

import json
import subprocess
import sys

import pytest
import torch
from heads import OracleCascade, oracle_bundle, save_weights
from monai.inferers import Inferer, SimpleInferer
from torch import nn

from ich_pipeline import engines
from ich_pipeline.cascade import CascadeInferer
from ich_pipeline.engines import (
    AutocastInferer,
    EngineInferer,
    OpenVINOStage,
    autocast,
    check_hash,
    keep_heap,
    load_network,
    openvino_core,
    pick_device,
    to_openvino,
)
from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.cascade_unet import CascadeUNet, ResidualUNet


@pytest.fixture(scope="module")
def stage() -> nn.Module:
    torch.manual_seed(0)
    return ResidualUNet([4] * 4).eval()


class TestPickDevice:
    def test_cpu_and_devices_as_they_are(self):
        assert pick_device("cpu") == torch.device("cpu")
        assert pick_device(torch.device("cpu")) == torch.device("cpu")
        assert pick_device().type in ("cpu", "cuda")

    @pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu0", "", "xpu"])
    def test_unknown_name_is_refused(self, name):
        with pytest.raises(ConfigError, match="expected auto, cpu, cuda, cuda:N or mps"):
            pick_device(name)

    def test_absent_device_is_refused(self, monkeypatch):
        with pytest.raises(ConfigError, match=r"cuda:99: this machine has \d+ CUDA devices. Use device=cpu"):
            pick_device("cuda:99")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="no Apple GPU"):
            pick_device("mps")


class TestLoadNetwork:
    def test_loads_and_puts_in_evaluation_mode(self, tmp_path):
        bundle = oracle_bundle(tmp_path / "b")
        trained = OracleCascade()
        nn.init.constant_(trained.fine_stage.gain, 3.25)
        network = load_network(OracleCascade(), save_weights(bundle, trained), "cpu")
        assert network.fine_stage.gain.item() == 3.25
        assert not network.training

    def test_checkpoint_with_the_state_under_model(self, tmp_path):
        weights = oracle_bundle(tmp_path / "b") / "models" / "model.pt"
        torch.save({"model": torch.load(weights, weights_only=True), "epoch": 3}, weights)
        self.rehash(weights)
        load_network(OracleCascade(), weights, "cpu")

    def rehash(self, weights, value=None):
        metadata = weights.parent.parent / "configs" / "metadata.json"
        content = json.loads(metadata.read_text()) | {"weights_sha256": value or engines.sha256_of(weights)}
        metadata.write_text(json.dumps(content))

    def test_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no weights at .*Train it"):
            load_network(OracleCascade(), tmp_path / "models" / "model.pt")

    def test_wrong_hash(self, tmp_path):
        weights = oracle_bundle(tmp_path / "b") / "models" / "model.pt"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ConfigError, match="changed or cut off"):
            load_network(OracleCascade(), weights)

    @pytest.mark.parametrize("metadata", [{}, {"weights_sha256": None}, None], ids=["no key", "null", "no file"])
    def test_no_hash(self, tmp_path, metadata):
        weights = oracle_bundle(tmp_path / "b") / "models" / "model.pt"
        file = tmp_path / "b" / "configs" / "metadata.json"
        file.unlink() if metadata is None else file.write_text(json.dumps(metadata))
        with pytest.raises(ConfigError, match="says None"):
            check_hash(weights)

    def test_another_network(self, tmp_path, stage):
        bundle = oracle_bundle(tmp_path / "b")
        with pytest.raises(ConfigError, match="does not fit the network"):
            load_network(OracleCascade(), save_weights(bundle, stage))

    def test_missing_key_is_not_filled_in(self, tmp_path):
        weights = oracle_bundle(tmp_path / "b") / "models" / "model.pt"
        torch.save({"coarse_stage.gain": torch.tensor(1.0)}, weights)
        self.rehash(weights)
        with pytest.raises(ConfigError, match=r"fine_stage\.gain"):
            load_network(OracleCascade(), weights)

    def test_code_in_a_pickle_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (print, ("boom",))

        weights = oracle_bundle(tmp_path / "b") / "models" / "model.pt"
        torch.save({"model": Bomb()}, weights)
        self.rehash(weights)
        with pytest.raises(ConfigError, match="holds code"):
            load_network(OracleCascade(), weights)


class TestAutocast:
    CPU = torch.device("cpu")

    def dtype(self, amp) -> torch.dtype:
        layer = nn.Conv3d(1, 2, 3)
        with torch.no_grad(), autocast(self.CPU, amp):
            return layer(torch.zeros(1, 1, 4, 4, 4)).dtype

    def test_on_and_off(self):
        assert self.dtype("on") == torch.bfloat16
        assert self.dtype("off") == torch.float32

    def test_yaml_reads_on_and_off_as_booleans(self):
        assert self.dtype(True) == torch.bfloat16
        assert self.dtype(False) == torch.float32

    @pytest.mark.parametrize("faster", [True, False])
    def test_auto_takes_what_is_faster_here(self, monkeypatch, faster):
        monkeypatch.setattr(engines, "bf16_is_faster", lambda: faster)
        assert self.dtype("auto") == (torch.bfloat16 if faster else torch.float32)

    def test_unknown_mode_is_refused(self):
        with pytest.raises(ConfigError, match="expected one of auto, on, off"):
            autocast(self.CPU, "half")
        with pytest.raises(ConfigError, match="amp='half'"):
            EngineInferer(SimpleInferer(), amp="half")
        with pytest.raises(ConfigError, match="amp='half'"):
            AutocastInferer("half")

    def test_training_step(self):
        layer, inside = nn.Conv3d(1, 2, 3), []
        layer.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
        out = AutocastInferer("on")(torch.zeros(1, 1, 4, 4, 4), layer)
        AutocastInferer("off")(torch.zeros(1, 1, 4, 4, 4), layer)
        assert inside == [torch.bfloat16, torch.float32]
        assert out.dtype == torch.float32  # what the loss gets
        assert out.requires_grad

    def test_timing_answers_yes_or_no(self):
        assert engines.bf16_is_faster() in (True, False)


class TestEngineInferer:
    IMAGE = torch.rand(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(("amp", "precision"), [("off", "f32"), ("on", "bf16")])
    def test_says_what_is_in_use(self, stage, amp, precision):
        inferer = EngineInferer(SimpleInferer(), "torch", amp)
        assert inferer.in_use == {"engine": "torch", "precision": ""}
        out = inferer(self.IMAGE, stage)
        assert inferer.in_use == {"engine": "torch", "precision": precision}
        assert out.dtype == torch.float32
        assert not out.requires_grad

    def test_unknown_engine_is_refused(self):
        with pytest.raises(ConfigError, match="expected one of torch, openvino"):
            EngineInferer(SimpleInferer(), "tensorrt")

    def test_arguments_go_through(self):
        class Echo(Inferer):
            def __call__(self, inputs, network, *args, **kwargs):
                return torch.tensor([args[0], kwargs["b"]])

        assert EngineInferer(Echo())(self.IMAGE, nn.Identity(), 1, b=2).tolist() == [1, 2]


@pytest.fixture
def _openvino():
    pytest.importorskip("openvino")


USED_AND_GONE = """
import gc, os, signal, torch
from ich_pipeline.engines import to_openvino

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
networks = [to_openvino(torch.nn.Conv3d(1, 2, 3, padding=1).eval(), "off") for _ in range(2)]
with torch.inference_mode():
    for network in networks:
        network(torch.zeros(1, 1, 8, 8, 8))
while networks:
    networks.pop(0)
    del network
    gc.collect()
    network = None
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.usefixtures("_openvino")
def test_a_signal_is_handled_after_networks_were_used_and_are_gone():
    """OpenVINO's cores left the thread an unmapped stack for signals: SIGSEGV at Ctrl-C or a worker's end."""
    ended = subprocess.run([sys.executable, "-c", USED_AND_GONE], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


@pytest.mark.usefixtures("_openvino")
class TestOpenVINO:
    @pytest.fixture(scope="class")
    def converted(self, stage):
        return OpenVINOStage(stage, "off")

    def test_agrees_with_torch_at_every_size(self, stage, converted):
        for shape in ((1, 1, 4, 32, 48), (1, 1, 8, 48, 32), (2, 1, 4, 64, 64)):
            image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = stage(image)
            assert torch.allclose(converted(image), expected, atol=1e-3)
        assert converted.precision == "f32"

    def test_answers_are_not_overwritten_by_the_next_call(self, converted):
        first = converted(torch.zeros(1, 1, 4, 32, 32))
        before = first.clone()
        converted(torch.ones(1, 1, 4, 32, 32))
        assert torch.equal(first, before)

    def test_cascade_by_stages(self):
        torch.manual_seed(0)
        network = CascadeUNet([4] * 3, coarse_scale=2, resize=False, margin=(1, 4, 4)).eval()
        image = torch.randn(1, 1, 6, 70, 60)
        plain = EngineInferer(CascadeInferer((8, 32, 32), mode="full"), "torch", "off")
        inferer = EngineInferer(CascadeInferer((8, 32, 32), mode="full"), "openvino", "off")
        score = inferer(image, network)
        assert torch.allclose(score, plain(image, network), atol=1e-3)
        assert inferer.in_use == {"engine": "openvino", "precision": "f32"}
        assert isinstance(network.fine_stage, nn.Module)
        assert not isinstance(network.fine_stage, OpenVINOStage)  # the caller's network is left as it is
        converted = inferer._converted
        inferer(image, network)
        assert inferer._converted is converted  # compiled once

    @pytest.mark.parametrize("amp", ["auto", "on", False])
    def test_precision_follows_the_setting_and_the_processor(self, amp):
        converted = OpenVINOStage(nn.Conv3d(1, 2, 3), amp)
        converted(torch.zeros(1, 1, 4, 32, 32))
        has_bf16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        assert converted.precision == ("bf16" if has_bf16 and amp is not False else "f32")

    def test_network_without_stages_is_converted_whole(self, stage):
        assert isinstance(to_openvino(stage, "off"), OpenVINOStage)

    def test_other_devices_are_refused(self):
        with pytest.raises(ConfigError, match="use device=cpu"):
            to_openvino(nn.Conv3d(1, 1, 1, device="meta"), "off")


def test_missing_extra_is_named(monkeypatch, stage):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"pip install \"ich-pipeline\[openvino\]\""):
        to_openvino(stage, "off")


def test_keep_heap_says_whether_it_took(monkeypatch):
    assert keep_heap() in (True, False)

    def no_glibc(name):
        raise OSError(name)

    monkeypatch.setattr(engines.ctypes, "CDLL", no_glibc)
    assert keep_heap() is False
