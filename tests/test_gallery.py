"""The cluster gallery: who stands under whom, what is flipped, and that the card shows it of this plan alone."""

import pytest
import timm
import torch
from matplotlib.image import imread
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_checkpoint import slim_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.checkpoint import save
from lfrns_hub.method.report import GroupReport, SlimReport, SlimResult
from lfrns_hub.plots import mark_of, shows_plan
from lfrns_hub.plots.clusters import (
    Cluster,
    choose_images,
    correlations,
    find_clusters,
    plot_clusters,
    read_maps,
    strips,
)
from lfrns_hub.units import SlimPlan


class Twins(nn.Module):
    """A convolution whose channels 4 to 7 repeat 0 to 3, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.first.weight[4:], self.first.bias[4:] = 2 * self.first.weight[:4], 2 * self.first.bias[:4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, SlimResult, torch.Tensor]:
    """A model with redundant channels, slimmed, and its images."""
    torch.manual_seed(0)
    dense, images = Twins().eval(), torch.randn(40, 3, 12, 12)
    loader = [(images[:20], None), (images[20:], None)]
    return dense, lfrns.slim(dense, loader, macs=0.6, groups=["first"], fcr_steps=0, progress=False), images


def removed(unit: int, stand_ins: list[int], r2: float) -> dict:
    """A row of the report."""
    return {"unit": unit, "stand_ins": stand_ins, "r2": r2}


def test_a_removed_unit_stands_under_its_strongest_stand_in_and_large_clusters_come_first() -> None:
    rows = [removed(1, [7, 0], 0.6), removed(2, [0, 7], 0.7), removed(3, [0], 0.9)]
    rows += [removed(unit, [5], 0.5 + unit / 100) for unit in range(10, 16)]
    assert find_clusters(rows) == [
        Cluster(5, [removed(15, [5], 0.65), removed(14, [5], 0.64), removed(13, [5], 0.63)], more=3),
        Cluster(0, [removed(3, [0], 0.9), removed(2, [0, 7], 0.7)], more=0),
        Cluster(7, [removed(1, [7, 0], 0.6)], more=0),
    ]


def test_a_map_that_runs_against_the_kept_one_is_flipped_and_its_r_keeps_the_sign() -> None:
    kept = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    maps = {0: kept, 1: 3 - 2 * kept, 2: kept + 5, 3: torch.ones(1, 2, 2)}
    cluster = Cluster(0, [removed(1, [0], 0.9), removed(2, [0], 0.8), removed(3, [0], 0.7)], 0)
    shown = strips(cluster, maps, weak=False, signed=True)
    assert [row[:2] for row in shown] == [
        ("unit 0", "kept"),
        ("unit 1", "R² 0.90, r \N{MINUS SIGN}1.00"),
        ("unit 2", "R² 0.80, r 1.00"),
        ("unit 3", "R² 0.70, r 0.00"),
    ]
    for (_, _, strip), expected in zip(shown, (kept, 2 * kept - 3, kept + 5, maps[3]), strict=True):
        assert torch.equal(strip, expected)
    norms = strips(cluster, maps, weak=True, signed=False)
    assert torch.equal(norms[1][2], maps[1])
    assert norms[1][0] == "unit 1, weak"


def test_correlations_are_those_by_hand() -> None:
    r = correlations(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 3.0, 2.0], [-1.0, -2.0, -3.0]]))
    assert r.tolist() == pytest.approx([0.5, -1.0])


def test_maps_are_read_off_convolutions_grids_and_tokens_and_nothing_else() -> None:
    images, linear, index = torch.zeros(2, 3, 12, 12), nn.Linear(4, 1), torch.tensor([[1], [3]])
    grid = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    square = grid.view(2, 3, 3, 4)
    expected = square[..., [1, 3]].movedim(-1, 1)
    assert torch.equal(read_maps(linear, torch.cat([torch.zeros(2, 1, 4), grid], 1), index, images), expected)
    assert torch.equal(read_maps(linear, square, index, images), expected)
    assert torch.equal(read_maps(nn.Conv2d(4, 1, 1), square.movedim(-1, 1), index, images), expected)
    heads = read_maps(linear, grid, torch.tensor([[0, 1], [2, 3]]), images)
    assert torch.allclose(heads[:, 1], square[..., 2:].square().sum(-1).sqrt())
    assert read_maps(linear, grid[:, 0], index, images) is None  # pooled
    assert read_maps(linear, grid[:, :4], index, images) is None  # too coarse
    assert read_maps(linear, grid.repeat(2, 1, 1), index, images) is None  # windows, not images


def test_planted_twins_stand_under_each_other_in_a_picture_of_a_cards_width(twins, tmp_path) -> None:
    dense, result, images = twins
    before = [parameter.clone() for parameter in dense.parameters()]
    (row,) = [row for row in result.report.groups if row.redundant]
    pairs = {(cluster.kept % 4, one["unit"] % 4) for cluster in find_clusters(row.redundant) for one in cluster.removed}
    assert pairs and all(kept == gone for kept, gone in pairs)
    path = plot_clusters(dense, result, images, tmp_path / "clusters.png")
    height, width, _ = imread(path).shape
    assert 900 <= width <= 1800 and 400 <= height <= 2400
    assert shows_plan(path, result.plan.keep) and not shows_plan(path, {"first": [0]})
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_a_vision_transformer_is_shown_over_its_patches(tmp_path) -> None:
    dense = timm.create_model("test_vit", num_classes=10, img_size=64).eval()
    images = torch.randn(16, 3, 64, 64)
    result = lfrns.slim(dense, [(images, None)], macs=0.7, kinds=["neuron"], fcr_steps=0, progress=False)
    assert plot_clusters(dense, result, images[:3], tmp_path / "clusters.png").stat().st_size > 10_000


def test_weak_units_are_called_weak(twins, tmp_path, monkeypatch) -> None:
    dense, result, images = twins
    written = []
    monkeypatch.setattr("matplotlib.figure.Figure.text", lambda figure, x, y, text, **style: written.append(text))
    weak = GroupReport("first", "channel", 8, 7, [], [removed(3, [7], 0.2)], 0, 0.9)
    plot_clusters(dense, SlimResult(result.model, result.plan, SlimReport([weak])), images, tmp_path / "clusters.png")
    assert "unit 3, weak" in written
    assert "0 redundant, 1 weak" in " ".join(written)


def test_a_picture_shows_one_image_of_each_class_though_the_loader_is_sorted() -> None:
    labels = torch.arange(10).repeat_interleave(20)
    images = torch.arange(200.0).reshape(-1, 1, 1, 1)
    loader = DataLoader(TensorDataset(images, labels), 50)
    assert choose_images(loader).flatten().tolist() == [0, 20, 40, 60, 80, 100]
    two = DataLoader(TensorDataset(images[:40], labels[:40]), 8)
    assert choose_images(two).flatten().tolist() == [0, 20, 1, 21, 2, 22]
    assert choose_images([images[:50]]).flatten().tolist() == list(range(6))
    unreadable = TensorDataset(images, torch.where(labels == 0, -100, labels))
    assert choose_images(DataLoader(unreadable, 50)).flatten().tolist() == [20, 40, 60, 80, 100, 120]


def test_what_cannot_be_shown_says_so(twins, tmp_path) -> None:
    dense, result, images = twins
    path = tmp_path / "clusters.png"
    whole = SlimResult(dense, SlimPlan(), SlimReport([GroupReport("first", "channel", 8, 8, [], [], 0, 1.0)]))
    with pytest.raises(ValueError, match=r"group=None\): no unit was removed.*macs=0\.5"):
        plot_clusters(dense, whole, images, path)
    with pytest.raises(ValueError, match=r"group='third'\): slim cut no group of that name\. Name one of first"):
        plot_clusters(dense, result, images, path, group="third")
    pooled = GroupReport("second", "channel", 8, 7, [removed(3, [7], 0.8)], [], 0, 0.9)
    with pytest.raises(ValueError, match=r"group='second'\): the units of second are not read on a grid"):
        plot_clusters(dense, SlimResult(dense, SlimPlan(), SlimReport([pooled])), images, path, group="second")
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
