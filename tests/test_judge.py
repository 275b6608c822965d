"""Which model is nearest to the dense one, by the images that nothing was fitted to."""

import pytest
import torch
from torch import nn

from lfrns_hub.method.recalibrate import Judge


class Counted(nn.Module):
    """A linear classifier that counts its calls."""

    def __init__(self, noise: float):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls, self.num_classes = nn.Linear(12, 4), 0, 4
        self.layer.weight.data += noise * torch.randn(4, 12)

    def forward(self, images):
        self.calls += 1
        return self.layer(images.flatten(1))


def test_the_nearest_is_chosen_and_nobody_is_asked_twice():
    batches = [torch.randn(3, 3, 2, 2) for _ in range(10)]
    dense, near, far, broken = Counted(0), Counted(0.1), Counted(1.0), Counted(float("nan"))
    judge = Judge(dense, batches)
    assert judge.nearest([broken, far, near]) is near
    assert judge.nearest([near, far]) is near
    assert [model.calls for model in (dense, near, far, broken)] == [2, 2, 2, 2], "two batches of ten are held out"


def test_a_model_equal_to_the_dense_one_does_not_diverge():
    judge = Judge(Counted(0), [torch.randn(3, 3, 2, 2)])
    assert judge.divergence(Counted(0)) == pytest.approx(0, abs=1e-6)
