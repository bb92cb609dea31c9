"""Versions of a served bundle: the one that was named is 0, each training adds one, and one of them is served."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ich_pipeline.bundles import Bundle
from ich_pipeline.errors import ConfigError
from ich_pipeline.files import write_json

SERVED_FILE, OUTCOME_FILE = "served.json", "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How a training on corrected labels ended.

    `dice_before` is that of the weights it began with, `dice_after` the best of its own, both on the same validation
    cases by the bundle's own validation metric.
    """

    version: int
    started_from: int
    dice_before: float
    dice_after: float
    n_train: int
    n_val: int
    weights_sha256: str
    mlflow_run_id: str | None

    @property
    def served(self) -> bool:
        """Whether the version is served from then on: its Dice is not lower, and is a number."""
        return self.dice_after >= self.dice_before


@dataclass(frozen=True)
class Versions:
    """The versions of one bundle.

    Attributes:
        name: under which it is served.
        source: the bundle that was named, which is never changed.
        folder: where trained versions lie, each in a folder of its number.
    """

    name: str
    source: Bundle
    folder: Path

    def numbers(self) -> list[int]:
        """0, and every version whose training ended."""
        trained = (int(p.parent.name) for p in self.folder.glob(f"*/{OUTCOME_FILE}") if p.parent.name.isdigit())
        return [0, *sorted(trained)]

    @property
    def served(self) -> int:
        """The version that answers now."""
        file = self.folder / SERVED_FILE
        return int(json.loads(file.read_text())["version"]) if file.is_file() else 0

    def bundle(self, version: int) -> Bundle:
        """The bundle of a version.

        Raises:
            ConfigError: there is none of this number.
        """
        if version not in self.numbers():
            raise ConfigError(
                f"{self.name} has no version {version}, expected one of {', '.join(map(str, self.numbers()))}"
            )
        return Bundle(self.folder / str(version) / "bundle") if version else self.source

    def serve(self, version: int) -> None:
        """Let a version answer from now on; a running server takes it with the next request.

        Raises:
            ConfigError: there is none of this number, or its weights are gone.
        """
        bundle = self.bundle(version)
        if bundle.weights is None and bundle.needs_weights:
            raise ConfigError(f"{self.name} version {version} has no weights at {bundle.path}. Choose another version.")
        write_json(self.folder / SERVED_FILE, {"version": version})

    def next_folder(self) -> Path:
        """Folder for another version; a number is never used again, whatever became of its training."""
        used = [int(p.name) for p in self.folder.glob("*") if p.name.isdigit()]
        return self.folder / str(max(used, default=0) + 1)

    def record(self, outcome: Outcome) -> None:
        """Keep how a training ended, and serve its version if it is to be served."""
        write_json(self.folder / str(outcome.version) / OUTCOME_FILE, asdict(outcome) | {"served": outcome.served})
        if outcome.served:
            self.serve(outcome.version)

    def history(self) -> list[dict[str, Any]]:
        """Outcomes of all trainings, oldest first."""
        return [
            json.loads((self.folder / str(number) / OUTCOME_FILE).read_text()) for number in self.numbers() if number
        ]


def versions_of(bundles: dict[str, Bundle], out: Path) -> dict[str, Versions]:
    """Versions of every served bundle, by name."""
    return {name: Versions(name, bundle, out / "versions" / name) for name, bundle in bundles.items()}
