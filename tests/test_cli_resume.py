"""`lfrns slim` and `lfrns retrain`, stopped at any moment and gone on with: equal weights, the old checkpoint whole."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from children import end, start
from PIL import Image

import lfrns_cli
import lfrns_hub as lfrns

KILLS = int(os.environ.get("LFRNS_KILLS", "1"))  # of each command and signal; above 1 of all four pairs
STOPS = [("slim", signal.SIGKILL), ("retrain", signal.SIGINT), ("slim", signal.SIGINT), ("retrain", signal.SIGKILL)]
SLIM = "slim cifar_resnet20 --weights dense.pth --data images --val-split 0.25 --macs 0.6 --epochs 4 --fcr-steps 4"
RETRAIN = "retrain slim --data images --val-split 0.25 --epochs 4"
COMMON = "--batch-size 16 --quiet --mixed-precision no"


def run_lfrns(folder: Path, words: str, log: Path) -> None:
    """Be `lfrns` in a folder, with a dense model that may know nothing."""
    os.chdir(folder)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    import lfrns_hub.cli.data

    lfrns_hub.cli.data.guard_against_chance = lambda *_, **__: None
    sys.argv = ["lfrns", *words.split()]
    lfrns_cli.main()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with images of three classes and a dense model of them."""
    draw = np.random.default_rng(0)
    for i in range(96):
        path = tmp_path / "images" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((draw.random((32, 32, 3)) * (60 + 60 * (i % 3))).astype("uint8")).save(path)
    torch.manual_seed(0)
    dense = timm.create_model("cifar_resnet20", num_classes=3)
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stop"), STOPS if KILLS > 1 else STOPS[:2])
def test_stopped_at_any_moment_it_goes_on_to_equal_weights(command: str, stop: signal.Signals, place: Path) -> None:
    log, began = place / "log", time.monotonic()
    assert end(start(run_lfrns, place, f"{SLIM} {COMMON} --out slim", log)) == [0], log.read_text()
    if command == "slim":
        again, out = f"{SLIM} {COMMON} --out out", place / "out"
        expected = (place / "slim" / "model.safetensors").read_bytes()
        old: bytes | None = None
    else:
        again, out = f"{RETRAIN} {COMMON}", place / "slim"
        old = (out / "model.safetensors").read_bytes()
        shutil.copytree(out, place / "kept")
        began = time.monotonic()
        assert end(start(run_lfrns, place, again, log)) == [0], log.read_text()
        expected = (out / "model.safetensors").read_bytes()
        assert expected != old
    lasted = time.monotonic() - began
    draw = random.Random(stop)
    for _ in range(KILLS):
        shutil.rmtree(out, ignore_errors=True)
        if old is not None:
            shutil.copytree(place / "kept", out)
        (child,) = start(run_lfrns, place, again, log)
        child.join(draw.uniform(0.1, 0.9) * lasted)
        os.kill(child.pid, stop) if child.is_alive() else None
        end([child])
        if old is not None:
            assert (out / "model.safetensors").read_bytes() in (old, expected)
            lfrns.load(out)
        assert end(start(run_lfrns, place, f"{again} --resume", log)) == [0], log.read_text()
        assert (out / "model.safetensors").read_bytes() == expected
        lfrns.load(out)
    assert not list(out.rglob("run.json"))


