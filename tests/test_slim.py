"""One analysis serves every budget; the whole call on real images, where they lie beside the checkout."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub.measure import evaluate
from lfrns_hub.zoo import create_dense, load_data, make_transform


class Small(nn.Module):
    """Two convolutions with a BatchNorm between them, so that folding and recalibration have something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, list]:
    """A network and its calibration batches."""
    torch.manual_seed(0)
    return Small().eval(), [(torch.randn(8, 3, 10, 10), torch.randint(4, (8,))) for _ in range(5)]


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_one_analysis_gives_at_each_budget_what_slim_gives(small: tuple[nn.Module, list], preset: str) -> None:
    dense, batches = small
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    analysis = lfrns.analyse(dense, batches, preset=preset, progress=False)
    for macs in (0.8, 0.5, 0.8):
        several = analysis.cut(macs=macs, fcr_steps=3)
        single = lfrns.slim(dense, batches, macs=macs, preset=preset, fcr_steps=3, progress=False)
        assert several.plan == single.plan
        assert several.report.groups == single.report.groups
        assert several.report.macs_fraction == single.report.macs_fraction <= macs
        assert several.model.lfrns_provenance == single.model.lfrns_provenance
        for (name, one), other in zip(
            several.model.state_dict().items(), single.model.state_dict().values(), strict=True
        ):
            assert torch.equal(one, other), name
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_the_smallest_budget_can_be_met_and_anything_below_cannot(small: tuple[nn.Module, list]) -> None:
    analysis = lfrns.analyse(*small, progress=False)
    least = analysis.smallest()
    assert analysis.cut(macs=least["macs"] + 1e-9, fcr_steps=0).report.macs_fraction == pytest.approx(least["macs"])
    with pytest.raises(ValueError, match=r"macs=0\.0001 is not reachable"):
        analysis.cut(macs=0.0001, fcr_steps=0)
    with pytest.raises(ValueError, match="macs=50"):
        analysis.cut(macs=50)


def test_errors_name_the_call_that_was_made(small: tuple[nn.Module, list], tmp_path: Path) -> None:
    dense, batches = small
    (tmp_path / "file").write_text("mine")
    wrong = {
        r"\(preset='mine'\): presets": {"preset": "mine"},
        r"\(groups=first\): a list": {"groups": "first"},
        r"\(groups, exclude\): the pattern 'x' matches": {"exclude": ["x"]},
        r"\(loader\): the loader is empty": {"loader": []},
        r"\(int\): a torch\.nn\.Module": {"model": 5},
        r"\(Small\): .* is on the meta device": {"model": copy.deepcopy(dense).to("meta")},
        r"\(checkpoint_dir='.*file'\): the folder cannot": {"checkpoint_dir": tmp_path / "file"},
    }
    for call, budget in (("slim", {"macs": 0.5}), ("analyse", {})):
        for message, given in wrong.items():
            options = {"model": dense, "loader": batches, "progress": False, **budget, **given}
            with pytest.raises((ValueError, TypeError, OSError), match=f"^{call}{message}"):
                getattr(lfrns, call)(options.pop("model"), options.pop("loader"), **options)
    analysis = lfrns.analyse(dense, batches, progress=False)
    for message, given in {
        r"\(macs=50\): the fraction": {"macs": 50},
        r"\(\) needs a budget": {},
        r"\(fcr_steps=-1\): a whole": {"macs": 0.5, "fcr_steps": -1},
    }.items():
        for call, cut in (("slim", partial(lfrns.slim, dense, batches)), (r"Analysis\.cut", analysis.cut)):
            with pytest.raises(ValueError, match=f"^{call}{message}"):
                cut(**given)


@pytest.mark.slow
def test_half_a_resnet20_keeps_most_of_its_accuracy_without_training(shared: Path) -> None:
    dense = create_dense("cifar_resnet20", weights=str(shared / "weights" / "resnet20_cifar10.safetensors"))
    transform = make_transform(dense, train=False)
    data = str(shared / "data" / "cifar10")
    calibration = DataLoader(load_data(data, "train", transform=transform, limit=600), 200)
    test = DataLoader(load_data(data, "validation", transform=transform, limit=400), 200)
    result = lfrns.slim(dense, calibration, macs=0.5, fcr_steps=10, progress=False)
    score = evaluate(result.model, test, teacher=dense, progress=False)
    assert 0.49 < result.report.macs_fraction <= 0.5
    assert score["top1_pct"] >= 68
    assert 0 < result.report.restored
    assert all(0 <= group.integrity <= 1 for group in result.report.groups)
