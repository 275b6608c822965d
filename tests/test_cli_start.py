"""Help and mistakes in the arguments are answered before torch, timm and transformers are imported."""

import json
import subprocess
import sys
from pathlib import Path

import lfrns_hub
from lfrns_cli.commands import Export
from lfrns_hub.pictures import MAX_UNREADABLE
from lfrns_hub.runtimes.export import FORMATS

SLIM = "slim resnet50 --data DIR --out new"
MISTAKES = {
    # arguments: what the answer says
    "slmi resnet50": ("No such command 'slmi'", "See --help"),
    "slim": ("Missing", "See --help"),
    "slim resnet50 --out new --macs 0.5": ("Missing option '--data'", "See --help"),
    "slim resnet50 --data DIR --macs 0.5": ("Missing option '--out'", "See --help"),
    SLIM: ("--macs, --params or --latency must say how much to keep", "--macs 0.5"),
    f"{SLIM} --macs 50": ("--macs 50: each fraction", "For 50 % pass 0.5"),
    f"{SLIM} --macs 0": ("--macs 0: each fraction", "(0, 1]"),
    f"{SLIM} --macs half": ("--macs half: numbers with commas", "0.75,0.5"),
    f"{SLIM} --macs 0.5,1.5": ("--macs 0.5,1.5: each fraction", "(0, 1]"),
    f"{SLIM} --params 2": ("--params 2.0: the fraction of the parameters", "(0, 1]"),
    f"{SLIM} --latency 0": ("--latency 0.0: the fraction of the time", "For 50 % pass 0.5"),
    f"{SLIM} --macs 0.5 --epochs -1": ("--epochs", "See --help"),
    f"{SLIM} --macs 0.5 --epochs ten": ("--epochs", "See --help"),
    f"{SLIM} --macs 0.5 --mac 3": ("No such option", "--mac"),
    f"{SLIM} --macs 0.5 --preset mine": ("--preset", "'mine'"),
    f"{SLIM} --macs 0.5 --val-split 10": ("--val-split 10: the share", "For 10 % pass 0.1"),
    f"{SLIM} --macs 0.5 --weights gone.pth": ("--weights gone.pth: there is no such file", "Give a .safetensors"),
    f"{SLIM} --macs 0.5 --class-map gone.txt": ("--class-map gone.txt: there is no such file", "a class name a line"),
    f"{SLIM} --macs 0.5 --calibration-images 0": ("--calibration-images 0: at least one image", "2000"),
    f"{SLIM} --macs 0.5 --fcr-steps -5": ("--fcr-steps", "See --help"),
    f"{SLIM} --macs 0.5 --batch-size 0": ("--batch-size", "See --help"),
    f"{SLIM} --macs 0.5 --device tpu": ("--device", "'tpu'"),
    f"{SLIM} --macs 0.5 --mean 0.5": ("--mean", "See --help"),
    f"{SLIM} --macs 0.5 --push-to-hub not/a/repo": ("--push-to-hub not/a/repo: is no repository", "user/name"),
    f"{SLIM} --macs 0.5,0.3 --push-to-hub me/net": ("2 budgets make as many repositories", "user or the organisation"),
    "train resnet50 --data DIR": ("Missing option '--out'", "See --help"),
    "train resnet50 --data DIR --out new --epochs 0": ("--epochs", "See --help"),
    "train resnet50 --data DIR --out new --weights gone.pth": ("--weights gone.pth: there is no such file",),
    "train resnet50 --data DIR --out new --learning-rate -1": ("--learning-rate -1: it must be above 0",),
    "train resnet50 --data DIR --out new --img-size 0": ("--img-size", "See --help"),
    "train resnet50 --data DIR --out new --log-with wandb": ("--log-with", "'wandb'"),
    "train resnet50 --data DIR --out new --log-with trackio": ("trackio is not installed", "pip install trackio"),
    f"{SLIM} --macs 0.5 --log-with tensorboard": ("tensorboard is not installed. Run pip install tensorboard", "csv"),
    f"{SLIM} --macs 0.5 --img-size big": ("--img-size", "See --help"),
    "retrain slim --data DIR --log-with trackio": ("trackio is not installed", "--log-with csv"),
    "retrain slim --data DIR --weights gone.pth --teacher x": ("--weights gone.pth", "no such file"),
    "retrain slim --data DIR --epochs 0": ("--epochs", "See --help"),
    "curve resnet50 --data DIR --macs 0.9,90": ("--macs 0.9,90: each fraction", "For 90 % pass 0.9"),
    "evaluate slim": ("Missing option '--data'", "See --help"),
    f"{SLIM} --macs 0.5 --learning-rate 0": ("--learning-rate 0: it must be above 0", "Leave it out"),
    f"{SLIM} --macs 0.5 --seed -1": ("--seed", "See --help"),
    f"{SLIM} --macs 0.5 --latency-threads 2": ("--latency-threads: says how --latency is timed", "leave this out"),
    f"{SLIM} --macs 0.5 --with-images": ("--with-images: says what --push-to-hub sends", "Leave it out"),
    "evaluate slim --data DIR --weights pyproject.toml": ("are those of --dense", "leave the weights out"),
    f"{SLIM} --macs 0.5 --weights {'x' * 300}": ("x" * 300,),
    f"{SLIM} --macs 0.5 --license Mine!": ("--license Mine!: licences have", "apache-2.0"),
    "predict slim gone.jpg": ("lfrns predict: gone.jpg: there is no such file", "Name images"),
    "bench slim --batches 1,x": ("--batches 1,x: numbers with commas", "1,32"),
    "bench slim --batches 0": ("--batches 0: each must be 1 or more", "1,32"),
    "bench slim --runs 0": ("--runs 0: it must be 1 or more", "30"),
    "push gone me/net": ("lfrns push gone: there is no such folder", "lfrns slim wrote"),
    "push slim": ("Missing argument", "See --help"),
    "push tests me/net --license Mine!": ("--license Mine!: licences have", "apache-2.0"),
    "card": ("Missing argument", "See --help"),
    "card gone": ("lfrns card gone: there is no such folder", "lfrns slim wrote"),
    "zoo": ("Missing argument", "See --help"),
    "zoo gone.yaml": ("lfrns zoo gone.yaml: there is no such file", "docs/zoo.md"),
    "zoo CITATION.cff": ("CITATION.cff: cff-version", "there is no such key"),
    "run": ("Missing argument", "See --help"),
    "run gone.py --help": ("lfrns run gone.py: there is no such file", "clone it"),
    "run -m gone.module": ("lfrns run -m gone.module: there is no module of this name", "leave -m out"),
    "run -m gone.py": ("lfrns run -m gone.py: there is no module of this name", "leave -m out"),
    "run -m ./lfrns": ("lfrns run -m ./lfrns: there is no module of this name", "leave -m out"),
    "export slim --format tflite": ("--format", "'tflite'"),
}  # fmt: skip
# Answers what is typed, a line of JSON after the other, in a process where what takes seconds cannot be imported.
DRIVER = """
import contextlib, io, json, sys
for name in ("torch", "timm", "transformers", "lfrns_hub", "numpy", "tensorboard", "tensorboardX", "trackio"):
    sys.modules[name] = None
import lfrns_cli
for line in sys.stdin:
    sys.argv = ["lfrns", *line.split()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            lfrns_cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def answers(lines: list[str]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each command line, of a process that can import nothing slow."""
    root = Path(lfrns_hub.__file__).parent.parent
    driver = [sys.executable, "-c", DRIVER]
    done = subprocess.run(driver, input="\n".join(lines), cwd=root, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_mistake_is_one_sentence_before_anything_slow_is_imported() -> None:
    said = answers(list(MISTAKES))
    assert len(said) == len(MISTAKES) >= 25
    for (line, parts), (code, out, err) in zip(MISTAKES.items(), said, strict=True):
        assert (code, out, len(err.splitlines())) == (1, "", 1), (line, code, out, err)
        assert err.startswith(("ValueError: ", "OSError: ")), (line, err)
        for part in parts:
            assert part in err, (line, part, err)


def test_help_of_each_command_imports_nothing_slow_and_fits_80_columns() -> None:
    commands = "slim retrain train zoo units curve evaluate predict bench card push export run".split()
    commands.append("")
    for command, (code, out, err) in zip(commands, answers([f"{name} --help" for name in commands]), strict=True):
        assert (code, err) == (0, ""), command
        assert f"lfrns {command}".strip() in out
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out


def test_what_help_says_is_what_the_package_does() -> None:
    assert Export.__dataclass_fields__["format"].type.__origin__.__args__ == FORMATS
    (_, out, _), *_ = answers(["slim --help"])
    assert f"(default: {MAX_UNREADABLE})" in " ".join(out.replace("│", " ").split())
