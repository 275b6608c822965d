"""The fault table: what is on the disk when a call is killed at each system call that changes a folder.

`python tests/fault_table.py STRIDE CASE ...`, with the library of faults.c preloaded, runs cases and prints a line of
JSON for each. A case makes a folder, then acts on it; at every STRIDE-th system call that changes the folder its
process is killed, and a copy of what is left is looked at: it must load, and be what it was before the act, or after
one of the changes that the act makes in turn, byte by byte.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from faulty_run import make_model, train
from PIL import Image
from safetensors.torch import load_file, save_file

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub import plots, recipe
from lfrns_hub.checkpoint import is_own
from lfrns_hub.hub.index import write_index
from lfrns_hub.latency.layer_times import LayerTable
from lfrns_hub.measure import Record
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.runs import atomic
from lfrns_hub.runs.cache import Cache
from lfrns_hub.runs.processes import ALONE

PR_SET_CHILD_SUBREAPER = 36
WIDTHS = {"widths": {"layer1.0.conv1": [8, 16]}, "kinds": {"layer1.0.conv1": "channel"}}
FIGURES = {"top1_pct": 90.0, "images": 10, "params_m": 2.0, "macs_g": 1.0, "latency_ms": 4.0, "size_mb": 8.0}


def network(seed: int) -> torch.nn.Module:
    """Build a small network whose checkpoint has a picture of widths."""
    torch.manual_seed(seed)
    model = timm.create_model("cifar_resnet20", num_classes=3).eval()
    model.lfrns_provenance = {**WIDTHS, "seed": seed}
    return model


def record(macs: float, occasion: str = "first") -> Record:
    """Make up what was measured."""
    figures = FIGURES | {"output": "classes", "occasion": occasion}
    return Record(figures, {**figures, "macs_g": macs, "agreement_pct": 95.0}, {"model_name": f"net {macs}"})


def save_old(root: Path, name: str = "slim", macs: float = 0.5) -> None:
    """Save a checkpoint, and let a person put files beside it and a section into its card."""
    lfrns.save(network(0), root / name, record=record(macs), label_names=["cat", "dog", "eel"])
    (root / name / "notes.md").write_text("mine")
    (root / name / "more").mkdir()
    (root / name / "more" / "deep.txt").write_text("mine, too")
    with (root / name / "README.md").open("a") as card:
        card.write("\n## My notes\n\nFour weeks of notes.\n")


def save_new(root: Path) -> None:
    """Save another checkpoint over it."""
    lfrns.save(network(1), root / "slim", record=record(0.25), overwrite=True)


def save_new_from_inside(root: Path) -> None:
    """Save over the folder that the process works in."""
    os.chdir(root / "slim")
    lfrns.save(network(1), ".", record=record(0.25), overwrite=True)


def make_zoo(root: Path) -> None:
    """Make two checkpoints under an index."""
    for name, macs in (("a", 0.5), ("b", 0.25)):
        save_old(root / "zoo", name, macs)
    write_index(root / "zoo", "net, slimmed")
    record(0.375).save(root / "zoo" / "b" / "record.json")


def make_data(root: Path) -> None:
    """Draw pictures of three classes that a network is trained to tell apart, outside of what is watched."""
    rng, home = np.random.default_rng(0), root.parent
    for split in ("train", "validation"):
        for number, name in enumerate(("cat", "dog", "eel")):
            (home / "data" / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(0, 60, (32, 32, 3))
                pixels[..., number] += 150
                Image.fromarray(pixels.astype("uint8")).save(home / "data" / split / name / f"{i}.png")
    model = network(0)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        y = torch.randint(0, 3, (32,))
        x = torch.rand(32, 3, 32, 32) * 60 / 255
        x[torch.arange(32), y] += 150 / 255
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model((x - mean) / std), y)
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.3, "it learnt nothing: no command would slim it"
    save_file(model.state_dict(), home / "weights.safetensors")


def make_measured(root: Path) -> None:
    """Make pictures and a checkpoint of before."""
    make_data(root)
    save_old(root)


def command(*words: str) -> Callable[[Path], None]:
    """Return what runs the command line; ROOT and HOME in its words are the watched folder and the one above it."""

    def run(root: Path) -> None:
        sys.argv = ["lfrns", *(word.replace("ROOT", str(root)).replace("HOME", str(root.parent)) for word in words)]
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, f"it refused its arguments: {sys.argv}"

    return run


SLIM = ("slim", "cifar_resnet20", "--weights", "HOME/weights.safetensors", "--data", "HOME/data", "--epochs", "1")
SLIM += ("--fcr-steps", "2", "--calibration-images", "32", "--json", "--no-flip", "--out", "ROOT/slim")


def keep_again(root: Path) -> Any:
    """Keep three steps of a run, as `slim` does; each has to be there or to be made."""
    cache = Cache(root / "cache", ALONE, "content")
    return [cache.keep("step", lambda n=n: {"x": torch.arange(1000) * n}, n) for n in range(3)]


def table_of(root: Path) -> LayerTable:
    """Open a table of times of a machine that is made up."""

    class Pretended:
        def describe(self) -> dict[str, str]:
            return {"name": "pretended"}

    return LayerTable(Pretended(), root)


def keep_times(root: Path) -> None:
    """Keep times in the table."""
    table = table_of(root)
    table.known |= {f"layer {n}": 1.0 + n for n in range(300)}
    table.keep()


def begin_again(root: Path) -> None:
    """Begin a run of a recipe over one that ended."""
    parser = recipe.recipe_parser("x", path=__file__, model=None, macs=0.5, epochs=1, batch_size=1, dense_epochs=1)
    recipe.begin_run(root / "slim", parser.parse_args(["--overwrite"]), make_accelerator())


def weights_of_a_run(root: Path, seed: int = 1) -> None:
    """Keep the dense weights of a run."""
    torch.manual_seed(seed)
    recipe.save_weights(torch.nn.Linear(300, 300), root / "dense.safetensors", make_accelerator())


def draw(root: Path) -> None:
    """Draw a curve over another picture."""
    sides = [{**FIGURES, "occasion": "a", "macs_g": share} for share in (0.5, 0.25)]
    plots.plot_ladder(sides, {**FIGURES, "occasion": "a"}, root / "curve.png")


def check_checkpoints(root: Path) -> None:
    """Load every checkpoint that there is, and what lies beside it."""
    for journal in sorted(root.rglob(".lfrns-next")):
        # Completes what was decided on, as the next call on the folder does first: of an index too.
        atomic.settle(journal.parent, lambda name: is_own(name) or name in ("README.md", "accuracy.png"))
    for config in sorted(root.rglob("config.json")):
        folder = config.parent
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue
        lfrns.load(folder)
        if (folder / "record.json").exists():
            Record.load(folder / "record.json")


def check_index(root: Path) -> None:
    """Load the checkpoints, and complete a table that was decided on, as the next call on its folder does first."""
    atomic.settle(root / "zoo", lambda name: name in ("README.md", "accuracy.png"))
    check_checkpoints(root)


def check_over(root: Path) -> None:
    """Load the checkpoint, and find a person's files and words."""
    check_checkpoints(root)
    assert (root / "slim" / "notes.md").read_text() == "mine"
    assert (root / "slim" / "more" / "deep.txt").read_text() == "mine, too"
    if (root / "slim" / "README.md").exists():
        assert "Four weeks of notes." in (root / "slim" / "README.md").read_text()


