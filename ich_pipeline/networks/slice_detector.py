"""What every detector of boxes in slices has in common, so that a config can name any of them."""

from collections.abc import Sequence

from torch import Tensor, nn

# Brain, subdural and soft tissue windows, as (lowest, highest) HU.
WINDOWS_HU = ((0.0, 80.0), (-20.0, 180.0), (-150.0, 230.0))


class SliceDetector(nn.Module):
    """A detector of boxes in axial slices.

    `forward(images_hu)` in evaluation mode gives, for each image, (N, 6): row0, column0, row1, column1 in pixels of the
    image, score, class (`yolo.ANY_CLASS` for a box without subtype), the surest first. `forward(images_hu, targets)`
    in training mode gives a dict of losses; `targets` is (T, 6): image, class, box.

    Args:
        image_size: pixels along each side of an image, a multiple of 32.
        windows_hu: each becomes a channel, 0 at its lowest HU and 1 at its highest.
        score_threshold: boxes with a lower score are not given; may be changed.
    """

    def __init__(
        self,
        image_size: int = 512,
        windows_hu: Sequence[Sequence[float]] = WINDOWS_HU,
        score_threshold: float = 0.25,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.score_threshold = score_threshold
        self.windows_hu = tuple((float(low), float(high)) for low, high in windows_hu)

    def windowed(self, images_hu: Tensor) -> Tensor:
        """(B, 1, H, W) HU as (B, windows, H, W), 0 to 1."""
        low, high = images_hu.new_tensor(self.windows_hu).T[..., None, None].unbind(0)
        return ((images_hu - low) / (high - low)).clamp(0, 1)
