"""Swin networks for a 2D crop: TransDeepLab and Swin-Unet, and which of the segmenters a bundle asks for.

TransDeepLab: Azad et al., arXiv 2208.00713 (PRIME 2022), the second stage of Rajapakse et al. (IEEE Access 2024).
Swin-Unet: Cao et al., arXiv 2105.05537 (ECCVW 2022). Swin blocks, patch embedding and patch merging are MONAI's.
Both are trained from scratch on one channel; the paper copies it three times to fit weights of photographs.
"""

from collections.abc import Mapping, Sequence

import torch
from monai.networks.blocks import PatchEmbed
from monai.networks.nets.swin_unetr import BasicLayer, PatchMergingV2
from torch import nn
from torch.nn import functional as F

from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.mixture import CropMixture

# Tracing, which OpenVINO needs, would fix the masks of shifted windows at the size that it was shown.
TORCH_ONLY = True
PATCH = 4  # pixels along the edge of a token, as in every Swin network
SEGMENTERS = ("transdeeplab", "swinunet", "em")


def build_segmenter(
    name: str,
    depths: Mapping[str, Sequence[int]],
    window_hu: Sequence[float] | str,
    blood_hu: float,
    dim: int = 96,
    head_channels: int = 32,
    window: int = 7,
    pyramid_windows: Sequence[int] = (2, 7, 14),
    drop_path: float = 0.1,
) -> nn.Module:
    """The network that segments a crop: (N, 1, H, W) in [0, 1] after the window to (N, 2, H, W) logits.

    Args:
        name: one of SEGMENTERS.
        depths: Swin blocks of each encoder stage, by name.
        window_hu: what 0 and 1 of the crop stand for; see `WindowHUd`.
        blood_hu: see `CropMixture`.
        dim: channels of the first stage; each further stage has twice as many.
        head_channels: channels of an attention head.
        window: edge of a window of attention, in tokens.
        pyramid_windows: those of the pyramid's branches.
        drop_path: share of blocks left out in training, rising from 0 to this with depth.

    Raises:
        ConfigError: no such segmenter, or `em` with windows that differ from scan to scan.
    """
    if name == "em":
        if isinstance(window_hu, str):
            raise ConfigError(f"segmenter=em with window_hu={window_hu}: expected one window in HU, such as [0, 80].")
        return CropMixture(window_hu, blood_hu)
    if name == "transdeeplab":
        return TransDeepLab(dim, depths[name], head_channels, window, pyramid_windows, drop_path)
    if name == "swinunet":
        return SwinUNet(dim, depths[name], head_channels, window, drop_path)
    raise ConfigError(f"segmenter={name}: expected one of {', '.join(SEGMENTERS)}")


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each token of (N, C, H, W)."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalise each token."""
        return super().forward(tokens.movedim(1, -1)).movedim(-1, 1)