def test_a_run_that_ended_is_shown_again_and_one_of_other_options_is_refused(place: Path) -> None:
    log, first = place / "log", f"{SLIM} {COMMON} --out out --license mit".replace("--epochs 4", "--epochs 0")
    assert end(start(run_lfrns, place, first, log)) == [0], log.read_text()
    before = (place / "out" / "model.safetensors").stat().st_mtime_ns
    assert sorted(path.name for path in (place / "out" / "work").iterdir()) == ["finished"]
    card = (place / "out" / "README.md").read_text()
    assert "license: mit" in card and "lfrns slim cifar_resnet20 --weights dense.pth --data images" in card
    assert end(start(run_lfrns, place, f"{first} --resume", log)) == [0], log.read_text()
    assert "lfrns push out user/name" in log.read_text()
    assert (place / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert end(start(run_lfrns, place, f"{first} --resume --seed 3", log)) == [1]
    assert "has ended, and had other options" in log.read_text()
    (place / "out" / "config.json").unlink()
    assert end(start(run_lfrns, place, f"{first} --resume", log)) == [1]
    assert "out holds no whole checkpoint any more. Pass --overwrite" in log.read_text()


def test_what_resume_does_not_know_is_not_replaced(place: Path) -> None:
    log, words = place / "log", f"{SLIM} {COMMON} --out out --resume"
    lfrns.save(timm.create_model("cifar_resnet20", num_classes=3), place / "out")
    (place / "out" / "work").mkdir()
    (place / "out" / "work" / "thesis.md").write_text("mine")
    before = (place / "out" / "model.safetensors").read_bytes()
    assert end(start(run_lfrns, place, words, log)) == [1]
    assert "--out out: is not empty. Pass --resume to go on with an interrupted run, --overwrite" in log.read_text()
    # An option that does not fit leaves what --overwrite would have replaced, an interrupted run too.
    (place / "out" / "work" / "retrain").mkdir()
    (place / "out" / "work" / "run.json").write_text('{"options": {}, "noted": {}}')
    refused = f"{words} --overwrite --exclude nothing*".replace(" --resume", "")
    assert end(start(run_lfrns, place, refused, log)) == [1]
    assert "nothing*" in log.read_text()
    assert sorted(path.name for path in (place / "out" / "work").iterdir()) == ["retrain", "run.json", "thesis.md"]
    assert end(start(run_lfrns, place, f"{RETRAIN} {COMMON}".replace("slim", "out"), log)) == [1]
    assert "a run of lfrns slim was interrupted" in log.read_text()
    assert end(start(run_lfrns, place, f"{words} --overwrite --epochs 0", log)) == [1]
    assert "Repeat the options of then, or start again: Pass --overwrite" in log.read_text()
    assert (place / "out" / "model.safetensors").read_bytes() == before
    short = words.replace(" --resume", " --overwrite").replace("--epochs 4", "--epochs 0")
    assert end(start(run_lfrns, place, short, log)) == [0], log.read_text()
    assert sorted(path.name for path in (place / "out" / "work").iterdir()) == ["finished", "thesis.md"]
    assert (place / "out" / "model.safetensors").read_bytes() != before


def test_other_images_under_the_same_path_are_refused(place: Path) -> None:
    log, words = place / "log", f"{SLIM} {COMMON} --out out"
    (child,) = start(run_lfrns, place, words, log)
    while not list((place / "out" / "work").glob("retrain/step_*")) and child.is_alive():
        time.sleep(0.02)
    child.kill()
    end([child])
    if (place / "out" / "work" / "finished").is_file():
        pytest.skip("it ended before it could be stopped")
    (place / "images" / "a" / "0.png").rename(place / "images" / "a" / "new.png")
    assert end(start(run_lfrns, place, f"{words} --resume", log)) == [1]
    assert "images are not those that the run in" in log.read_text()


def test_a_retraining_that_was_stopped_is_neither_dropped_nor_gone_on_with_unasked(place: Path) -> None:
    further = place / "slim" / "work" / "further"
    further.mkdir(parents=True)
    (further / "run.json").write_text('{"options": {"seed": 5}, "noted": {}}')
    log = place / "log"
    assert end(start(run_lfrns, place, f"{RETRAIN} {COMMON}", log)) == [1]
    assert "Pass --resume to go on with it, or --no-resume to drop it." in log.read_text()
    assert end(start(run_lfrns, place, f"{RETRAIN} {COMMON} --resume", log)) == [1]
    assert "--resume: the run in" in log.read_text() and "Repeat the options of then" in log.read_text()
    assert (further / "run.json").is_file()