def check_file(root: Path) -> None:
    """Open every file that is no draft."""
    for path in root.rglob("*"):
        if path.is_file() and ".partial" not in str(path):
            load_file(path) if path.suffix == ".safetensors" else path.read_bytes()


def check_kept(root: Path) -> None:
    """Go on by the same call: what it gives is the same."""
    assert [int(step["x"].sum()) for step in keep_again(root)] == [499500 * n for n in range(3)]


def check_times(root: Path) -> None:
    """Find the table empty or whole."""
    assert len(table_of(root).known) in (0, 2, 300)


def check_trained(root: Path) -> None:
    """Go on by the same call: it ends with the same weights."""
    train(root / "run")
    found = load_file(max((root / "run").glob("step_*")) / "model.safetensors")
    expected = load_file(Path(os.environ["FAULTS_EXPECTED"]) / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@dataclass
class Case:
    """What is made, what is done to it, how what is left is checked, and whether its state is compared as well."""

    make: Callable[[Path], Any]
    act: Callable[[Path], Any]
    check: Callable[[Path], Any]
    compared: bool = True
    no_exchange: bool = False


def nothing(root: Path) -> None:
    """Make nothing."""


CASES = {
    "save, new": Case(nothing, lambda root: save_old(root), lambda root: None, compared=False),
    "save over, exchanged": Case(save_old, save_new, check_over),
    "save over, by journal": Case(save_old, save_new, check_over, no_exchange=True),
    "save over, from inside": Case(save_old, save_new_from_inside, check_over),
    "Record.save": Case(lambda root: record(0.5).save(root / "r.json"), lambda root: record(0.3).save(root / "r.json"),
                        lambda root: Record.load(root / "r.json")),
    "write_index": Case(make_zoo, lambda root: write_index(root / "zoo", ""), check_index),
    "plots": Case(lambda root: plots.plot_ladder([{**FIGURES, "occasion": "a"}] * 2, {**FIGURES, "occasion": "a"},
                  root / "curve.png"), draw, lambda root: Image.open(root / "curve.png").load()),
    "slim(checkpoint_dir): Cache": Case(nothing, keep_again, check_kept, compared=False),
    "retrain(checkpoint_dir)": Case(nothing, lambda root: train(root / "run"), check_trained, compared=False),
    "LatencyMeter: table": Case(lambda root: save_table(root), keep_times, check_times),
    "recipe --overwrite": Case(lambda root: save_run(root), begin_again, check_over, compared=False),
    "recipe: dense weights": Case(lambda root: weights_of_a_run(root, 0), weights_of_a_run, check_file),
    "lfrns evaluate": Case(make_measured, command("evaluate", "ROOT/slim", "--data", "HOME/data", "--json"),
                           check_over),
    "lfrns retrain": Case(make_measured, command("retrain", "ROOT/slim", "--data", "HOME/data", "--epochs", "1",
                          "--json", "--no-flip"), check_over),
    "lfrns slim": Case(make_data, command(*SLIM, "--macs", "0.8"), check_checkpoints),
    "lfrns slim --overwrite": Case(make_measured, command(*SLIM, "--macs", "0.8", "--overwrite"), check_over),
    "lfrns slim, several": Case(make_data, command(*SLIM, "--macs", "0.8,0.6"), check_checkpoints),
    "lfrns export": Case(save_old, command("export", "ROOT/slim", "--format", "pt2", "--json"), check_over),
}  # fmt: skip


def save_table(root: Path) -> None:
    """Make a table of two times."""
    table = table_of(root)
    table.known |= {"layer 0": 1.0, "layer 1": 2.0}
    table.keep()


def save_run(root: Path) -> None:
    """Make the folder of a finished run."""
    save_old(root)
    (root / "slim" / "work" / "retrain").mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, root / "slim" / "work" / "dense.safetensors")
    (root / "slim" / "work" / "run.json").write_text("{}")


