"""Steps recorded as one graph learn what plain steps learn. Without a GPU a stand-in replays the step's own code."""

import contextlib
import copy
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.retrain import cuda_graph, train
from lfrns_hub.retrain.late_losses import LATE, Losses

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Net(nn.Module):
    """A small network that may draw on the CPU, or wait for the device."""

    def __init__(self, *, draws: bool = False, waits: bool = False):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)
        self.draws, self.waits = draws, waits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu()
        if self.draws and self.training and torch.rand(()) < 0.5:
            x = x * 0.5
        if self.waits and x.sum().item() > 1e9:
            x = -x
        return self.head(x.mean((2, 3)))


def make_loader(count: int = 68, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 4)
    return DataLoader(data, batch_size=batch_size, shuffle=True)


def make_net(**options: bool) -> Net:
    torch.manual_seed(0)
    return Net(**options)


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """Counts replays of what stands for a graph on the CPU."""
    replays: list[int] = []

    def record(compute):
        loss = torch.zeros(())

        def replay():
            replays.append(1)
            loss.copy_(compute())

        return replay, loss

    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_graph, "record", record)
        monkeypatch.setattr(train, "refuse_capture", lambda accelerator: None)
        monkeypatch.setattr(cuda_graph, "_on_device", lambda *_: contextlib.nullcontext())
    return replays


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_recorded_steps_learn_what_plain_steps_learn(graphs, optimizer):
    models, told = [], []
    for compile in (False, "auto"):
        AcceleratorState._reset_state(True)
        model, seen = make_net(), []
        lfrns.retrain(
            model, make_loader(), epochs=3, teacher=copy.deepcopy(model).eval(), compile=compile, progress=False,
            optimizer=optimizer, mixed_precision="no", tracker=lambda *one, seen=seen: seen.append(one[::-1]),
        )  # fmt: skip
        models.append(model)
        told.append(seen)
    for (name, plain), recorded in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-3, atol=1e-5, msg=name)
    assert [step for step, _ in told[1]] == list(range(1, 28)) == [step for step, _ in told[0]]
    for (_, plain), (_, recorded) in zip(*told, strict=True):
        assert recorded["learning_rate"] == plain["learning_rate"]
        assert recorded["loss"] == pytest.approx(plain["loss"], rel=1e-3, abs=1e-5)
    if not torch.cuda.is_available():
        assert len(graphs) == 3 * 8 - 1 - cuda_graph.PLAIN_STEPS  # the last batch of an epoch has another shape


def test_a_forward_that_draws_on_the_cpu_is_never_recorded(graphs):
    lfrns.retrain(make_net(draws=True), make_loader(), epochs=2, progress=False, mixed_precision="no")
    assert not graphs


def test_a_forward_that_waits_for_the_gpu_is_heard_and_other_warnings_pass(monkeypatch):
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def compute() -> torch.Tensor:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("the user's own", UserWarning, stacklevel=1)
        return torch.ones(())

    with pytest.warns(UserWarning) as heard:
        loss, waited = cuda_graph._watched(compute)
    assert waited and float(loss) == 1 and modes == ["warn", 0]
    assert [str(one.message) for one in heard] == ["the user's own"]
    assert cuda_graph._watched(lambda: torch.ones(()))[1] is False


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.gpu
@needs_gpu
def test_a_forward_that_waits_for_the_gpu_is_trained_by_plain_steps(dropout):
    models = [nn.Sequential(nn.Dropout(dropout), make_net(waits=True)) for _ in range(2)]
    for model, compile in zip(models, (False, "auto"), strict=True):
        lfrns.retrain(model, make_loader(), epochs=2, compile=compile, progress=False, mixed_precision="no")
    torch.testing.assert_close(*(model[1].head.weight for model in models), rtol=1e-3, atol=1e-5)


def test_a_value_of_compile_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"retrain\(compile='max'\): it must be \"auto\" or False"):
        lfrns.retrain(make_net(), make_loader(), compile="max", progress=False)


def test_a_loss_that_is_not_finite_ends_the_run_wherever_it_is_read():
    model = make_net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 1 of"):
        lfrns.retrain(model, make_loader(), epochs=1, progress=False)


def test_losses_come_in_order_and_all_of_them():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses, found = Losses(device), []
    for step in range(3 * LATE):
        losses.note(torch.tensor(float(step), device=device), step, 0.1)
        found += losses.read()
    found += losses.read(wait=True)
    assert [(one.step, one.value) for one in found] == [(step, float(step)) for step in range(3 * LATE)]
    assert losses.read(wait=True) == []
