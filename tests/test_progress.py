"""Phases on a terminal, in a pipe and unasked for: what people see of them."""

import io
import re
import sys

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.runs import progress
from lfrns_hub.runs.progress import Phase, about, clocked

ENDED = r"(.{40}) +\d+\.\d s(  .*)?"


class Terminal(io.StringIO):
    """A terminal of 80 columns."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def frames(self) -> list[str]:
        """What was drawn, line by line, without escape codes."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let stderr be a terminal; called in the test, as pytest sets its own before that."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return shown


def train(show: bool, epochs: int = 2) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    model = timm.create_model("cifar_resnet20", num_classes=3)
    loaders = {"loader": DataLoader(data, 4, shuffle=True), "eval_loader": DataLoader(data, 4)}
    with about("net.lfrns50"):
        lfrns.retrain(model, epochs=epochs, mixed_precision="no", progress=show, **loaders)


def test_in_a_pipe_each_phase_is_one_line_when_it_ends(capsys: pytest.CaptureFixture) -> None:
    with clocked(True) as clock:
        clock.step("trace")
        clock.step("gates", 3)
        clock.advance(3)
        assert len(capsys.readouterr().err.splitlines()) == 1  # trace has ended
    train(show=True)
    out, err = capsys.readouterr()
    gates, first, second, trained = err.splitlines()
    assert re.fullmatch(ENDED, gates)[1].strip() == "gates"
    assert re.fullmatch(r"epoch 1 of 2: top-1, % [\d.]+; 8 images", first) and second.startswith("epoch 2 of 2: ")
    name, note = re.fullmatch(ENDED, trained).groups()
    assert name.strip() == "train, net.lfrns50"
    assert re.fullmatch(r"  epoch 2, loss \d+\.\d{3}", note)
    assert out == ""
    assert clock.seconds.keys() == {"trace", "gates"}


def test_unasked_nothing_is_shown(capsys: pytest.CaptureFixture) -> None:
    with clocked(False) as clock:
        clock.step("trace")
    train(show=False)
    assert capsys.readouterr() == ("", "")
    assert clock.seconds.keys() == {"trace"}


def test_a_phase_that_fails_or_lies_in_another_leaves_no_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyError), clocked(True) as clock:
        clock.step("trace")
        raise KeyError
    with Phase("outer", 1), Phase("inner", 1) as inner:
        inner.advance()
        inner.say("said")
    said, outer = capsys.readouterr().err.splitlines()
    assert said == "said" and outer.startswith("outer ")
    assert not progress._SCREEN.running


def test_on_a_terminal_a_bar_fits_80_columns_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with about("a model with quite a long name.lfrns50_of_data"), Phase("train", 24) as phase:
        for step in range(24):
            phase.advance()
            phase.note(f"epoch 1, loss {step:.3f}")
        progress._SCREEN.bars.refresh()
        with Phase("evaluate", 4):
            progress._SCREEN.bars.refresh()
    drawn = terminal.frames()
    assert max(len(line) for line in drawn if "━" in line) <= 80
    assert any(
        re.fullmatch(r"train, a model with.*… ━{12} 24/24, (0:00 left, )?epoch 1, loss 23.000", d) for d in drawn
    )
    assert any(re.fullmatch(r"evaluate, a model.* ━{12} 0/4", line) for line in drawn)
    ended = [line for line in drawn if re.search(r"\d\.\d s  epoch 1, loss 23.000$", line)]
    assert len(ended) == 1
    assert progress._SCREEN.bars is None and not progress._SCREEN.running
    assert "\x1b[2K" in terminal.getvalue().rpartition("━")[2]  # the last bar is erased


def test_a_terminal_gets_what_is_printed_meanwhile_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with Phase("train", 2):
        print("Warning: a line", file=sys.stderr)
    drawn = terminal.frames()
    assert "Warning: a line" in drawn
    assert sys.stderr is terminal
