"""Runs that are stopped, by a kill, a signal, a full disk: what was done is not done again, and the end is the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import end, start
from faulty_run import STEPS, make_model, run_recipe, train
from torch.utils.data import DataLoader, TensorDataset

from lfrns_hub.retrain import retrain

KILLS = int(os.environ.get("LFRNS_KILLS", "1"))  # 20 for the whole test, half an hour of two slow cores
EVERY_CALL = bool(os.environ.get("LFRNS_FAULTS"))  # the fault table at every system call, half an hour


class Stopped(Exception):
    """What a test stops a run by."""


def stopped_at(step: int, seen: list[int], what: Callable[[], None] | None = None) -> Callable:
    """Return a tracker that notes each training step, and after one of them stops the run or does something else."""

    def track(values: dict[str, float], number: int) -> None:
        if "learning_rate" in values:
            seen.append(number)
            if number == step:
                if what is None:
                    raise Stopped
                what()

    return track


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_after(step: int, folder: Path, **options: object) -> None:
    """Leave a run in a folder that stopped after a step, just before anything of that step was saved."""
    with pytest.raises(Stopped):
        train(folder, tracker=stopped_at(step, []), **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """The weights of the run that was never stopped, and kept nothing."""
    return train(None)


@pytest.mark.parametrize(("workers", "stops"), [(0, (2, 4, 8, 13, 24)), (2, (6,))])
def test_a_run_stopped_anywhere_ends_with_the_same_weights_and_repeats_few_steps(
    workers: int, stops: tuple[int, ...], tmp_path: Path
) -> None:
    last = STEPS // 2 if workers else STEPS  # two batches a step with workers
    every: list[int] = []
    expected = train(None, workers=workers, tracker=stopped_at(-1, every))
    assert every == list(range(1, last + 1))
    per_epoch = last // 3
    for stop in stops:
        folder, after = tmp_path / f"{stop}", []
        stop_after(stop, folder, workers=workers)
        assert equal(train(folder, workers=workers, tracker=stopped_at(-1, after)), expected), stop
        # The step after whose tracking the run stopped has not been saved yet.
        saved = max(step for step in range(stop) if step % 3 == 0 or step % per_epoch == 0)
        assert after == list(range(saved + 1, last + 1)), stop


def test_the_last_two_checkpoints_are_kept_and_a_finished_run_trains_no_more(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    train(tmp_path)
    assert names(tmp_path) == ["step_000000021", "step_000000024"]
    again: list[int] = []
    assert equal(train(tmp_path, tracker=stopped_at(-1, again)), whole)
    assert again == []


def test_what_was_half_written_is_removed_and_not_read(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stop_after(5, tmp_path)
    partial = tmp_path / "step_000000005.partial"
    shutil.copytree(tmp_path / "step_000000003", partial)
    (partial / "model.safetensors").write_bytes(b"half")
    after: list[int] = []
    assert equal(train(tmp_path, tracker=stopped_at(-1, after)), whole)
    assert after[0] == 4
    assert not partial.exists()


@pytest.mark.parametrize("step", [4, 8, STEPS])
def test_sigterm_finishes_the_step_saves_and_exits_with_0(
    step: int, whole: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, tracker=stopped_at(step, seen, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.value.code == 0
    assert seen == list(range(1, step + 1))
    assert f"SIGTERM: stopped after step {step} of {STEPS}, saved in {tmp_path}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert equal(train(tmp_path, tracker=stopped_at(-1, seen)), whole)
    assert seen == list(range(1, STEPS + 1))


@pytest.mark.parametrize("size", [0, 2000, 6000])
def test_a_full_disk_is_told_and_loses_nothing(
    size: int, whole: dict[str, torch.Tensor], tmp_path: Path, fill_disk: Callable[[int], None]
) -> None:
    with pytest.raises(OSError) as told:
        train(tmp_path, tracker=stopped_at(4, [], lambda: fill_disk(size)))
    fill_disk(-1)
    assert "the checkpoint of step 6 could not be written" in str(told.value)
    assert f"The last good one is {tmp_path / 'step_000000003'}. Make room" in str(told.value)
    assert names(tmp_path) == ["step_000000003"]
    after: list[int] = []
    assert equal(train(tmp_path, tracker=stopped_at(-1, after)), whole)
    assert after[0] == 4


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    seen: list[int] = []
    with pytest.raises(OSError, match=r"checkpoint_dir='.*file/run'\): the folder cannot be written to"):
        train(tmp_path / "file" / "run", tracker=stopped_at(-1, seen))
    assert not seen
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told_and_what_is_in_it_stays(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stop_after(5, tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="the folder cannot be written to"):
            train(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == ["step_000000003"]
    assert equal(train(tmp_path), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 4}, "epochs is 3 in it, and 4 now"),
        ({"seed": 1}, "seed is 0 in it, and 1 now"),
        ({"learning_rate": 0.1}, "learning_rate is 0.02 in it, and 0.1 now"),
        ({"batch_size": 5}, "batch_size is 4 in it, and 5 now"),
        ({"width": 9}, r"model 0.weight is float32\[8, 3, 3, 3\] in it, and float32\[9, 3, 3, 3\] now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    stop_after(4, tmp_path)
    with pytest.raises(ValueError, match=message + ".*name another folder"):
        train(tmp_path, **options)
    assert names(tmp_path) == ["step_000000003"]


class Planted:
    """What a stranger would put into a pickle."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "model.safetensors", "state.json"])
