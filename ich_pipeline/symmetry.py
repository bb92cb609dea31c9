"""The head's mid-sagittal plane, and its mirror image as a second channel (Li et al., JBHI 2021, section II-A).

The plane is found by registering the head rigidly to its own mirror image, with SimpleITK at low resolution. The skull
leads: it stays where it is when a bleed pushes the brain aside. SimpleITK cannot hold shear, so what it sees is
resampled to a grid along the patient's axes; the mirror image is then read on the scan's own, sheared grid.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - its own documentation's name for it
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import ArrayLike, NDArray

from ich_pipeline.errors import GeometryError
from ich_pipeline.geometry import Affine, Grid
from ich_pipeline.transforms import interpolate_in_plane

META_KEY = "mid_plane"  # where an image's metadata hold it
# Air and fat are 0 and bone is 1, so that brain and blood (0.1 to 0.2) hardly count.
SKULL_HU = (0.0, 400.0)
COARSE_MM, FINE_MM = 10.0, 6.0
# Turns about the long and the front axis, and shifts, that are tried first: steps to each side, and their size. The
# mirror image turns and moves twice as far as the plane, so these reach planes turned by 20 degrees; what follows
# finds those at 25 as well.
TURNS, TURN_DEG = 2, 20.0
SHIFTS, SHIFT_MM = 2, 15.0
LENGTH_OF_A_RADIAN_MM = 80.0  # at the skull: what makes turns and shifts comparable to an optimiser
# Less head than this, about a fifth of an adult's, shows too little of both halves.
LEAST_HEAD_ML = 500.0


@dataclass(frozen=True)
class MidPlane:
    """The plane between the halves of a head: points p in RAS mm with normal . p = offset_mm.

    Attributes:
        normal: of length 1, towards the patient's right.
        offset_mm: where the plane meets the normal through the scanner's origin.
    """

    normal: tuple[float, float, float]
    offset_mm: float

    def distance_mm(self, points_mm: ArrayLike) -> NDArray[np.float64]:
        """How far points (..., 3) lie to the patient's right of the plane, in mm; the left is negative.

        Of a point that belongs on the midline (septum pellucidum, pineal gland) this is the midline shift.
        """
        return np.asarray(points_mm, dtype=np.float64) @ np.array(self.normal) - self.offset_mm

    @property
    def reflection(self) -> Affine:
        """(4, 4) matrix that takes a point to its mirror image."""
        normal, matrix = np.array(self.normal), np.eye(4)
        matrix[:3, :3] -= 2 * np.outer(normal, normal)
        matrix[:3, 3] = 2 * self.offset_mm * normal
        return matrix

    @classmethod
    def of(cls, image: MetaTensor) -> "MidPlane | None":
        """What `MirrorChanneld` left in the metadata of an image; None without."""
        text = image.meta.get(META_KEY)
        if not text:
            return None
        values = json.loads(text)
        x, y, z = values["normal"]
        return cls((x, y, z), values["offset_mm"])


def find_mid_plane(image_hu: torch.Tensor, affine: Affine, name: str = "scan") -> MidPlane:
    """The plane in which a head is most like its mirror image.

    Both are registered rigidly (six numbers, correlation): first every turn and shift of a coarse search, then
    gradient descent from the best. What lies outside the field of view counts on neither side.

    Args:
        image_hu: (I, J, K) Hounsfield units, stored in any order.
        affine: (4, 4) voxel index to RAS mm; may hold shear.
        name: of the scan, for errors.

    Raises:
        GeometryError: too little of a head, or none of it overlaps its mirror image.
    """
    grid = Grid(tuple(image_hu.shape), affine)  # type: ignore[arg-type]
    head_ml = float((image_hu > SKULL_HU[0]).sum()) * grid.voxel_volume_mm3 / 1000
    if head_ml < LEAST_HEAD_ML:
        raise GeometryError(
            f"{name}: {head_ml:.0f} mL above {SKULL_HU[0]:g} HU, expected a head with at least {LEAST_HEAD_ML:g} mL to "
            "find its plane of symmetry. Take a bundle, or a variant, without the mirror channel (mirror=false)."
        )
    low, high = SKULL_HU
    skull = ((image_hu.float() - low) / (high - low)).clamp(0, 1)
    transform: sitk.Euler3DTransform | None = None
    for edge_mm in (COARSE_MM, FINE_MM):
        head = _Upright.of(skull, grid, edge_mm)
        method = _method(head)
        if transform is None:
            transform = head.centred()
            method.SetOptimizerAsExhaustive([0, TURNS, TURNS, SHIFTS, 0, 0])
            turn = float(np.radians(TURN_DEG))
            method.SetOptimizerScales([1.0, turn, turn, SHIFT_MM, 1.0, 1.0])
        else:
            method.SetOptimizerAsRegularStepGradientDescent(learningRate=4.0, minStep=0.01, numberOfIterations=100)
            method.SetOptimizerScales([LENGTH_OF_A_RADIAN_MM**2] * 3 + [1.0] * 3)
        method.SetInitialTransform(transform, inPlace=True)
        try:
            method.Execute(head.image, head.mirrored)
        except RuntimeError as error:
            raise GeometryError(
                f"{name}: no plane of symmetry found, {str(error).strip().splitlines()[-1]}. Take a bundle, or a "
                "variant, without the mirror channel (mirror=false)."
            ) from error
    assert transform is not None
    return _plane_of(transform, head.middle_x_mm)


@dataclass(frozen=True, eq=False)
class _Upright:
    """A head on a grid along the patient's axes, and the same flipped left-right; masks say where there are data."""

    image: sitk.Image
    mirrored: sitk.Image
    mask: sitk.Image
    mirrored_mask: sitk.Image
    middle_x_mm: float  # of the grid: where it was flipped
    centre_mm: tuple[float, float, float]  # of mass

    @classmethod
    def of(cls, skull: torch.Tensor, grid: Grid, edge_mm: float) -> "_Upright":
        # In plane pixels are averaged first; slices are about as far apart as the grid's points.
        size = [
            n if axis == grid.slice_axis else max(1, round(n * edge / edge_mm))
            for axis, (n, edge) in enumerate(zip(grid.shape, grid.edge_mm, strict=True))
        ]
        reduced = interpolate_in_plane(skull[None], size, grid.slice_axis)[0]
        corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in grid.shape], indexing="ij"), axis=-1)
        corners_mm = grid.to_mm(corners.reshape(-1, 3))
        low_mm, high_mm = corners_mm.min(axis=0), corners_mm.max(axis=0)
        shape = np.maximum(np.ceil((high_mm - low_mm) / edge_mm).astype(int), 1)
        origin_mm = (low_mm + high_mm) / 2 - (shape - 1) / 2 * edge_mm
        upright = np.eye(4)
        upright[:3, :3] *= edge_mm
        upright[:3, 3] = origin_mm
        # Sample o of `reduced` lies at sample (o + 1/2) n / size - 1/2 of the image.
        step = np.array(grid.shape) / np.array(size)
        shrink = np.diag([*(1 / step), 1.0])
        shrink[:3, 3] = (0.5 - 0.5 * step) / step
        values, held = _read(reduced, shrink @ np.linalg.inv(grid.affine) @ upright, shape.tolist())
        values = torch.where(held, values, 0)
        weights = values.numpy().astype(np.float64)
        axes = [origin_mm[a] + edge_mm * np.arange(shape[a]) for a in range(3)]
        mass = max(weights.sum(), 1e-9)
        centre = [float((weights.sum(axis=tuple({0, 1, 2} - {a})) * axes[a]).sum() / mass) for a in range(3)]

        def to_itk(array: torch.Tensor) -> sitk.Image:
            image = sitk.GetImageFromArray(np.ascontiguousarray(array.permute(2, 1, 0).numpy()))
            image.SetSpacing([edge_mm] * 3)
            image.SetOrigin([float(o) for o in origin_mm])
            return image

        mask = held.to(torch.uint8)
        return cls(
            image=to_itk(values),
            mirrored=to_itk(values.flip(0)),
            mask=to_itk(mask),
            mirrored_mask=to_itk(mask.flip(0)),
            middle_x_mm=float((low_mm + high_mm)[0] / 2),
            centre_mm=(centre[0], centre[1], centre[2]),
        )

    def centred(self) -> sitk.Euler3DTransform:
        """Turns about the head's centre of mass, which is moved to that of the mirror image."""
        transform = sitk.Euler3DTransform()
        transform.SetCenter(self.centre_mm)
        transform.SetTranslation((2 * (self.middle_x_mm - self.centre_mm[0]), 0.0, 0.0))
        return transform


