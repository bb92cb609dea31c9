"""The cascade looks where it should, at the size its networks can halve, and says the same as a look at everything."""

import numpy as np
import pytest
import torch
from heads import OracleCascade
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from torch import nn
from torch.nn import functional as F

from ich_pipeline import cascade
from ich_pipeline.cascade import CascadeInferer, find_windows, skip_air
from ich_pipeline.errors import ConfigError
from ich_pipeline.networks.cascade_unet import (
    CascadeLoss,
    CascadeOutput,
    CascadeUNet,
    ResidualUNet,
    window_around,
)

TINY = [2] * 5  # five levels: rows and columns are halved four times, slices twice


def oracle(**settings) -> OracleCascade:
    return OracleCascade(**{"coarse_scale": 1, "resize": False, "margin": (1, 4, 4)} | settings).eval()


def head(shape=(12, 96, 80), lesions=((6, 40, 30),), radius=6.0) -> torch.Tensor:
    """(1, 1, S, R, C) in [0, 1]: air 0, bone 1, tissue 0.4, lesions of 0.78."""
    s, r, c = np.ogrid[tuple(slice(n) for n in shape)]
    radius_of_head = np.hypot((r - shape[1] / 2) / (0.45 * shape[1]), (c - shape[2] / 2) / (0.45 * shape[2])) + 0 * s
    image = np.select([radius_of_head < 0.9, radius_of_head < 1], [0.4, 1.0], 0.0)
    for a, b, d in lesions:
        image[np.sqrt((2.5 * (s - a)) ** 2 + (r - b) ** 2 + (c - d) ** 2) < radius] = 0.78
    return torch.from_numpy(image.astype(np.float32))[None, None]


def truth(image: torch.Tensor) -> torch.Tensor:
    return ((image > 0.66) & (image < 0.9)).float()


class TestFindWindows:
    NETWORK = oracle()

    def region(self, *boxes, shape=(16, 128, 128)) -> np.ndarray:
        region = np.zeros(shape, bool)
        for box in boxes:
            region[tuple(slice(a, b) for a, b in box)] = True
        return region

    def test_one_region_with_its_margin(self):
        (window,) = find_windows(self.region(((5, 8), (40, 50), (60, 75))), self.NETWORK)
        sizes = [s.stop - s.start for s in window]
        # 3 + 2 x 1 slices rounded up to 8, 10 + 8 rows to 32, 15 + 8 columns to 32
        assert sizes == [8, 32, 32]
        for s, (a, b), margin in zip(window, ((5, 8), (40, 50), (60, 75)), (1, 4, 4), strict=True):
            assert s.start <= a - margin
            assert s.stop >= b + margin

    @pytest.mark.parametrize("corner", [(0, 0, 0), (15, 127, 127), (0, 127, 64)])
    def test_window_stays_inside_at_the_border(self, corner):
        (window,) = find_windows(self.region([(c, c + 1) for c in corner]), self.NETWORK)
        for s, c, n, d in zip(window, corner, (16, 128, 128), self.NETWORK.divisible, strict=True):
            assert 0 <= s.start <= c < s.stop <= n
            assert (s.stop - s.start) % d == 0

    def test_empty_region_means_look_at_everything(self):
        assert find_windows(self.region(), self.NETWORK) == [(slice(0, 16), slice(0, 128), slice(0, 128))]

    def test_neighbours_share_a_window_and_strangers_do_not(self):
        near = self.region(((2, 4), (10, 14), (10, 14)), ((2, 4), (22, 26), (10, 14)))
        far = self.region(((2, 4), (10, 14), (10, 14)), ((10, 12), (100, 104), (100, 104)))
        assert len(find_windows(near, self.NETWORK)) == 1
        assert len(find_windows(far, self.NETWORK)) == 2

    def test_diagonal_neighbours_are_one_region(self):
        region = self.region()
        region[3, 50, 50] = region[4, 51, 51] = True
        assert len(find_windows(region, self.NETWORK)) == 1

    @pytest.mark.parametrize("seed", range(5))
    def test_many_regions(self, seed):
        rng = np.random.default_rng(seed)
        region = rng.random((24, 256, 320)) < 3e-6
        windows = find_windows(region, self.NETWORK)
        covered = np.zeros(region.shape, int)
        for window in windows:
            covered[window] += 1
            sizes = [s.stop - s.start for s in window]
            assert all(size % d == 0 for size, d in zip(sizes, self.NETWORK.divisible, strict=True))
        assert covered.max() == 1  # no voxel is looked at twice
        assert covered[region].all()