def test_a_damaged_or_planted_file_is_told_runs_no_code_and_leaves_the_one_before(
    file: str, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder, planted = tmp_path / "run", tmp_path / "planted"
    stop_after(7, folder)
    torch.save(Planted(str(planted)), folder / "step_000000006" / file)
    with pytest.raises(OSError, match=r"step_000000006 there cannot be read .* Remove .*step_000000006 to go on"):
        train(folder)
    assert not planted.exists()
    shutil.rmtree(folder / "step_000000006")
    assert equal(train(folder), whole)


def test_a_loss_or_weight_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    images = torch.randn(24, 3, 6, 6)
    images[20] = float("nan")
    loader = DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=4)
    options = {"epochs": 1, "checkpoint_every": 2, "checkpoint_dir": tmp_path / "loss", "progress": False}
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 6 of 6, rate .*checkpoint is .*step_000000004"):
        retrain(make_model(), loader, learning_rate=0.02, **options)
    model = make_model()

    def spoil(values: dict[str, float], step: int) -> None:
        if step == 4:
            model[5].bias.data[1] = float("inf")

    options["checkpoint_dir"] = tmp_path / "weight"
    with pytest.raises(FloatingPointError, match=r"5.bias is not finite at step 4.*step_000000002"):
        retrain(model, loader, learning_rate=0.02, tracker=spoil, **options)


@pytest.mark.parametrize("every", [0, -3])
def test_a_number_of_steps_between_checkpoints_below_one_is_refused(every: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"checkpoint_every={every}"):
        train(tmp_path / "run", checkpoint_every=every)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_at_any_system_call_a_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    preloaded, tests = tmp_path / "faults.so", Path(__file__).parent
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc: a library that is loaded before the C library kills at its calls")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", preloaded, tests / "faults.c", "-ldl"], check=True)
    chosen = [] if EVERY_CALL else ["save over, exchanged", "save over, by journal", "write_index", "Record.save"]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(preloaded), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, tests / "fault_table.py", "1" if EVERY_CALL else "5", *chosen]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [row for row in rows if row["broken"]]
    assert sum(row["points"] for row in rows) >= (200 if EVERY_CALL else 30)


@pytest.mark.slow
def test_a_recipe_killed_at_random_moments_ends_as_if_it_had_not_been(repository: Path, tmp_path: Path) -> None:
    recipe = str(repository / "recipes" / "vit_digits.py")

    def launch(out: str, *more: str) -> list:
        arguments = ["--smoke", "--output-dir", str(tmp_path / out), *([] if KILLS > 1 else ["--no-controls"]), *more]
        return start(run_recipe, recipe, arguments, str(tmp_path / f"{out}.steps"))

    def steps(out: str) -> int:
        path = tmp_path / f"{out}.steps"
        return path.stat().st_size if path.exists() else 0

    def outcome(out: str) -> tuple[bytes, str]:
        files = names(tmp_path / out / "work")
        assert files == ["dense.safetensors", "run.json"]
        return (tmp_path / out / "model.safetensors").read_bytes(), (tmp_path / out / "config.json").read_text()

    began = time.monotonic()
    assert end(launch("whole")) == [0]
    print(f"uninterrupted: {time.monotonic() - began:.1f} s, {steps('whole')} steps")
    draw = random.Random(0)
    for number in range(KILLS):
        out, moment, later = f"killed{number}", draw.randrange(steps("whole")), draw.uniform(0, 0.2)
        began = time.monotonic()
        (killed,) = launch(out)
        while steps(out) < moment and killed.is_alive():
            time.sleep(0.01)
        # Between steps, too, and where none is counted; in shares of the time until now, as machines differ.
        killed.join(later * (time.monotonic() - began))
        killed.kill()
        killed.join()
        before = steps(out)
        began = time.monotonic()
        assert end(launch(out, "--resume")) == [0], out
        again = steps(out) - before
        print(f"{out}: after {before} steps; resumed: {time.monotonic() - began:.1f} s, {again} steps")
        assert outcome(out) == outcome("whole"), out
        # At most an epoch of ten steps, or the gates' ten, are done again.
        assert steps("whole") <= steps(out) <= steps("whole") + 11, out
