"""Several bundles as one: the mean of their probabilities on the scan's own grid, and where they disagree.

Bundles meet on the native grid because each has a model grid of its own; nothing else needs to be alike.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ich_pipeline.bundles import Bundle
from ich_pipeline.inference import Loaded, Prediction, Segmenter, Stage, no_stage
from ich_pipeline.records import CaseRecord, NativeMask


def joined_sha256(bundles: Sequence[Bundle]) -> str | None:
    """Weights of bundles in their order: the one hash of one bundle, else the hash of all hashes."""
    hashes = [bundle.metadata["weights_sha256"] for bundle in bundles]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(map(str, hashes)).encode()).hexdigest()


class Ensemble(Segmenter):
    """Bundles that segment every scan one after the other.

    The mask is where the mean probability reaches the mean threshold. The members' own steps after their threshold are
    not taken: they were made for their own masks.

    Args:
        members: two or more.
    """

    def __init__(self, members: Sequence[Segmenter]) -> None:
        self.members = members
        self.name = "+".join(member.name for member in members)
        self.version = "+".join(member.version for member in members)
        self.weights_sha256 = joined_sha256([member.bundle for member in members])
        self.threshold = float(np.mean([member.threshold for member in members]))

    @property
    def engine(self) -> dict[str, Any]:
        """Device, engine and precision of each member."""
        return {"members": [{"name": member.name, **member.engine} for member in self.members]}

    def read(self, case: CaseRecord, stage: Stage = no_stage) -> Loaded:
        """Read a scan and take it to the model grid of every member."""
        first, *others = (member.read(case, stage) for member in self.members)
        return replace(first, others=tuple(others))

    def segment(self, loaded: Loaded, stage: Stage = no_stage, *, with_regions: bool = False) -> Prediction:
        """The mean of the members' probabilities, its spread, and the members' own volumes."""
        grid, n = loaded.scan.grid, len(self.members)
        # One member's probability at a time is in memory beside the two sums.
        total, squares = (np.zeros(grid.shape, np.float32) for _ in range(2))
        member_ml: list[float] = []
        flags: tuple[str, ...] = ()
        for member, each in zip(self.members, (loaded, *loaded.others), strict=True):
            found = member.segment(each, stage)
            total += found.probability
            squares += found.probability**2
            member_ml.append(grid.foreground_ml(found.mask.values))
            flags += found.flags
        with stage("restore"):
            mean = total / np.float32(n)
            spread = np.sqrt(np.maximum(squares / np.float32(n) - mean**2, 0))
            mask = NativeMask((mean >= self.threshold).astype(np.uint8), grid)
        return Prediction(
            loaded.scan, mask, mean, tuple(dict.fromkeys(flags)), spread=spread, member_ml=tuple(member_ml)
        )
