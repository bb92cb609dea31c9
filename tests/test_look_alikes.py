"""Heads in which only the other side tells a bleed from what is no bleed."""

import numpy as np
import pytest

from ich_pipeline.labels import Subtype
from ich_pipeline.phantom import PhantomSettings
from ich_pipeline.phantom.look_alikes import BRIGHT_HU, look_alike_case
from ich_pipeline.symmetry import MidPlane

SMALL = PhantomSettings(matrix=96, slice_mm=(5.0,), tilt_fraction=0, cut_fraction=0, noise_hu=(0.5, 0.5))


def test_a_bleed_is_as_bright_as_what_lies_on_both_sides_of_it() -> None:
    bleeding, clean = (
        look_alike_case("case", 2, PhantomSettings(**{**SMALL.__dict__, "clean_fraction": share})) for share in (0, 1)
    )
    assert set(np.unique(bleeding.label)) == {0, Subtype.IPH}
    assert not clean.label.any()
    held = bleeding.label > 0
    low, high = BRIGHT_HU
    assert low - 6 < np.median(bleeding.scan.image_hu[held]) < high + 6
    # Bright without being blood, in the clean head as well.
    inside = clean.brain & (clean.scan.image_hu > low - 2) & (clean.scan.image_hu < high + 6)
    assert inside.sum() * clean.scan.grid.voxel_volume_mm3 > 2000
    plane = MidPlane(tuple(bleeding.truth["mid_plane"]["normal"]), bleeding.truth["mid_plane"]["offset_mm"])
    side = np.sign(plane.distance_mm(bleeding.scan.grid.to_mm(np.argwhere(held))))
    assert abs(side.mean()) > 0.95


def test_a_background_is_refused() -> None:
    with pytest.raises(ValueError, match="expected no background"):
        look_alike_case("case", 0, background=object())  # type: ignore[arg-type]
