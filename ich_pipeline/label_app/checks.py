"""What a request may say: ids, tags, file names, prompts. What becomes a path or a number goes through here."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ich_pipeline.errors import IchError
from ich_pipeline.label_app.prompt import Prompt
from ich_pipeline.transforms import Box

# An id becomes a file name, and MONAI Label cuts known endings out of the middle of a name as well.
IMAGE_ID = re.compile(r"(?!.*\.nii)[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.IGNORECASE)
TAG = re.compile(r"[A-Za-z0-9_-]{1,40}")
SUFFIXES = (".nii.gz", ".nii")
# A client may not choose files, models or code of this machine; MONAI Label's own server takes all of these.
NOT_A_CLIENTS = ("image", "model", "model_filename", "path", "bundle_path")
FINAL = "final"  # tag of a corrected label, as MONAI Label has it
BOX_SUFFIX = "_box"  # of the model that takes a box, behind the bundle's name
MAX_EPOCHS = 1000
MAX_CLICKS = 1000


class RequestError(IchError):
    """A request that is refused; the message says what was found, expected, and what to do.

    Attributes:
        status: of HTTP, 4xx.
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


def image_id(text: str) -> str:
    """An image id that may become a file name.

    Raises:
        RequestError: it may not.
    """
    if not IMAGE_ID.fullmatch(text):
        raise RequestError(
            f"image id {text[:100]!r}: expected up to 100 letters, digits, '.', '_' or '-', a letter or digit first "
            "and no '.nii' in it. Give another id."
        )
    return text


def label_tag(text: str) -> str:
    """A label tag that may become a folder name.

    Raises:
        RequestError: it may not.
    """
    if not TAG.fullmatch(text):
        raise RequestError(f"label tag {text[:100]!r}: expected up to 40 letters, digits, '_' or '-', such as final.")
    return text


def nifti_suffix(file_name: str | None) -> str:
    """`.nii.gz` or `.nii`, the only part of an uploaded file's name that is used.

    Raises:
        RequestError: another kind of file.
    """
    for suffix in SUFFIXES:
        if (file_name or "").lower().endswith(suffix):
            return suffix
    shown = Path(file_name or "").name[:100]
    raise RequestError(f"file {shown!r}: expected NIfTI, .nii or .nii.gz. Export it as NIfTI.", 415)


def inside(path: Path, folder: Path, what: str) -> Path:
    """The path with every link followed, which must still lie in the folder.

    Raises:
        RequestError: a link leads out of it.
    """
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise RequestError(f"{what} is a link that leads out of the studies folder. Copy the file there.", 403)
    return real


def own_params(params: Any) -> dict[str, Any]:
    """The `params` of a request, without any that would choose a file, a model or code of the server.

    Raises:
        RequestError: they are no JSON object, or name such a thing.
    """
    if not isinstance(params, dict):
        raise RequestError(f"params: found {type(params).__name__}, expected a JSON object of names and values.", 400)
    refused = sorted(set(params) & set(NOT_A_CLIENTS))
    if refused:
        raise RequestError(
            f"params.{refused[0]} is not taken: the server chooses files, models and devices. Name the scan by its id "
            "(?image=) and the model in the address."
        )
    return params


def epochs(params: Mapping[str, Any], default: int) -> int:
    """`max_epochs` of a training.

    Raises:
        RequestError: no whole number from 1.
    """
    found = params.get("max_epochs", default)
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= MAX_EPOCHS:
        raise RequestError(f"max_epochs={found!r}: expected a whole number from 1 to {MAX_EPOCHS}.")
    return found


def threshold_ml(params: Mapping[str, Any], default: float) -> float:
    """`threshold_ml` of the strategy that looks for volumes near it.

    Raises:
        RequestError: no number above 0.
    """
    found = params.get("threshold_ml", default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise RequestError(f"threshold_ml={found!r}: expected millilitres above 0.")
    return float(found)


def prompt_of(params: Mapping[str, Any], shape: tuple[int, int, int]) -> Prompt:
    """Box and clicks of a request, on a scan of this shape.

    `roi` is [i0, i1, j0, j1, k0, k1] in voxels, its ends in any order and beyond the scan as a user drags them; a voxel
    is in it when its centre is. `foreground` and `background` are lists of [i, j, k].

    Raises:
        RequestError: not numbers, a box that holds no voxel, a click outside the scan, or nothing at all.
    """
    box = _box(params["roi"], shape) if params.get("roi") else None
    foreground, background = (_clicks(params, name, shape) for name in ("foreground", "background"))
    if box is None and not foreground and not background:
        raise RequestError("neither roi nor foreground nor background. Draw a box, or click into or beside the bleed.")
    return Prompt(box, foreground, background)


def _box(roi: Any, shape: tuple[int, int, int]) -> Box:
    if not (isinstance(roi, list) and len(roi) == 6 and all(map(_is_number, roi))):
        raise RequestError(f"roi={str(roi)[:100]}: expected six numbers [i0, i1, j0, j1, k0, k1] in voxels.")
    box = []
    for axis, n in enumerate(shape):
        low, high = sorted(roi[2 * axis : 2 * axis + 2])
        start, stop = max(0, math.ceil(low)), min(n, math.floor(high) + 1)
        if stop <= start:
            raise RequestError(
                f"roi={roi}: no voxel of the scan {shape} has its centre inside along axis {'ijk'[axis]}. Draw the box "
                "over the head."
            )
        box.append((start, stop))
    return tuple(box)


def _clicks(params: Mapping[str, Any], name: str, shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    given = params.get(name) or []
    wrong = not isinstance(given, list) or len(given) > MAX_CLICKS
    if wrong or not all(isinstance(c, list) and len(c) == 3 and all(map(_is_number, c)) for c in given):
        raise RequestError(f"{name}={str(given)[:100]}: expected up to {MAX_CLICKS} voxels [i, j, k].")
    clicks = []
    for click in given:
        i, j, k = (round(value) for value in click)
        if not all(0 <= value < n for value, n in zip((i, j, k), shape, strict=True)):
            raise RequestError(f"{name} click {click} lies outside the scan {shape}. Click inside it.")
        clicks.append((i, j, k))
    return tuple(clicks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9
