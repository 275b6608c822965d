"""The whole call on real images, where they lie beside the checkout."""

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub.measure import evaluate
from lfrns_hub.zoo import create_dense, load_data, make_transform


@pytest.mark.slow
def test_half_a_resnet20_keeps_most_of_its_accuracy_without_training(shared: Path) -> None:
    dense = create_dense("cifar_resnet20", weights=str(shared / "weights" / "resnet20_cifar10.safetensors"))
    transform = make_transform(dense, train=False)
    data = str(shared / "data" / "cifar10")
    calibration = DataLoader(load_data(data, "train", transform=transform, limit=2000), 250)
    test = DataLoader(load_data(data, "validation", transform=transform, limit=1000), 250)
    result = lfrns.slim(dense, calibration, macs=0.5, fcr_steps=10, progress=False)
    score = evaluate(result.model, test, teacher=dense, progress=False)
    assert 0.49 < result.report.macs_fraction <= 0.5
    assert score["top1_pct"] >= 68
    assert 0 < result.report.restored
    assert all(0 <= group.integrity <= 1 for group in result.report.groups)