def state_of(root: Path) -> str:
    """Return a digest of all that a reader sees in a folder: not hidden files, drafts, and what runs go on from."""
    hashed = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        own = any(p.startswith(".") or p.endswith(".partial") or p == "work" for p in Path(name).parts)
        if path.is_file() and not own:
            hashed.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return hashed.hexdigest()


def forked(work: Callable[[], None], seconds: int = 300) -> tuple[int, str]:
    """Run something in a child; return its wait status and the last line of its error."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            signal.alarm(seconds)
            with contextlib.suppress(BaseException):
                os.dup2(said.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                try:
                    work()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return status, (said.read().strip().splitlines() or [""])[-1][:300]


def watched(states: int, root: Path) -> None:
    """Note the state after each change that is made whole."""

    def noting(change: Callable) -> Callable:
        def noted(*arguments: Any, **options: Any) -> None:
            change(*arguments, **options)
            os.write(states, f"{state_of(root)}\n".encode())

        return noted

    for name in ("rename_synced", "put_in_place"):  # wherever it was imported to
        change, noted = getattr(atomic, name), noting(getattr(atomic, name))
        for module in [module for key, module in sys.modules.items() if key.startswith("lfrns_hub")]:
            if getattr(module, name, None) is change and (name == "rename_synced" or module is not atomic):
                setattr(module, name, noted)


def run_case(name: str, stride: int, home: Path) -> dict[str, Any]:
    """Kill one case at its system calls, and say what was found."""
    case, root = CASES[name], home / "watched"
    root.mkdir()
    os.environ["LFRNS_CACHE"] = str(root / "cache" if name.startswith("LatencyMeter") else home / "cache")
    status, why = forked(lambda: case.make(root))
    if status:
        return {"case": name, "points": 0, "broken": [f"it cannot be made: {why}"]}
    states, before = os.open(home / "states", os.O_RDWR | os.O_CREAT | os.O_APPEND), state_of(root)
    (reports, report), (waits, go) = os.pipe(), os.pipe()
    shim = ctypes.CDLL(None)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException), (home / "said").open("w") as said:
            os.dup2(said.fileno(), 2)
            os.dup2(said.fileno(), 1)
            watched(states, root)
            shim.faults_arm(
                str(root).encode(), ctypes.c_long(stride), ctypes.c_long(0), report, waits, case.no_exchange
            )
            try:
                case.act(root)
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    os.close(report)
    found, broken, calls = [], [], {}
    with os.fdopen(reports) as lines:
        for line in lines:  # until the last process that could report has ended
            process, number, call = line.split()
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            child = int(process)
            calls[call] = calls.get(call, 0) + 1
            left = home / "left" / "watched"
            shutil.copytree(root, left, symlinks=True)
            status, why = forked(lambda left=left: case.check(left))
            if status:
                broken.append(f"{call} {number}: {why or f'status {status}'}")
            found.append((f"{call} {number}", state_of(left)))
            shutil.rmtree(home / "left")
            os.write(go, b".")
    _, status = os.waitpid(child, 0)
    if status:
        said = (home / "said").read_text().strip()
        broken.append(f"it failed by itself: {said[:600]} ... {said[-300:]}")
    os.lseek(states, 0, 0)
    whole = {before, *os.read(states, 1 << 20).decode().split()}
    if case.compared:
        broken += [f"{where}: neither the old nor the new" for where, state in found if state not in whole]
    for descriptor in (states, waits, go):
        os.close(descriptor)
    return {"case": name, "points": len(found), "states": len(whole), "calls": calls, "broken": broken}


def warm_up() -> None:
    """Do once what the children do over and over: what it imports is then there in all of them."""
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        save_old(root)
        save_new(root)
        check_over(root)
        make_zoo(root)
        write_index(root / "zoo", "")
    gc.freeze()


def main() -> None:
    """Run the cases that are named, all by default, each in a folder of its own."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    torch.set_num_threads(1)
    warm_up()
    stride, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as home:
        expected = Path(home) / "expected"

        def never_killed() -> None:
            train(expected / "run")

        if "retrain(checkpoint_dir)" in (names or CASES):
            forked(never_killed)
            os.environ["FAULTS_EXPECTED"] = str(max((expected / "run").glob("step_*")))
        for number, name in enumerate(names or CASES):
            folder = Path(home) / str(number)
            folder.mkdir()
            print(json.dumps(run_case(name, int(stride), folder)), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    make_model()
    main()
