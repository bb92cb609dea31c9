"""Swin segmenters of crops: shapes, what the parts do, and that they can learn."""

import pytest
import torch

from ich_pipeline.engines import to_openvino
from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.transdeeplab import (
    CrossAttentionFusion,
    PatchExpand,
    SwinEncoder,
    SwinPyramid,
    build_segmenter,
    foreground,
)

DEPTHS = {"transdeeplab": [2, 2, 2], "swinunet": [2, 2, 2]}


def small(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    given = {"dim": 16, "head_channels": 8, "window": 4, "pyramid_windows": [2, 4], "drop_path": 0.0} | settings
    return build_segmenter(name, DEPTHS, (0, 80), 45.0, **given)


@pytest.mark.parametrize("name", ["transdeeplab", "swinunet"])
def test_size_is_kept_and_every_parameter_counts(name: str) -> None:
    network = small(name)
    logits = network(torch.rand(2, 1, 64, 96))
    assert logits.shape == (2, 2, 64, 96)
    logits.square().mean().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["transdeeplab", "swinunet"])
def test_a_crop_can_be_learned(name: str) -> None:
    network = small(name).train()
    image = torch.rand(1, 1, 64, 64) * 0.2 + 0.3
    image[..., 20:44, 8:30] += 0.4
    label = (image[:, 0] > 0.6).long()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(image), label).backward()
        optimizer.step()
    found = foreground(network.eval(), image)[:, 0] > 0.5
    assert 2 * (found & (label > 0)).sum() / (found.sum() + label.sum()) > 0.9


def test_published_sizes() -> None:
    """Swin-T's width: 28 x 96 maps of a quarter to a sixteenth, and two channels out."""
    encoder = SwinEncoder(96, [1, 1, 1], 32, 7, 0.0)
    with torch.inference_mode():
        maps = encoder(torch.rand(1, 1, 224, 224))
    assert [tuple(each.shape[1:]) for each in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14)]
    assert [stage.blocks[0].attn.num_heads for stage in encoder.stages] == [3, 6, 12]


def test_patch_expanding_puts_tokens_where_they_belong() -> None:
    expand = PatchExpand(8, 4, 2)
    tokens = torch.zeros(1, 8, 3, 3)
    tokens[..., 1, 2] = torch.randn(8)
    held = expand.shuffle(expand.linear(tokens)).abs().sum(dim=1)[0] > 0
    assert torch.nonzero(held).tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


def test_pyramid_sees_as_far_as_its_largest_window() -> None:
    """A change in one token reaches the branch's own window, and with shifted windows its neighbours."""
    torch.manual_seed(0)
    near, far = (SwinPyramid(8, 8, windows, 0.0).eval() for windows in ([2], [2, 8]))
    tokens = torch.randn(1, 8, 16, 16)
    changed = tokens.clone()
    changed[..., 0, 0] = torch.randn(8)  # not + 1, which the norm takes away
    with torch.inference_mode():
        reach = [(p(changed) - p(tokens)).abs().sum(dim=1)[0] > 1e-6 for p in (near, far)]
    assert reach[0].sum() < 16 < 64 <= reach[1].sum()


def test_fusion_weighs_scales_by_the_encoders_token() -> None:
    """With equal scales the answer is their value, whatever the weights; and the weights are a share for each scale."""
    torch.manual_seed(0)
    fusion = CrossAttentionFusion(8, 4).eval()
    tokens, scale = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    with torch.inference_mode():
        value = fusion.key_value(fusion.tell(scale)).chunk(2, dim=1)[1]
        torch.testing.assert_close(fusion(tokens, [scale] * 3), tokens + fusion.project(value))
        other = torch.randn(2, 8, 5, 5)
        one = fusion(tokens, [scale, other])
        torch.testing.assert_close(one, fusion(tokens, [other, scale]))  # no order among scales
        assert not torch.allclose(one, fusion(tokens, [scale, scale]))


def test_mixture_needs_no_weights_and_finds_a_dense_patch() -> None:
    network = small("em")
    assert not network.state_dict()
    torch.manual_seed(0)
    hu = 30 + 4 * torch.randn(48, 48)
    hu[10:30, 12:34] = 65 + 4 * torch.randn(20, 22)
    hu[40:] = 300  # bone, and air beside it
    hu[:, :3] = -1000
    crop = (hu / 80).clamp(0, 1)[None, None]
    found = foreground(network, crop)
    assert found.shape == (1, 1, 48, 48)
    blood = found[0, 0] > 0.5
    assert blood[10:30, 12:34].float().mean() > 0.95
    assert not blood[40:].any()
    assert not blood[:, :3].any()
    assert blood.sum() < 1.1 * 20 * 22
    assert foreground(network, torch.ones(1, 1, 8, 8)).max() < 1e-3  # bone only


@pytest.mark.parametrize("name", ["transdeeplab", "swinunet", "em"])
def test_openvino_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"engine=openvino: \w+ runs in PyTorch only"):
        to_openvino(small(name).eval(), "off")


def test_another_segmenter_is_refused() -> None:
    with pytest.raises(ConfigError, match="segmenter=unet: expected one of transdeeplab, swinunet, em"):
        small("unet")
