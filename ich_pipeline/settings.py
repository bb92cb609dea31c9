"""The settings of one command: `configs/run.yaml`, a bundle's configs, and the `key=value` words over both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ich_pipeline import bundles
from ich_pipeline.bundles import Bundle, Config
from ich_pipeline.errors import ConfigError

TRAIN_CONFIGS = ("inference", "train", "evaluate", "metadata")
DEFAULT_BUNDLE = "cascade3d"  # the one that ships weights
# Folder of fetched models; they are checked against their hash at every use.
CACHE = Path.home() / ".cache" / "ich-pipeline" / "bundles"


@dataclass(frozen=True)
class Settings:
    """A command's `key=value` words: those of the run, and those of the bundle's config."""

    run: Config
    overrides: Config

    @classmethod
    def of(cls, words: Sequence[str]) -> "Settings":
        """Part the words; defaults come from `configs/run.yaml`.

        Raises:
            ConfigError: not key=value, a key given twice, or a value that a setting cannot have.
        """
        run = bundles.read_yaml(bundles.resource("configs") / "run.yaml")
        given = bundles.parse_overrides(words)
        own = {key: given.pop(key) for key in list(given) if key in run}
        if own.get("dicom", "auto") not in ("auto", True, False):
            raise ConfigError(f"dicom={own['dicom']}: expected auto, true or false")
        return cls({**run, **own}, given)

    def each_bundle(self) -> "list[Settings]":
        """These settings once for every bundle in `bundle=a,b,c`; what exists is a path, whatever it contains.

        Raises:
            ConfigError: a bundle is named twice, or an empty name.
        """
        given = str(self.run["bundle"] or "")
        if "," not in given or Path(given).exists():
            return [self]
        names = [name.strip() for name in given.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(f"bundle={given}: expected names or folders, each once, with commas between them")
        return [replace(self, run={**self.run, "bundle": name}) for name in names]

    def bundle(self) -> Bundle:
        """The bundle that was named, or its stage.

        Raises:
            ConfigError: none was named, it or its stage does not exist, or a package that it needs is not installed.
        """
        name, stage = self.run["bundle"], self.run["stage"]
        if name is None:
            raise ConfigError(f"which bundle? Give bundle=NAME; known: {', '.join(bundles.all_bundles())}")
        if stage is not None:
            return bundles.require_packages(bundles.find_stage(str(name), str(stage)))
        return self._named(str(name))

    def start_from(self) -> Path | None:
        """Weights of the bundle that a training begins with, if one was named.

        Raises:
            ConfigError: it does not exist, or is not trained.
        """
        name = self.run["start_from"]
        if name is None:
            return None
        weights = self._named(str(name)).weights
        if weights is None:
            raise ConfigError(f"start_from={name}: this bundle has no weights. Name one that is trained.")
        return weights

    def _named(self, name: str) -> Bundle:
        if name.startswith(("models:/", "runs:/")) and not Path(name).exists():
            from ich_pipeline.tracking import fetch_bundle

            fetched = fetch_bundle(name, tracking_uri=self.run["tracking_uri"], cache=CACHE)
            return bundles.require_packages(Bundle(fetched))
        return bundles.require_packages(bundles.find_bundle(name))

    def preset(self, bundle: Bundle, *, training: bool = False) -> str | None:
        """The preset to apply: `auto` is gpu or cpu by what this machine has.

        A bundle with weights was trained with its settings and takes none unless one is named, or it is trained anew
        from nothing.
        """
        choice = self.run["preset"]
        if choice != "auto":
            return None if choice is None else str(choice)
        anew = training and self.run["start_from"] is None
        if (bundle.weights and not anew) or not bundle.overlays("presets"):
            return None
        import torch

        return "gpu" if torch.cuda.is_available() else "cpu"

    def config(self, bundle: Bundle, *names: str) -> dict[str, Config]:
        """The bundle's configs with variant, preset and overrides.

        Raises:
            ConfigError: an unknown key; names of run settings are offered as well.
        """
        try:
            # Without a preset first: a wrong key is refused before PyTorch is imported to see whether there is a GPU.
            bundles.resolve(bundle, names, self.overrides, None)
            return bundles.resolve(bundle, names, self.overrides, self.preset(bundle, training="train" in names))
        except ConfigError as error:
            unknown = [key for key in self.overrides if f"no key '{key}'" in str(error)]
            near = bundles.near_names(unknown[0], self.run) if unknown else []
            raise ConfigError(f"{error} (or {near[0]}= of the run)") if near else error from None