class PatchExpand(nn.Module):
    """Patch expanding: one linear layer makes of each token scale x scale tokens of `out_dim` channels."""

    def __init__(self, dim: int, out_dim: int, scale: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(dim, out_dim * scale**2, 1, bias=False)
        self.shuffle = nn.PixelShuffle(scale)
        self.norm = ChannelNorm(out_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, dim, H, W) to (N, out_dim, scale H, scale W)."""
        return self.norm(self.shuffle(self.linear(tokens)))


def swin_layer(dim: int, depth: int, head_channels: int, window: int, drop_path: Sequence[float]) -> BasicLayer:
    """Swin blocks on (N, dim, H, W) tokens, every other one with shifted windows."""
    heads = max(1, dim // head_channels)
    return BasicLayer(dim, depth, heads, (window, window), list(drop_path), qkv_bias=True)


class SwinEncoder(nn.Module):
    """Tokens of 4 x 4 pixels, then stages of Swin blocks with patch merging between them."""

    def __init__(self, dim: int, depths: Sequence[int], head_channels: int, window: int, drop_path: float) -> None:
        super().__init__()
        # Without Swin's norm here: of a flat patch it leaves the sign, and on CT how dense a patch is says what it is.
        self.embed = PatchEmbed(PATCH, in_chans=1, embed_dim=dim, norm_layer=None, spatial_dims=2)
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        for n, depth in enumerate(depths):
            first = sum(depths[:n])
            self.stages.append(swin_layer(dim * 2**n, depth, head_channels, window, rates[first : first + depth]))
            if n + 1 < len(depths):
                self.merges.append(PatchMergingV2(dim * 2**n, spatial_dims=2))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(N, 1, H, W) to a (N, dim 2^n, H / 4 / 2^n, W / 4 / 2^n) map of each stage."""
        tokens = self.embed(4 * image - 2)  # around 0, as weights expect
        maps = []
        for n, stage in enumerate(self.stages):
            if n:
                tokens = self.merges[n - 1](tokens.movedim(1, -1)).movedim(-1, 1)
            tokens = stage(tokens)
            maps.append(tokens)
        return maps


class CrossAttentionFusion(nn.Module):
    """Fuses maps of several scales token by token: the encoder's token asks, the same place at every scale answers.

    How "cross-attention fusion" is read here: multi-head attention (Vaswani et al., arXiv 1706.03762) with the
    encoder's token for query and the branches' tokens at its place for keys and values, then a residual.
    """

    def __init__(self, dim: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, dim // head_channels)
        self.ask, self.tell = ChannelNorm(dim), ChannelNorm(dim)
        self.query, self.project = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.key_value = nn.Conv2d(dim, 2 * dim, 1)

    def forward(self, tokens: torch.Tensor, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """(N, C, H, W) and as many maps of its shape as there are scales, to one map of its shape."""
        n, channels, height, width = tokens.shape
        split = (n, self.heads, channels // self.heads, height, width)
        query = self.query(self.ask(tokens)).view(split)
        pairs = [self.key_value(self.tell(scale)).chunk(2, dim=1) for scale in scales]
        keys, values = (torch.stack([pair[side].view(split) for pair in pairs]) for side in (0, 1))
        weights = ((query * keys).sum(dim=3, keepdim=True) * split[2] ** -0.5).softmax(dim=0)
        return tokens + self.project((weights * values).sum(dim=0).reshape(tokens.shape))


class SwinPyramid(nn.Module):
    """The atrous spatial pyramid in Swin blocks: branches with windows of several sizes, fused by cross-attention."""

    def __init__(self, dim: int, head_channels: int, windows: Sequence[int], drop_path: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            swin_layer(dim, 2, head_channels, window, [drop_path, drop_path]) for window in windows
        )
        self.fusion = CrossAttentionFusion(dim, head_channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        return self.fusion(tokens, [branch(tokens) for branch in self.branches])


class TransDeepLab(nn.Module):
    """DeepLab v3+ in Swin blocks: encoder to a sixteenth, pyramid, and a decoder that takes the quarter's map along.

    Args:
        dim: see `build_segmenter`, as the others.
        depths: three stages: the pyramid works at a sixteenth of the pixels, DeepLab's output stride.
        head_channels: likewise.
        window: likewise.
        pyramid_windows: likewise.
        drop_path: likewise.
    """

    torch_only = TORCH_ONLY

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        head_channels: int,
        window: int,
        pyramid_windows: Sequence[int],
        drop_path: float,
    ) -> None:
        super().__init__()
        top = dim * 2 ** (len(depths) - 1)
        self.encoder = SwinEncoder(dim, depths, head_channels, window, drop_path)
        self.pyramid = SwinPyramid(top, head_channels, pyramid_windows, drop_path)
        self.expand = PatchExpand(top, dim, 2 ** (len(depths) - 1))
        self.join = nn.Conv2d(2 * dim, dim, 1)
        self.decoder = swin_layer(dim, 2, head_channels, window, [drop_path, drop_path])
        self.enlarge = PatchExpand(dim, dim, PATCH)
        self.head = nn.Conv2d(dim, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) to (N, 2, H, W) logits; H and W are multiples of 4 times 2 a patch merging."""
        low, *_, high = self.encoder(image)
        joined = self.join(torch.cat([self.expand(self.pyramid(high)), low], dim=1))
        return self.head(self.enlarge(self.decoder(joined)))


class SwinUNet(nn.Module):
    """U-Net in Swin blocks: every stage's map goes to the decoder (arguments: see `build_segmenter`)."""

    torch_only = TORCH_ONLY

    def __init__(self, dim: int, depths: Sequence[int], head_channels: int, window: int, drop_path: float) -> None:
        super().__init__()
        self.encoder = SwinEncoder(dim, depths, head_channels, window, drop_path)
        self.expands, self.joins, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for n in reversed(range(len(depths) - 1)):
            width = dim * 2**n
            self.expands.append(PatchExpand(2 * width, width, 2))
            self.joins.append(nn.Conv2d(2 * width, width, 1))
            self.stages.append(swin_layer(width, depths[n], head_channels, window, [drop_path] * depths[n]))
        self.enlarge = PatchExpand(dim, dim, PATCH)
        self.head = nn.Conv2d(dim, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) to (N, 2, H, W) logits; H and W are multiples of 4 times 2 a patch merging."""
        *skips, tokens = self.encoder(image)
        for expand, join, stage, skip in zip(self.expands, self.joins, self.stages, reversed(skips), strict=True):
            tokens = stage(join(torch.cat([expand(tokens), skip], dim=1)))
        return self.head(self.enlarge(tokens))


def foreground(network: nn.Module, crops: torch.Tensor) -> torch.Tensor:
    """Probability of hemorrhage, (N, 1, H, W) float32, of (N, 1, H, W) crops."""
    return F.softmax(network(crops).float(), dim=1)[:, 1:]
