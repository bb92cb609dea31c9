"""Blood by expectation-maximisation, on heads whose tissue is drawn from known distributions."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ich_pipeline.errors import ReadError
from ich_pipeline.networks.mixture import BrainMixture, MixtureInferer, blood_probability, brain_mask

SHAPE, PIXEL_MM = (6, 100, 90), 2.0
ROWS, COLUMNS = np.meshgrid(np.arange(100) - 50, np.arange(90) - 45, indexing="ij")
RADIUS = np.hypot(ROWS / 45, COLUMNS / 38)  # 1 on the outside of the skull


def disk(row: int, column: int, pixels: int) -> NDArray[np.bool_]:
    return np.hypot(ROWS - row, COLUMNS - column) <= pixels


BLEED, STONE = disk(5, -12, 9), disk(-15, 12, 3)


def head(bleed_hu: float | None = 65.0, noise_hu: float = 4.0) -> NDArray[np.float32]:
    """Grey matter around white matter around fluid, in a skull with scalp around it; a stone of 300 HU."""
    plane = np.select([RADIUS > 1.1, RADIUS > 1, RADIUS > 0.9], [-1000.0, 60.0, 900.0], default=38.0)
    plane[RADIUS < 0.7] = 28
    plane[disk(0, 0, 6)] = 8
    if bleed_hu is not None:
        plane[BLEED] = bleed_hu
    plane[STONE] = 300
    return (plane + np.random.default_rng(0).normal(0, noise_hu, SHAPE)).astype(np.float32)


def score(image_hu: NDArray[np.float32]) -> NDArray[np.float32]:
    network = BrainMixture([5.0, PIXEL_MM, PIXEL_MM])
    return network(torch.from_numpy(image_hu)[None, None])[0, 0].numpy()


def test_blood_is_found_and_neither_stone_nor_scalp_is() -> None:
    found = score(head()) >= 0.5
    assert 2 * (found & BLEED).sum() / (found.sum() + BLEED.sum() * SHAPE[0]) > 0.95
    assert not found[:, STONE].any()
    assert not found[:, RADIUS > 0.9].any()


def test_a_head_without_a_class_as_dense_as_blood_has_none() -> None:
    assert not score(head(bleed_hu=None)).any()
    assert not score(head(bleed_hu=38.0)).any()  # as dense as grey matter: the limit of the method


@pytest.mark.parametrize("value_hu", [-1000.0, 40.0])
def test_what_is_no_head_has_no_brain(value_hu: float) -> None:
    assert not score(np.full(SHAPE, value_hu, np.float32)).any()


def test_a_head_without_blood_is_told_from_one_without_a_closed_skull() -> None:
    network, inferer = BrainMixture((5.0, PIXEL_MM, PIXEL_MM)), MixtureInferer((5.0, PIXEL_MM, PIXEL_MM))
    closed = torch.from_numpy(head(bleed_hu=None))[None, None]
    assert not inferer(closed, network).any()
    opened = closed.clone()
    opened[:, :, :, 45:, 25:65] = 20.0  # no bone for 80 mm at the back, in no slice
    with pytest.raises(ReadError, match="found no brain inside a ring of bone"):
        inferer(opened, network)


def test_a_head_that_the_field_of_view_cuts_keeps_its_brain() -> None:
    whole = brain_mask(head(), (PIXEL_MM, PIXEL_MM))
    cut = brain_mask(head()[:, :85], (PIXEL_MM, PIXEL_MM))  # the skull's last 10 rows are outside
    assert cut.sum() > 0.95 * whole[:, :85].sum()


def test_the_brain_ends_at_bone_and_stones_with_a_rim() -> None:
    brain = brain_mask(head(), (PIXEL_MM, PIXEL_MM))
    assert not brain[:, (RADIUS > 0.9) | STONE].any()
    assert brain[:, (RADIUS < 0.8) & ~disk(-15, 12, 7)].all()


def test_probability_is_that_of_the_normal_distributions() -> None:
    random_state = np.random.default_rng(1)
    # Shares 0.1, 0.5, 0.3, 0.1 of normal distributions 5 HU wide: those of 38 and 65 HU meet where their densities do.
    means, shares = np.array([8.0, 26.0, 38.0, 65.0]), np.array([0.1, 0.5, 0.3, 0.1])
    values_hu = random_state.normal(means[random_state.choice(4, 100_000, p=shares)], 5.0).astype(np.float32)
    probability = blood_probability(values_hu, blood_hu=45.0)
    edge_hu = (38 + 65) / 2 + 25 * np.log(0.3 / 0.1) / (65 - 38)
    assert values_hu[probability >= 0.5].min() == pytest.approx(edge_hu, abs=1.0)
    assert (probability >= 0.5).mean() == pytest.approx(0.1, abs=0.003)
    assert probability[values_hu < 36].max() == 0


def test_the_mixture_has_no_parameters_and_keeps_the_shape() -> None:
    network = BrainMixture([5.0, PIXEL_MM, PIXEL_MM])
    assert not list(network.parameters())
    batch = torch.from_numpy(np.stack([head(), head(bleed_hu=None)]))[:, None]
    given = network(batch)
    assert given.shape == batch.shape
    assert given[0].any()
    assert not given[1].any()