def _method(head: _Upright) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    # Threads would add up in another order, and every route into a bundle is to give the same mask.
    method.SetNumberOfThreads(1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMetricAsCorrelation()
    method.SetMetricFixedMask(head.mask)
    method.SetMetricMovingMask(head.mirrored_mask)
    return method


def _plane_of(transform: sitk.Euler3DTransform, middle_x_mm: float) -> MidPlane:
    """The mirror that is nearest to: move by the transform, then flip x about the middle of the grid."""
    turn = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    flip = np.diag([-1.0, 1.0, 1.0])
    linear = flip @ turn
    moved = flip @ (centre + np.array(transform.GetTranslation())) + (2 * middle_x_mm, 0, 0)
    # A mirror's matrix is symmetric with one eigenvalue -1, whose vector is the normal; eigh sorts, so it comes first.
    normal = np.linalg.eigh((linear + linear.T) / 2)[1][:, 0]
    normal = normal * np.sign(normal[0])
    # Half way between a point and its image lies the plane.
    x, y, z = (float(n) for n in normal)
    return MidPlane((x, y, z), float(normal @ (centre + moved) / 2))


def _read(image: torch.Tensor, to_index: Affine, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a 3D image linearly at the points of another grid, by ITK in half of PyTorch's time.

    ITK knows no shear, so it is given indices for positions, and all geometry is in `to_index`.

    Args:
        to_index: (4, 4) index of the other grid to an index of the image.
        size: of the other grid.

    Returns:
        float32 values and bool, where they are from: elsewhere there is nothing to read.
    """
    # Axes in reverse: ITK counts the last one first.
    matrix = to_index[[2, 1, 0]][:, [2, 1, 0, 3]]
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:, :3].ravel().tolist())
    transform.SetTranslation(matrix[:, 3].tolist())
    resample = sitk.ResampleImageFilter()
    resample.SetNumberOfThreads(torch.get_num_threads())  # each voxel by itself: the result is the same
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetTransform(transform)
    resample.SetSize([int(n) for n in reversed(size)])
    resample.SetDefaultPixelValue(float("-inf"))
    values = resample.Execute(sitk.GetImageFromArray(np.ascontiguousarray(image.numpy(), dtype=np.float32)))
    read = torch.from_numpy(sitk.GetArrayFromImage(values))
    return read, torch.isfinite(read)


class MirrorChanneld(MapTransform):
    """Add a second channel: the head's mirror image, aligned to it by its plane of symmetry.

    Takes (1, S, R, C) in HU on the model grid and gives (2, S, R, C). Left and right are the patient's, whatever the
    order of storage. Where the mirror image would come from outside the field of view the image's own value stands: no
    asymmetry is claimed. The plane is left in the metadata (`MidPlane.of`); the operations that `Invertd` undoes are
    not touched.

    Raises:
        GeometryError: no plane of symmetry is found.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the mirror image to every key."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            [values], affine = image.as_tensor(), np.asarray(image.affine, dtype=np.float64)
            plane = find_mid_plane(values, affine, str(image.meta.get("filename_or_obj", "scan")))
            mirrored, held = _read(values, np.linalg.inv(affine) @ plane.reflection @ affine, values.shape)
            both = torch.stack([values, torch.where(held, mirrored, values)])
            meta = {**image.meta, META_KEY: json.dumps(asdict(plane))}
            d[key] = MetaTensor(both, meta=meta, applied_operations=image.applied_operations)
        return d
