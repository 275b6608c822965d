"""The cluster gallery: which pairs come first, what is flipped, what is estimated, and that the card shows its own."""

import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_checkpoint import slim_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.checkpoint import save
from lfrns_hub.method.report import SlimResult
from lfrns_hub.method.responses import collect, held_out
from lfrns_hub.plots import mark_of, shows_plan
from lfrns_hub.plots.clusters import HEADINGS, IMAGES_PER_PAIR, choose_images, plot_clusters, read_grid
from lfrns_hub.plots.pairs import Estimate
from lfrns_hub.units import SlimPlan, Tap, UnitGroup


class Twins(nn.Module):
    """A convolution whose channels 4 to 7 repeat 0 to 3, scaled."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.first.weight[4:], self.first.bias[4:] = 2 * self.first.weight[:4], 2 * self.first.bias[:4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.act(self.first(x))).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, SlimResult, torch.Tensor]:
    """A model with redundant channels, slimmed, and its images."""
    torch.manual_seed(0)
    dense, images = Twins(nn.ReLU()).eval(), torch.randn(40, 3, 12, 12)
    loader = [(images[:20], None), (images[20:], None)]
    return dense, lfrns.slim(dense, loader, macs=0.6, groups=["first"], fcr_steps=0, progress=False), images


def texts(figure: Figure) -> list[str]:
    """The texts of a figure outside its axes."""
    return [text.get_text() for text in figure.texts]


def at_tap(values: torch.Tensor, index: list[list[int]], keep: list[int]) -> tuple[UnitGroup, SlimPlan, Any, Estimate]:
    """A group read by a linear layer, the moments of its input [N, T, D], and the fold."""
    group = UnitGroup("units", "head", len(index), taps=(Tap("1", torch.tensor(index)),))
    plan, dense = SlimPlan({"units": keep}), nn.Sequential(nn.Identity(), nn.Linear(values.shape[-1], 3))
    moments = collect(dense, ["1"], list(values.split(40)), macs=1e9, seed=0, weigh=False)["1"]
    gone = [group.taps[0].index[plan.removed(group)]]
    return group, plan, moments, Estimate.of(dense, group, gone, moments)


def test_a_pair_has_the_nearest_kept_unit_and_the_estimate_of_all_and_the_largest_r_comes_first() -> None:
    a, b, noise = torch.randn(3, 400, 9)
    values = torch.stack([a, b, a + 2 * b + 3, -a + 0.3 * noise, torch.ones_like(a), noise], -1)
    group, plan, moments, estimate = at_tap(values, [[0], [1], [2], [3], [4], [5]], [0, 1])
    first, second, third = estimate.find_pairs(group, plan, moments)  # unit 4 never varies
    assert [(one.removed, one.kept) for one in (first, second)] == [(3, 0), (2, 1)] and third.removed == 5
    assert first.r == pytest.approx(-1 / 1.09**0.5, abs=0.02) and first.r2 == pytest.approx(1 / 1.09, abs=0.02)
    assert second.r == pytest.approx(2 / 5**0.5, abs=0.02) and second.r2 == pytest.approx(1, abs=1e-3)
    assert abs(third.r) < 0.05 and abs(third.r2) < 0.05
    assert torch.equal(estimate.unit(values, 2), values[..., 2])
    assert torch.allclose(estimate.estimated(values, 2), values[..., 2], atol=0.1)  # up to the ridge


def test_r_and_r2_are_those_of_the_values_themselves_on_held_out_images() -> None:
    values = torch.randn(400, 9, 5) @ torch.randn(5, 5) + 1
    group, plan, moments, estimate = at_tap(values, [[0], [1], [2], [3], [4]], [1, 3])
    held = torch.cat(held_out(values.split(40)))
    for pair in estimate.find_pairs(group, plan, moments):
        removed, kept = held[..., pair.removed].flatten(), held[..., pair.kept].flatten()
        assert pair.r == pytest.approx(float(torch.corrcoef(torch.stack([removed, kept]))[0, 1]), abs=1e-3)
        lost = (removed - estimate.estimated(held, pair.removed).flatten()).var()
        assert pair.r2 == pytest.approx(1 - float(lost / removed.var()), abs=1e-3)


def test_a_head_is_shown_along_its_first_principal_component() -> None:
    a, b, noise = torch.randn(3, 400, 9)
    values = torch.stack([3 * a, 0.1 * b, 0.1 * noise, 4 * a + 0.1 * noise], -1)
    group, plan, moments, estimate = at_tap(values, [[0, 1], [2, 3]], [0])
    (pair,) = estimate.find_pairs(group, plan, moments)
    assert (pair.removed, pair.kept) == (1, 0) and pair.r > 0.99 and pair.r2 > 0.99
    assert estimate.directions[1].abs().tolist() == pytest.approx([0, 1], abs=0.01)
    assert torch.allclose(estimate.unit(values, 1), values[..., 3], atol=0.1)


def test_a_fold_without_use_estimates_zero() -> None:
    values = torch.stack([torch.zeros(400, 9), torch.randn(400, 9)], -1)
    group, plan, moments, estimate = at_tap(values, [[0], [1]], [0])
    (pair,) = estimate.find_pairs(group, plan, moments)
    assert pair.r == 0 and pair.r2 == pytest.approx(0, abs=0.01)
    assert estimate.estimated(values, 1).abs().max() < 0.1


def test_maps_are_read_off_convolutions_grids_and_tokens_and_nothing_else() -> None:
    images, linear = torch.zeros(2, 3, 12, 12), nn.Linear(4, 1)
    grid = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    square = grid.view(2, 3, 3, 4)
    assert torch.equal(read_grid(linear, torch.cat([torch.zeros(2, 1, 4), grid], 1), images), square)
    assert torch.equal(read_grid(linear, square, images), square)
    assert torch.equal(read_grid(nn.Conv2d(4, 1, 1), square.movedim(-1, 1), images), square)
    assert read_grid(linear, grid[:, 0], images) is None  # pooled
    assert read_grid(linear, grid[:, :4], images) is None  # too coarse
    assert read_grid(linear, grid.repeat(2, 1, 1), images) is None  # windows, not images


def test_planted_twins_stand_beside_each_other_and_their_estimate(twins, tmp_path, figures) -> None:
    dense, result, images = twins
    before = [parameter.clone() for parameter in dense.parameters()]
    loader = [(images[:20], None), (images[20:], None)]
    path = plot_clusters(dense, result.plan, loader, tmp_path / "clusters.png")
    height, width, _ = imread(path).shape
    assert 900 <= width <= 1800 and 400 <= height <= 2400
    assert shows_plan(path, result.plan.keep) and not shows_plan(path, {"first": [0]})
    said = texts(figures[0])
    assert f"Twins, first: {len(result.plan.keep['first'])} of 8 channels kept" in said
    assert [text for text in said if text in HEADINGS] == 2 * list(HEADINGS)
    kept = [(int(number), float(r)) for number, r in re.findall(r"unit (\d+), r ([\d.]+)", " ".join(said))]
    removed = [int(text[5:]) for text in said if re.fullmatch(r"unit \d+", text)]
    assert len(removed) == 8 - len(result.plan.keep["first"])
    r = [value for _, value in kept]
    assert r == sorted(r, reverse=True) and r[0] == 1
    twin_pairs = [(one, other) for (one, value), other in zip(kept, removed, strict=True) if value == 1]
    assert twin_pairs and all(one % 4 == other % 4 for one, other in twin_pairs)
    assert len([text for text in said if text == "R² 1.00"]) >= len(twin_pairs)
    assert "8 images held out" in " ".join(said)
    tiles = [axes.images[0].get_array() for axes in figures[0].axes]
    assert len(tiles) == 4 * IMAGES_PER_PAIR * len(removed)
    image, kept_map, removed_map, estimate = tiles[:4]
    assert image.shape == (12, 12, 3)
    assert np.corrcoef(kept_map.ravel(), removed_map.ravel())[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.abs(estimate - removed_map).max() < 0.01 * removed_map.max()
    assert figures[0].axes[2].images[0].get_clim() == figures[0].axes[3].images[0].get_clim()
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in dense.modules())
    again = plot_clusters(dense, result.plan, [(images.flip(0)[:20], None), (images.flip(0)[20:], None)],
                          tmp_path / "again.png")  # fmt: skip
    assert again.read_bytes() == path.read_bytes()


def test_a_kept_map_that_runs_against_the_removed_one_is_flipped(twins, tmp_path, figures) -> None:
    _, _, images = twins
    dense = Twins(nn.Identity()).eval()
    with torch.no_grad():
        dense.first.weight[0], dense.first.bias[0] = -dense.first.weight[1], -dense.first.bias[1]
    plan = SlimPlan({"first": [1, 2, 3, 4, 5, 6, 7]})
    plot_clusters(dense, plan, [(images, None)], tmp_path / "clusters.png")
    assert any(re.fullmatch("unit [15], r \N{MINUS SIGN}1.00", text) for text in texts(figures[0]))
    _, kept, removed, _ = (axes.images[0].get_array() for axes in figures[0].axes[:4])
    assert np.corrcoef(kept.ravel(), removed.ravel())[0, 1] == pytest.approx(1, abs=1e-4)
    assert "flipped where r is negative" in " ".join(texts(figures[0]))


@pytest.mark.parametrize("kind", ["neuron", "head"])
def test_a_vision_transformer_is_shown_over_its_patches(kind: str, tmp_path, figures) -> None:
    dense = timm.create_model("test_vit", num_classes=10, img_size=64).eval()
    images = torch.randn(40, 3, 64, 64)
    result = lfrns.slim(dense, [(images, None)], macs=0.9, kinds=[kind], fcr_steps=0, progress=False)
    plot_clusters(dense, result.plan, [(images, None)], tmp_path / "clusters.png")
    said = " ".join(texts(figures[0]))
    assert f"{kind}s kept" in said and "share of its variance" in said
    assert ("first principal component" in said) == (kind == "head")
    assert all(axes.images[0].get_array().shape[:2] == (4, 4) for axes in figures[0].axes[1::4])


def test_a_picture_shows_one_image_of_each_class_though_the_loader_is_sorted() -> None:
    labels = torch.arange(30).repeat_interleave(20)
    images = torch.arange(600.0).reshape(-1, 1, 1, 1)
    loader = DataLoader(TensorDataset(images, labels), 50)
    assert choose_images(loader).flatten().tolist() == list(range(0, 480, 20))
    two = DataLoader(TensorDataset(images[:40], labels[:40]), 8)
    assert choose_images(two).flatten().tolist()[:6] == [0, 20, 1, 21, 2, 22]
    assert choose_images([images[:50]]).flatten().tolist() == list(range(24))
    unreadable = TensorDataset(images, torch.where(labels == 0, -100, labels))
    assert choose_images(DataLoader(unreadable, 50)).flatten().tolist() == list(range(20, 500, 20))


def test_what_cannot_be_shown_says_so(twins, tmp_path) -> None:
    dense, result, images = twins
    path, loader = tmp_path / "clusters.png", [(images, None)]
    with pytest.raises(ValueError, match=r"group=None\): no unit was removed.*macs=0\.5"):
        plot_clusters(dense, SlimPlan({"first": list(range(8))}), loader, path)
    with pytest.raises(ValueError, match=r"group='third'\): slim cut no group of that name\. Name one of first"):
        plot_clusters(dense, result.plan, loader, path, group="third")
    pooled = SlimPlan({"second": [0, 1, 2, 4, 5, 6, 7]})
    with pytest.raises(ValueError, match=r"group='second'\): the units of second do not vary, or are not read on a g"):
        plot_clusters(dense, pooled, loader, path, group="second")
    with pytest.raises(ValueError, match=r"plot_clusters\(loader\): the loader is empty"):
        plot_clusters(dense, result.plan, [], path)
    assert not path.exists()


def test_the_card_shows_the_gallery_of_its_own_plan_and_saving_again_keeps_it(tmp_path) -> None:
    model, mark = slim_resnet(), PngInfo()
    model.lfrns_provenance["plan"] = {"layer1.0.conv1": [0, 2, 5]}
    mark.add_text("Comment", mark_of(model.lfrns_provenance["plan"]))
    Image.new("RGB", (8, 8)).save(tmp_path / "clusters.png", pnginfo=mark)
    for _ in range(2):
        save(model, tmp_path, overwrite=True)
        assert (tmp_path / "clusters.png").is_file()
        assert "(clusters.png)" in (tmp_path / "README.md").read_text()
    model.lfrns_provenance["plan"] = {"layer1.0.conv1": [0, 2, 4]}
    save(model, tmp_path, overwrite=True)
    assert not (tmp_path / "clusters.png").exists()
    assert "clusters.png" not in (tmp_path / "README.md").read_text()