@pytest.mark.parametrize(
    ("low", "high", "n", "margin", "divisible"),
    [(3, 5, 8, 0, 4), (0, 8, 8, 2, 4), (7, 8, 8, 1, 4), (10, 91, 96, 4, 16)],
)
def test_window_around_holds_the_box(low, high, n, margin, divisible):
    (window,) = window_around([low], [high], [n], [margin], [divisible])
    assert max(0, low - margin) >= window.start >= 0
    assert min(n, high + margin) <= window.stop <= n
    assert (window.stop - window.start) % divisible == 0


class TestModes:
    SHAPES = ((12, 96, 80), (9, 77, 83), (1, 60, 70), (30, 97, 64))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("coarse_scale", [1, 2])
    @pytest.mark.parametrize("mode", ["fast", "full"])
    def test_finds_what_is_there_at_any_size(self, mode, coarse_scale, shape):
        image = head(shape, lesions=((shape[0] // 2, 40, 30),))
        score = CascadeInferer((8, 64, 64), mode=mode)(image, oracle(coarse_scale=coarse_scale))
        assert score.shape == image.shape  # padding is stripped
        assert score.dtype == torch.float32
        assert torch.equal((score > 0.5).float(), truth(image))

    def test_fast_mode_looks_only_around_the_region(self):
        network, image = oracle(), head(lesions=((6, 30, 24), (6, 70, 50)), radius=5)
        score = CascadeInferer((8, 64, 64), mode="fast")(image, network)
        assert network.coarse_stage.seen == [(1, 1, 12, 96, 80)]
        assert len(network.fine_stage.seen) == 2
        assert all(shape[2:] == (8, 32, 32) for shape in network.fine_stage.seen)
        assert int((score == 0).sum()) == image.numel() - 2 * 8 * 32 * 32

    def test_large_window_is_taken_in_slabs(self, monkeypatch):
        # The whole head where nothing is found: 10 million voxels at once would take 9 GiB with the published filters.
        monkeypatch.setattr(cascade, "LARGEST_WINDOW_VOXELS", 100_000)
        network, image = oracle(), head((40, 96, 80), lesions=((19, 40, 30), (33, 60, 40)))
        network.coarse_stage.low = network.coarse_stage.high = 2.0  # blind
        score = CascadeInferer((8, 64, 64), mode="fast")(image, network)
        assert {shape[2:] for shape in network.fine_stage.seen} == {(20, 96, 80)}
        assert len(network.fine_stage.seen) == 3
        assert torch.equal((score > 0.5).float(), truth(image))

    @pytest.mark.parametrize("mode", ["fast", "full"])
    def test_nothing_found_means_look_at_everything(self, mode):
        network, image = oracle(), head()
        network.coarse_stage.low = network.coarse_stage.high = 2.0  # blind
        score = CascadeInferer((8, 64, 64), mode=mode)(image, network)
        assert torch.equal((score > 0.5).float(), truth(image))
        if mode == "fast":
            assert network.fine_stage.seen == [(1, 1, 12, 96, 80)]

    @pytest.mark.parametrize("mode", ["fast", "full"])
    def test_coarse_threshold_decides_what_is_a_region(self, mode):
        # Stage one is 0.73 sure of the lesion: at 0.8 nothing is found, and a network that resizes takes the head.
        network, image = oracle(resize=True, fine_size=(8, 32, 32)), head()
        nn.init.constant_(network.coarse_stage.gain, 0.5)
        for threshold, shape in ((0.7, (1, 1, 8, 32, 32)), (0.8, (1, 1, 12, 96, 80))):
            windows = find_windows(
                (CascadeInferer((8, 64, 64), mode=mode).coarse_probability(image, network)[0, 0] > threshold).numpy(),
                network,
            )
            assert (1, 1, *[s.stop - s.start for s in windows[0]]) == shape

    @pytest.mark.parametrize("mode", ["fast", "full"])
    def test_resizing_network_takes_the_region_only(self, mode):
        network, image = oracle(resize=True, fine_size=(8, 64, 64)), head()
        score = CascadeInferer((8, 64, 64), mode=mode)(image, network)
        assert network.fine_stage.seen == [(1, 1, 8, 64, 64)]
        found = (score > 0.5).float()
        # Enlarging and reducing again moves the border by half a voxel, not the lesion.
        assert 2 * (found * truth(image)).sum() / (found + truth(image)).sum() > 0.85

    def test_two_heads_at_once_are_two_heads(self):
        one, other = head(), head(lesions=((3, 70, 50),))
        both = CascadeInferer((8, 64, 64), mode="fast")(torch.cat([one, other]), oracle())
        for item, image in enumerate((one, other)):
            alone = CascadeInferer((8, 64, 64), mode="fast")(image, oracle())
            assert torch.equal(both[item : item + 1], alone)

    def test_mirroring_averages_every_combination(self):
        image = head()
        plain = CascadeInferer((8, 64, 64), mode="fast")(image, oracle())
        mirrored_network = oracle()
        mirrored = CascadeInferer((8, 64, 64), mode="fast", mirror_axes=[1, 2])(image, mirrored_network)
        # An oracle looks at single voxels and does not care for left and right.
        assert torch.allclose((mirrored > 0.5).float(), (plain > 0.5).float())
        assert len(mirrored_network.coarse_stage.seen) == 4

    def test_mirrored_scores_are_flipped_back(self):
        class RightHalf(nn.Module):
            def forward(self, x):
                ramp = torch.linspace(-4, 4, x.shape[-1]).expand_as(x)
                return torch.cat([-ramp, ramp], dim=1)

        network, image = oracle(), head()
        network.coarse_stage = network.fine_stage = RightHalf()
        score = CascadeInferer((12, 96, 80), mode="full", mirror_axes=[2])(image, network)
        assert torch.allclose(score, torch.full_like(score, 0.5), atol=1e-6)  # p(x) + p(-x) = 1

    def test_metadata_of_the_image_goes_on(self):
        image = MetaTensor(head(), meta={"filename_or_obj": "x"})
        score = CascadeInferer((8, 64, 64), mode="fast")(image, oracle())
        assert isinstance(score, MetaTensor)
        assert score.meta["filename_or_obj"] == "x"

    def test_stages_do_not_see_metadata(self):
        # Every operation on a MetaTensor copies its metadata: 100 layers of a network would each do so.
        network, kinds = oracle(), set()
        for stage in (network.coarse_stage, network.fine_stage):
            stage.register_forward_pre_hook(lambda module, inputs: kinds.add(type(inputs[0])))
        for mode in ("fast", "full"):
            CascadeInferer((8, 64, 64), mode=mode)(MetaTensor(head()), network)
        assert kinds == {torch.Tensor}

    def test_unknown_mode_is_refused(self):
        with pytest.raises(ConfigError, match="expected one of fast, full"):
            CascadeInferer(mode="quick")


class TestSkipAir:
    def test_air_never_reaches_the_stage_and_tissue_is_as_without(self):
        image = F.pad(head((8, 64, 64), lesions=((4, 30, 30),)), (0, 128, 0, 64))  # much air on two sides
        skipping, looking = oracle(), oracle()
        inferer = CascadeInferer((8, 32, 32), mode="full", overlap=0.25)
        score = inferer(image, skipping)
        everything = torch.softmax(inferer.window(image, looking.fine_stage), dim=1)[:, 1:]
        assert len(skipping.fine_stage.seen) < 0.5 * len(looking.fine_stage.seen)
        assert torch.equal(score > 0.5, everything > 0.5)
        tissue = (image > 0) & (image < 1)
        assert torch.allclose(score[tissue], everything[tissue], atol=1e-6)

    def test_windows_of_air_and_bone_are_certain_background(self):
        stage = oracle().fine_stage
        windows = torch.zeros(3, 1, 4, 16, 16)
        windows[1, ..., 4:] = 1.0
        windows[2, :, 2, 5, 5] = 0.78
        logits = skip_air(stage, windows)(windows)
        assert stage.seen == [(1, 1, 4, 16, 16)]
        assert (logits[:2, 0] == 10).all()
        assert (logits[:2, 1] == -10).all()
        assert logits[2, 1, 2, 5, 5] == 10

    def test_head_smaller_than_the_window_is_padded_with_air(self):
        # After normalisation air is about -1 and 0 is tissue: padding with 0 would put tissue around the head.
        image = head((6, 40, 48)) - 1.0
        network, seen = oracle(), []
        network.fine_stage.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        CascadeInferer((8, 96, 96), mode="full")(image, network)
        assert {tuple(window.shape) for window in seen} == {(1, 1, 8, 96, 96)}
        for window in seen:
            assert (window[..., 48:, :] == -1).all()
            assert (window[..., 48:] == -1).all()


class TestNetwork:
    def test_published_size_of_the_bottleneck(self):
        # Section 4.1: 16 x 320 x 320 becomes 4 x 5 x 5 by six halvings in plane and two through plane.
        stage, sizes = ResidualUNet([2] * 7).eval(), []
        stage.bottleneck.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
        with torch.no_grad():
            out = stage(torch.zeros(1, 1, 16, 320, 320))
        assert sizes == [(4, 5, 5)]
        assert out.shape == (1, 2, 16, 320, 320)

    @torch.no_grad()
    def test_every_decoder_level_is_supervised(self):
        levels = ResidualUNet([2] * 7).train()(torch.rand(2, 1, 4, 64, 64))
        # one a decoder level, at its own resolution: six in-plane halvings give six decoder levels
        assert [tuple(level.shape[3:]) for level in levels] == [(64 // 2**n, 64 // 2**n) for n in range(6)]
        flat = ResidualUNet(TINY, spatial_dims=2).train()(torch.rand(2, 1, 32, 32))
        assert [tuple(level.shape) for level in flat] == [(2, 2, 32 // 2**n, 32 // 2**n) for n in range(4)]

    @torch.no_grad()
    def test_untrained_network_holds_hemorrhage_for_rare_at_every_level(self):
        torch.manual_seed(0)
        for level in ResidualUNet(TINY, norm_name="instance").train()(torch.randn(1, 1, 8, 64, 64)):
            assert torch.softmax(level, dim=1)[:, 1].median() < 0.1

    def test_losses_get_float32_under_mixed_precision(self):
        with torch.autocast("cpu", torch.bfloat16):
            levels = ResidualUNet(TINY).train()(torch.rand(1, 1, 4, 32, 32))
        assert {level.dtype for level in levels} == {torch.float32}

    def test_stages_have_weights_of_their_own(self):
        network = CascadeUNet(TINY)
        coarse, fine = ({id(p) for p in s.parameters()} for s in (network.coarse_stage, network.fine_stage))
        assert coarse
        assert not coarse & fine

    def test_evaluation_looks_inside_the_coarse_region(self):
        network, image = oracle(), torch.cat([head((8, 64, 64), ((4, 30, 30),)), head((8, 64, 64), ())])
        logits = network(image)
        assert logits.shape == (2, 2, 8, 64, 64)
        assert torch.equal((logits[:, 1:] > 0).float(), truth(image))
        assert network.fine_stage.seen == [(1, 1, 8, 32, 32), (1, 1, 8, 64, 64)]  # nothing found: all of it

    def test_training_needs_a_label(self):
        with pytest.raises(ValueError, match="needs `label`"):
            CascadeUNet(TINY)(torch.zeros(1, 1, 4, 16, 16))

    @torch.no_grad()
    @pytest.mark.parametrize("coarse_scale", [1, 2])
    def test_training_windows_lie_around_label_voxels(self, coarse_scale):
        network = CascadeUNet(TINY, coarse_scale=coarse_scale, fine_size=(4, 16, 16), resize=False).train()
        blind(network.coarse_stage)
        image, label = torch.rand(2, 1, 8, 64, 64), torch.zeros(2, 1, 8, 64, 64)
        label[0, 0, 2, 50, 7] = label[1, 0, 7, 0, 63] = 1
        for _ in range(3):
            output = network(image, label)
            assert output.coarse[0].shape == (2, 2, 8, 64 // coarse_scale, 64 // coarse_scale)
            assert output.fine[0].shape == (2, 2, 4, 16, 16)
            for item, window in enumerate(output.windows):
                assert [s.stop - s.start for s in window] == [4, 16, 16]
                assert label[item, 0][window].sum() == 1

    @torch.no_grad()
    def test_training_windows_follow_what_stage_one_found(self):
        network = CascadeUNet(TINY, fine_size=(4, 16, 16), resize=False).train()
        blind(network.coarse_stage, level=-20.0)
        stage = network.coarse_stage.forward

        def sees_one_spot(image):
            logits, *lower = stage(image)
            logits = logits * 0
            logits[:, 1] -= 20
            logits[:, 1, 5, 40, 20] = 20
            return [logits, *lower]

        network.coarse_stage.forward = sees_one_spot
        for _ in range(3):  # a false alarm of stage one is what stage two must learn to reject
            for window in network(torch.rand(2, 1, 8, 64, 64), torch.zeros(2, 1, 8, 64, 64)).windows:
                assert all(s.start <= at < s.stop for s, at in zip(window, (5, 40, 20), strict=True))

    @torch.no_grad()
    def test_empty_patches_get_windows_somewhere(self):
        network = CascadeUNet(TINY, fine_size=(4, 16, 16), resize=False).train()
        blind(network.coarse_stage)
        torch.manual_seed(0)
        starts = {
            network(torch.zeros(2, 1, 8, 64, 64), torch.zeros(2, 1, 8, 64, 64)).windows[0][1].start for _ in range(4)
        }
        assert len(starts) > 1

    @torch.no_grad()
    def test_resizing_network_trains_on_the_enlarged_region(self):
        network = CascadeUNet(TINY, fine_size=(4, 32, 32), resize=True, margin=(1, 2, 2)).train()
        blind(network.coarse_stage)
        label = torch.zeros(2, 1, 8, 64, 64)
        label[0, 0, 3:5, 20:40, 24:30] = label[1, 0, 1, 5, 5] = 1
        output = network(torch.rand(2, 1, 8, 64, 64), label)
        assert output.fine[0].shape == (2, 2, 4, 32, 32)
        for item, window in enumerate(output.windows):
            assert label[item, 0][window].sum() == label[item].sum()


def blind(stage: nn.Module, level: float = -20.0) -> None:
    """Stage one that finds nothing, whatever its weights."""
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "output_block" in name:
                parameter.zero_()
                if parameter.ndim == 1:
                    parameter[1] = level


class TestLoss:
    def test_sum_over_stages_and_levels(self):
        torch.manual_seed(0)
        loss = DiceCELoss(to_onehot_y=True, softmax=True)
        label = (torch.rand(2, 1, 4, 32, 32) > 0.8).float()
        windows = [(slice(0, 4), slice(0, 16), slice(8, 24)), (slice(0, 4), slice(16, 32), slice(0, 16))]
        sizes = [1, 2, 4]
        output = CascadeOutput(
            [torch.randn(2, 2, 4, 32 // n, 32 // n) for n in sizes],
            [torch.randn(2, 2, 4, 16 // n, 16 // n) for n in sizes],
            windows,
        )
        crops = torch.cat([label[(slice(n, n + 1), slice(None), *w)] for n, w in enumerate(windows)])
        # nearest-exact by a power of two takes the sample right of each block's middle
        expected = sum(
            loss(output.coarse[level], label[..., n // 2 :: n, n // 2 :: n])
            + loss(output.fine[level], crops[..., n // 2 :: n, n // 2 :: n])
            for level, n in enumerate(sizes)
        )
        assert float(CascadeLoss(loss)(output, label)) == pytest.approx(float(expected), rel=1e-6)

    def test_label_is_brought_to_the_size_of_each_stage(self):
        # A label of whole 4 x 4 blocks is the same label at half resolution, so perfect logits have no loss there.
        label = torch.zeros(1, 1, 4, 32, 32)
        label[..., 8:16, 4:12] = 1
        half = label[..., ::2, ::2]
        logits = 40 * torch.cat([0.5 - half, half - 0.5], dim=1)
        window = (slice(0, 4), slice(4, 20), slice(0, 16))
        crop = label[(slice(None), slice(None), *window)]
        enlarged = F.interpolate(crop, size=(4, 32, 32), mode="nearest")
        fine = 40 * torch.cat([0.5 - enlarged, enlarged - 0.5], dim=1)
        loss = CascadeLoss(DiceCELoss(to_onehot_y=True, softmax=True))
        assert float(loss(CascadeOutput([logits], [fine], [window]), label)) < 1e-3
        assert float(loss(CascadeOutput([-logits], [fine], [window]), label)) > 1

    def test_gradient_reaches_every_weight(self):
        network = CascadeUNet(TINY, coarse_scale=2, fine_size=(4, 32, 32), resize=False).train()
        image, label = torch.rand(2, 1, 4, 64, 64), torch.zeros(2, 1, 4, 64, 64)
        label[:, :, 1:3, 20:40, 20:40] = 1
        CascadeLoss(DiceCELoss(to_onehot_y=True, softmax=True))(network(image, label), label).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
