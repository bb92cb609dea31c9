"""Bundles: where they are, what their configs hold, and how `key=value` reaches into them.

Nothing here imports torch or MONAI: listings and refusals answer at once.
"""

import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import yaml

from ich_pipeline.errors import ConfigError
from ich_pipeline.files import atomic_path, write_json

Config = dict[str, Any]

PACKAGE = Path(__file__).parent
# YAML 1.1 takes 1e-3 (no dot) for a string; users write learning rates that way.
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def resource(name: str) -> Path:
    """Folder `bundles`, `configs` or `data_manifests` as it was installed: in the wheel, or beside the checkout."""
    packed = PACKAGE / "_resources" / name
    return packed if packed.is_dir() else PACKAGE.parent / name


@dataclass(frozen=True)
class Bundle:
    """One bundle folder."""

    path: Path

    @property
    def name(self) -> str:
        """Its name in the metadata: that of the architecture, wherever the folder lies."""
        return str(self.metadata["name"])

    @property
    def metadata(self) -> Config:
        """`configs/metadata.json`."""
        return json.loads((self.path / "configs" / "metadata.json").read_text())

    @property
    def weights(self) -> Path | None:
        """Weights file, or None for a bundle that is not trained."""
        path = self.path / "models" / "model.pt"
        return path if path.is_file() else None

    @property
    def needs_weights(self) -> bool:
        """False for a bundle that has none by design: its metadata say `"needs_weights": false`."""
        return bool(self.metadata.get("needs_weights", True))

    @property
    def finds_boxes(self) -> bool:
        """True for a detector, which gives boxes and no mask: its metadata say `"finds": "boxes"`."""
        return self.metadata.get("finds") == "boxes"

    @property
    def missing_packages(self) -> list[str]:
        """What its metadata require and is not installed, as pip takes it: `name>=version`."""
        required = self.metadata.get("required_packages_version", {})
        own = PACKAGE.name
        return [f"{name}>={v}" for name, v in required.items() if name != own and not _is_installed(name)]

    def config(self, name: str) -> Config:
        """`configs/<name>.yaml` as written, or the metadata."""
        return self.metadata if name == "metadata" else read_yaml(self.path / "configs" / f"{name}.yaml")

    @property
    def config_names(self) -> list[str]:
        """What `config` takes."""
        return ["metadata", *sorted(p.stem for p in (self.path / "configs").glob("*.yaml"))]

    def overlays(self, kind: str) -> dict[str, Path]:
        """Files of `configs/presets` or `configs/variants`, by name."""
        return {p.stem: p for p in sorted((self.path / "configs" / kind).glob("*.yaml"))}

    def overlay(self, kind: str, choice: str) -> Path:
        """One of them by name, or any YAML file by its path, such as a plan.

        Raises:
            ConfigError: neither, with the nearest names.
        """
        path, files = Path(choice), self.overlays(kind)
        if path.suffix == ".yaml" and path.is_file():
            return path
        if choice not in files:
            raise ConfigError(f"{self.name} has no {kind[:-1]} '{choice}'; {did_you_mean(choice, files)}")
        return files[choice]

    def describe(self) -> Config:
        """What a listing shows."""
        meta = self.metadata
        return {
            "name": self.name,
            "version": meta["version"],
            "weights": meta.get("weights_sha256") if self.weights else None,
            "needs_weights": self.needs_weights,
            "missing_packages": self.missing_packages,
            "description": meta["description"],
            "path": str(self.path),
            "presets": list(self.overlays("presets")),
            "variants": list(self.overlays("variants")),
        }


@cache
def _is_installed(distribution: str) -> bool:
    try:
        installed.version(distribution)
    except installed.PackageNotFoundError:
        return False
    return True


def read_yaml(path: Path) -> Config:
    """A YAML mapping.

    Raises:
        ConfigError: unreadable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(content).__name__}")
    return _floats(content)


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a bundle."""
    return (path / "configs" / "metadata.json").is_file() and (path / "configs" / "inference.yaml").is_file()


def all_bundles() -> dict[str, Bundle]:
    """Every bundle by folder name: those in the working folder's `bundles/` hide installed ones of the same name."""
    found: dict[str, Bundle] = {}
    for root in (resource("bundles"), Path("bundles")):
        if root.is_dir():
            found.update({p.name: Bundle(p.resolve()) for p in sorted(root.iterdir()) if is_bundle(p)})
    return dict(sorted(found.items()))


def find_bundle(name: str) -> Bundle:
    """A bundle by folder or by name.

    Raises:
        ConfigError: neither; the message lists what there is.
    """
    path = Path(name)
    if path.exists():
        if is_bundle(path):
            return Bundle(path.resolve())
        raise ConfigError(f"{path} is no bundle: it has no configs/metadata.json and configs/inference.yaml")
    bundles = all_bundles()
    if name in bundles:
        return bundles[name]
    raise ConfigError(f"no bundle '{name}'; {did_you_mean(name, bundles)}")


