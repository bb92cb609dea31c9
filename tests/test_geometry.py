"""Grids: volumes and spacings under tilt, what is refused, and when two grids are one."""

import numpy as np
import pytest
from shapes import make_grid

from ich_pipeline.errors import GeometryError
from ich_pipeline.geometry import SAME_GRID_TOLERANCE, Grid, grid_difference, require_same_grid

AXES = ["RAS", "LPS", "PIR", "SAL", "ASR"]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("tilt_deg", [0.0, -16.5, 25.0])
class TestTilt:
    def grid(self, axes, tilt_deg) -> Grid:
        return make_grid((40, 44, 12), (0.5, 0.6, 5.0), axes=axes, tilt_deg=tilt_deg)

    def test_voxel_volume_is_exact(self, axes, tilt_deg):
        grid = self.grid(axes, tilt_deg)
        assert grid.voxel_volume_mm3 == pytest.approx(0.5 * 0.6 * 5)
        # the product of edges reads 1 / cos(tilt) too high
        assert np.prod(grid.edge_mm) == pytest.approx(1.5 / np.cos(np.radians(tilt_deg)))

    def test_slices(self, axes, tilt_deg):
        grid = self.grid(axes, tilt_deg)
        assert grid.shape[grid.slice_axis] == 12
        assert grid.slice_spacing_mm == pytest.approx(5.0)
        assert grid.tilt_deg == pytest.approx(abs(tilt_deg), abs=1e-5)

    def test_corners(self, axes, tilt_deg):
        grid = self.grid(axes, tilt_deg)
        corners = grid.corners_mm()
        assert corners.mean(axis=0) == pytest.approx([0, 0, 0], abs=1e-9)
        last = grid.affine @ [*(n - 1 for n in grid.shape), 1]
        assert np.abs(corners - last[:3]).sum(axis=1).min() == pytest.approx(0, abs=1e-9)


def test_scalar_turn_keeps_volume_and_slices():
    grid = make_grid((40, 44, 12), (0.5, 0.6, 5.0), turn_deg=20)
    assert grid.voxel_volume_mm3 == pytest.approx(1.5)
    assert grid.slice_spacing_mm == pytest.approx(5)
    assert grid.tilt_deg == pytest.approx(0, abs=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("affine", "match"),
        [
            (np.eye(3), "4x4"),
            (np.diag([1.0, np.nan, 1, 1]), "finite"),
            (np.diag([1.0, 1, 1, 2]), "last row"),
            (np.diag([1.0, 0, 1, 1]), "singular"),
            (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        ],
    )
    def test_broken_affine(self, affine, match):
        with pytest.raises(GeometryError, match=match):
            Grid((4, 4, 4), affine)

    @pytest.mark.parametrize("shape", [(4, 4), (4, 4, 0), (4, 4, 4, 1)])
    def test_broken_shape(self, shape):
        with pytest.raises(GeometryError, match="three positive numbers"):
            Grid(shape, np.eye(4))

    @pytest.mark.parametrize(
        ("spacing", "match"),
        [(1e-3, "voxel volume"), (50.0, "voxel volume"), (0.4, "field of view"), (6.1, "field of view")],
    )
    def test_implausible(self, spacing, match):
        with pytest.raises(GeometryError, match=rf"case: {match}"):
            Grid((100, 100, 30), np.diag([spacing, spacing, spacing, 1])).check_plausible("case")

    def test_plausible(self):
        make_grid((512, 512, 30), (0.45, 0.45, 5)).check_plausible("case")
        make_grid((500, 500, 100), (1.2, 1.2, 6)).check_plausible("case")
        make_grid((256, 256, 2), (0.9, 0.9, 5)).check_plausible("case")  # two slices are thin, not implausible


class TestSameGrid:
    GRID = make_grid((100, 110, 20), (0.5, 0.5, 5), tilt_deg=10)

    def moved(self, **change) -> Grid:
        affine = self.GRID.affine.copy()
        affine[change.get("at", (0, 3))] += change["by"]
        return Grid(self.GRID.shape, affine)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_shift_in_either_direction(self, axis, sign):
        tolerance_mm = SAME_GRID_TOLERANCE * 0.5
        assert grid_difference(self.moved(at=(axis, 3), by=sign * 0.9 * tolerance_mm), self.GRID) is None
        assert "apart" in grid_difference(self.moved(at=(axis, 3), by=sign * 1.1 * tolerance_mm), self.GRID)

    def test_spacing_that_adds_up(self):
        # 0.1 um a voxel is 10 um at the far corner, 1 um a voxel is 0.1 mm
        assert grid_difference(self.moved(at=(0, 0), by=1e-5), self.GRID) is None
        assert grid_difference(self.moved(at=(0, 0), by=1e-3), self.GRID)

    def test_flip_about_the_centre(self):
        flipped = self.GRID.affine @ np.diag([-1.0, 1, 1, 1])
        flipped[:3, 3] += self.GRID.affine[:3, 0] * (self.GRID.shape[0] - 1)
        assert grid_difference(Grid(self.GRID.shape, flipped), self.GRID)

    def test_lost_shear(self):
        upright = make_grid((100, 110, 20), (0.5, 0.5, 5))
        assert grid_difference(upright, self.GRID)

    def test_single_slice_has_an_edge_to_compare(self):
        one = Grid((100, 110, 1), np.diag([0.5, 0.5, 5, 1]))
        assert grid_difference(Grid((100, 110, 1), np.diag([0.5, 0.5, 3, 1])), one)

    def test_shape(self):
        other = Grid((100, 110, 21), self.GRID.affine)
        with pytest.raises(GeometryError, match=r"case: mask is on another grid than its scan: shape .*Resample"):
            require_same_grid("case", "mask", other, self.GRID)
        require_same_grid("case", "mask", self.GRID, self.GRID)
