"""As many slices with hemorrhage as without (Li et al., JBHI 2021, section II-A, "Data Augmentation").

Few slices of a head bleed. The two classes are drawn in turn, each from all cases that have it, and every draw is
augmented anew, the two classes apart.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable

from ich_pipeline.errors import ManifestError
from ich_pipeline.training import CaseSampler, Draw, TrainingCases, n_processes, rank


class RandSlicesOfClassd(Randomizable, MapTransform):
    """Random slices of a head, all with hemorrhage or all without: (C, S, R, C) to a list of (C, R, C).

    Args:
        keys: what is cut, the label among them.
        label_key: says which slices bleed.
        num_samples: slices; the same may come twice.

    Attributes:
        bleeding: which class is wanted; `BalancedCases` sets it at every draw.
    """

    def __init__(self, keys: KeysCollection, label_key: str, num_samples: int) -> None:
        MapTransform.__init__(self, keys)
        self.label_key, self.num_samples, self.bleeding = label_key, num_samples, True

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Cut the slices."""
        of_class = torch.nonzero(slices_bleed(data[self.label_key]) == self.bleeding).flatten()
        chosen = self.R.choice(of_class.numpy(), size=self.num_samples)
        return [{key: data[key][:, n] for key in self.key_iterator(dict(data))} for n in chosen]


def slices_bleed(label: torch.Tensor) -> torch.Tensor:
    """Which slices of a (1, S, R, C) label hold hemorrhage, (S,) bool."""
    return label[0].flatten(1).any(dim=1)


class BalancedCases(TrainingCases):
    """Training cases of which one class of slices is drawn; the index of a draw is 2 x case + class."""

    def __getitem__(self, draw: Draw) -> Any:
        case, bleeding = divmod(draw.case, 2)
        (step,) = (each for each in self.transform.transforms if isinstance(each, RandSlicesOfClassd))
        step.bleeding = bool(bleeding)
        return super().__getitem__(Draw(case, draw.seed))

    def cases_of(self, bleeding: bool) -> list[int]:
        """Cases that have a slice of this class."""
        return [n for n, case in enumerate(self._cache) if bool((slices_bleed(case["label"]) == bleeding).any())]


class BalancedSampler(CaseSampler):
    """Draws with and without hemorrhage in turn, in every process; within a class every case before any comes again.

    Raises:
        ManifestError: no training case has slices of one of the classes.
    """

    def __init__(self, dataset: BalancedCases, draws: int, seed: int = 0) -> None:
        super().__init__(dataset, draws, seed)
        self.classes = [dataset.cases_of(bleeding) for bleeding in (False, True)]
        for bleeding, cases in enumerate(self.classes):
            if not cases:
                raise ManifestError(
                    f"{self.n_cases} training cases without a single slice {'with' if bleeding else 'without'} "
                    "hemorrhage, expected both classes. Add cases with split=train."
                )

    def __iter__(self) -> Iterator[Draw]:
        random_state = np.random.default_rng((self.seed, self.epoch))
        total = self.draws * n_processes()
        order = []
        for cases in self.classes:
            passes = -(-total // len(cases))
            order.append(np.concatenate([random_state.permutation(cases) for _ in range(passes)]))
        seeds = random_state.integers(2**31, size=total)
        for n in range(rank(), total, n_processes()):
            bleeding = (n // n_processes() + 1) % 2  # hemorrhage first
            yield Draw(2 * int(order[bleeding][n]) + bleeding, int(seeds[n]))