def find_stage(name: str, stage: str) -> Bundle:
    """A bundle's stage that is trained and used alone: a bundle in a folder of the bundle's.

    Raises:
        ConfigError: no such bundle, or it has no such stage; the message lists what there is.
    """
    given = Path(name)
    roots = [given] if given.exists() else [Path("bundles") / name, resource("bundles") / name]
    there = [root for root in roots if root.is_dir()]
    if not there:
        find_bundle(name)  # says what there is
    stages = {p.name: p for root in reversed(there) for p in sorted(root.iterdir()) if is_bundle(p)}
    if stage not in stages:
        raise ConfigError(f"{name} has no stage '{stage}'; {did_you_mean(stage, stages)}")
    return Bundle(stages[stage].resolve())


def require_packages(bundle: Bundle) -> Bundle:
    """The same bundle, whose network can be built here.

    Raises:
        ConfigError: a package that its metadata name is not installed.
    """
    missing = bundle.missing_packages
    if missing:
        wanted = " ".join(f'"{one}"' for one in missing)
        raise ConfigError(
            f"{bundle.name} needs {', '.join(missing)}, not installed here. Install it: pip install {wanted}"
        )
    return bundle


def learns(bundle: Bundle, config: Mapping[str, Any]) -> bool:
    """Whether the network of a resolved config has weights: the second stage `segmenter=em` has none."""
    return bundle.needs_weights and config.get("segmenter") != "em"


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that resemble one."""
    return get_close_matches(name, list(known), n=3, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest names, or all of them when none is near."""
    names = list(known)
    near = near_names(name, names)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    return f"known: {', '.join(names) or 'none'}"


def parse_overrides(words: Iterable[str]) -> Config:
    """`key=value` words as a mapping; values are YAML, but one that begins with `>` is text, such as `>=6mL`.

    Raises:
        ConfigError: a word without `=`, a key given twice, a value that is not YAML.
    """
    overrides: Config = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{word}': expected key=value")
        if key in overrides:
            raise ConfigError(f"'{key}' is given twice")
        try:
            # In YAML `>` announces lines of text, and a word has none below it.
            overrides[key] = text if text.startswith(">") else _floats(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}={text}: the value is not YAML: {error}") from error
    return overrides


def resolve(
    bundle: Bundle, names: Iterable[str], overrides: Mapping[str, Any], preset: str | None
) -> dict[str, Config]:
    """A bundle's configs with preset, variant and overrides applied, in this order.

    A preset fits the bundle to a machine, a variant says what the method is: a variant is what it says on any machine.

    Args:
        bundle: where the configs are.
        names: which to read, e.g. `("inference", "train")`.
        overrides: `variant`, and keys of any of these configs (nested keys with `.`).
        preset: a preset's name, or None. Preset and variant may also be paths of YAML files.

    Returns:
        By config name; a key that several configs have is changed in all of them.

    Raises:
        ConfigError: unknown preset, variant or key, with the nearest names.
    """
    rest = dict(overrides)
    overlays = [("presets", preset), ("variants", rest.pop("variant", None))]
    # Presets and variants hold keys of training too, whatever is asked for now.
    configs = {name: bundle.config(name) for name in (bundle.config_names if any(c for _, c in overlays) else names)}
    for kind, choice in overlays:
        if choice is None:
            continue
        for key, value in read_yaml(bundle.overlay(kind, str(choice))).items():
            _set(bundle.name, configs, key, value)
    wanted = {name: configs[name] for name in names}
    for key, value in rest.items():
        _set(bundle.name, wanted, key, value)
    return wanted


def known_keys(configs: Mapping[str, Config]) -> list[str]:
    """Top-level keys of all configs."""
    return sorted({key for config in configs.values() for key in config})


def _set(bundle: str, configs: Mapping[str, Config], key: str, value: Any) -> None:
    reached = False
    for config in configs.values():
        holder = _holder(config, _path(key))
        if holder is not None:
            parent, last = holder
            parent[last] = deepcopy(value)
            reached = True
    if not reached:
        raise ConfigError(f"{bundle} has no key '{key}'; {did_you_mean(key, _candidates(configs, key))}")


def _path(key: str) -> list[str]:
    """Parts of a nested key; MONAI's own separators are understood as well."""
    return re.split(r"\.|::|#", key)


def _holder(config: Any, path: list[str]) -> tuple[Any, Any] | None:
    """The container and index that a dotted path ends in, None where the path does not exist."""
    for depth, part in enumerate(path):
        index: Any = int(part) if isinstance(config, list) and part.isdigit() else part
        exists = (
            index < len(config)
            if isinstance(config, list) and isinstance(index, int)
            else (isinstance(config, dict) and index in config)
        )
        if not exists:
            return None
        if depth == len(path) - 1:
            return config, index
        config = config[index]
    return None


def _candidates(configs: Mapping[str, Config], key: str) -> list[str]:
    """Names on the level where the key went wrong."""
    parent = key.rpartition(".")[0]
    if not parent:
        return known_keys(configs)
    names = set(known_keys(configs))
    for config in configs.values():
        holder = _holder(config, _path(parent))
        if holder and isinstance(holder[0][holder[1]], dict):
            names = {f"{parent}.{k}" for k in holder[0][holder[1]]}
    return sorted(names)


def write_configs(bundle: Path, configs: Mapping[str, Config]) -> None:
    """Write resolved configs into a bundle folder."""
    for name, config in configs.items():
        if name == "metadata":
            write_json(bundle / "configs" / "metadata.json", config)
            continue
        with atomic_path(bundle / "configs" / f"{name}.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False, width=100))
