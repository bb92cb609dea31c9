"""A box and clicks, applied: what the box's stage says goes inside the box, what was there stays outside."""

from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray

from ich_pipeline.errors import IchError
from ich_pipeline.transforms import Box

Voxel = tuple[int, int, int]
Probability = NDArray[np.float32]
Bools = NDArray[np.bool_]

# Cuts between the threshold and 1 that are tried to part two clicks in one piece.
CUTS_UP = 16
# Shares of the threshold at which a click beside the mask is looked for a piece of its own.
CUTS_DOWN = (0.5, 0.25, 0.125)
NO_BLOOD = "click_without_blood"  # flag: nothing there reaches the lowest cut
# Flag: 3D Slicer sends every click of a segment again with every box, those from before too.
OUTSIDE = "click_outside_box"


@dataclass(frozen=True)
class Prompt:
    """What a user drew, in voxels of the scan.

    Attributes:
        box: (start, stop) for each axis, or None: the mask as it is, and clicks on it.
        foreground, background: voxels that are blood, and that are none.
    """

    box: Box | None = None
    foreground: tuple[Voxel, ...] = ()
    background: tuple[Voxel, ...] = ()


class PromptError(IchError):
    """Clicks that no mask can honour."""


def apply_prompt(
    probability: Probability, threshold: float, current: Bools, prompt: Prompt
) -> tuple[NDArray[np.uint8], Probability, tuple[str, ...]]:
    """A new mask of what is there, what the network says and what the user drew.

    Inside the box the mask is what reaches the threshold; outside it is what it was. Clicks are honoured by
    26-connected component, and inside the box where there is one. A background click removes the piece it is in; one
    that shares it with a foreground click removes what a higher cut parts from that. A foreground click beside the mask
    adds the piece it is in at a half, a quarter or an eighth of the threshold.

    Args:
        probability: (I, J, K) in [0, 1].
        threshold: of the bundle.
        current: (I, J, K), the mask so far.
        prompt: what the user drew; clicks outside the box change nothing, and are flagged.

    Returns:
        uint8 mask, a probability that goes with it (1 and 0 where the user or an earlier mask decided), and flags.

    Raises:
        PromptError: a foreground and a background click that no cut parts.
    """
    where = tuple(slice(a, b) for a, b in prompt.box) if prompt.box else (slice(None),) * 3
    origin = tuple(s.start or 0 for s in where)
    p = probability[where]
    found = p >= threshold if prompt.box else current[where]
    foreground, background = (
        [(i - origin[0], j - origin[1], k - origin[2]) for i, j, k in clicks if _inside((i, j, k), prompt.box)]
        for clicks in (prompt.foreground, prompt.background)
    )
    piece, flags = _honour(found, p, threshold, foreground, background)
    if len(foreground) + len(background) < len(prompt.foreground) + len(prompt.background):
        flags += (OUTSIDE,)
    mask = current.copy()
    mask[where] = piece
    decided = mask.astype(np.float32)
    if prompt.box:
        # What the user decided against the network is put to the threshold's other side, and no further.
        decided[where] = np.where(
            piece, np.maximum(p, threshold), np.minimum(p, np.nextafter(np.float32(threshold), 0))
        )
    return mask.astype(np.uint8), decided, flags


def _honour(
    found: Bools, p: Probability, threshold: float, foreground: list[Voxel], background: list[Voxel]
) -> tuple[Bools, tuple[str, ...]]:
    mask = found.copy()
    for click in background:
        piece = _piece(mask, click)
        if piece is None:
            continue
        mine = [other for other in foreground if piece[other]]
        mask &= ~piece
        if mine:
            mask |= _parted(piece, p, threshold, mine, background)
    flags: tuple[str, ...] = ()
    for click in foreground:
        if mask[click]:
            continue
        pieces = (_piece(mask | (p >= threshold * share), click) for share in CUTS_DOWN)
        added = next((each for each in pieces if each is not None and not _any(each, background)), None)
        if added is None:
            flags = (NO_BLOOD,)
        else:
            mask |= added
    return mask, flags


def _parted(piece: Bools, p: Probability, threshold: float, foreground: list[Voxel], background: list[Voxel]) -> Bools:
    """Of one piece what holds the foreground clicks, at the lowest cut that parts it from the background ones."""
    for cut in np.linspace(threshold, 1, CUTS_UP, endpoint=False)[1:]:
        higher = piece & (p >= cut)
        kept = [_piece(higher, click) for click in foreground]
        if any(each is None for each in kept):
            break
        joined = np.logical_or.reduce([each for each in kept if each is not None])
        if not _any(joined, background):
            return np.asarray(joined, dtype=bool)
    raise PromptError(
        f"foreground click {foreground[0]} and a background click (voxels of the box) lie in one piece that no higher "
        "cut parts. Draw a box around what is blood instead, or erase by hand."
    )


def _piece(mask: Bools, click: Voxel) -> Bools | None:
    """The 26-connected component that a voxel is in; None where the mask is empty there."""
    if not mask[click]:
        return None
    labels = cc3d.connected_components(mask, connectivity=26)
    return np.asarray(labels == labels[click], dtype=bool)


def _inside(click: Voxel, box: Box | None) -> bool:
    return box is None or all(a <= n < b for n, (a, b) in zip(click, box, strict=True))


def _any(mask: Bools, clicks: list[Voxel]) -> bool:
    return any(bool(mask[click]) for click in clicks)
