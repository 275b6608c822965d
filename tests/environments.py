"""Environments that people have, each made by pip alone, and the chosen part of the suite in each.

    python tests/environments.py floors             # every `>=` of pyproject.toml as `==`, over this Python's torch
    python tests/environments.py matrix [NAME ...]  # with torch's own wheels: 6 GB each, one after the other, removed

`floors` is the lower edge of what CI runs. `matrix` is run by hand: what it found is written, dated, into
environments.json and CONTRIBUTING.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "tests" / "environments.json", ROOT / "CONTRIBUTING.md"
START, END = "<!-- matrix: written by tests/environments.py -->", "<!-- end of matrix -->"
LARGE = ("torch", "torchvision", "triton", "nvidia-", "cuda-")  # of torch: the same in both environments of CI
CHOSEN = (
    "golden",
    "compat",
    "imports",
    "ways_in",
    "checkpoint",
    "laws",
    "widths",
    "retrain",
    "cli",
)  # trace and cut, checkpoints and every way into them, retraining, the command line
SHOWN = ("torch", "transformers", "huggingface-hub", "numpy", "datasets", "accelerate")


@dataclass(frozen=True)
class Environment:
    """One row of the matrix.

    Attributes:
        asked: Of pip, beside this package.
        tool: The program of beside.py that a tool runs in one process with this package.
    """

    name: str
    asked: tuple[str, ...] = ()
    tool: str | None = None


def floors(*pins: str) -> tuple[str, ...]:
    """Turn each `>=` of what the package and its tests need into `==`, but for what `pins` states."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pinned = {pin.partition("==")[0] for pin in pins}
    return (*pins, *(need.replace(">=", "==") for need in needs if need.partition(">=")[0] not in pinned))


MATRIX = (
    Environment("floors", floors()),
    Environment("newest"),
    Environment("torch 2.8", ("torch==2.8.0", "transformers==5.0.0", "numpy==2.0.0")),
    Environment("modelopt", ("nvidia-modelopt[hf]",), "modelopt"),
    Environment("optimum-intel", ("optimum-intel",), "optimum_intel"),
    Environment("llm-compressor", ("llmcompressor",), "llmcompressor"),
)


def make(folder: Path, asked: tuple[str, ...], torch_from: Path | None = None) -> str | None:
    """Make an environment with this package in it.

    Args:
        folder: Where; what was there is replaced.
        asked: Requirements beside the package's own.
        torch_from: The site-packages whose torch is taken over, so that pip finds it installed.
    Returns:
        None, or pip's words where it found no way.
    """
    venv.create(folder, clear=True, with_pip=True)
    if torch_from:
        take_torch(torch_from, next(folder.glob("lib/python*/site-packages")))
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--editable", ".[test]", *asked]
    done = subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    return " ".join(errors)[-600:] if done.returncode else None


def take_torch(source: Path, target: Path) -> None:
    """Link torch's files into another environment: hard links, which pip may remove there as its own."""
    packages = [one for one in metadata.distributions(path=[str(source)]) if one.name.lower().startswith(LARGE)]
    for top in {file.parts[0] for package in packages for file in package.files or ()} - {".."}:
        if (source / top).is_dir():
            shutil.copytree(source / top, target / top, copy_function=link, dirs_exist_ok=True)
        else:
            link(source / top, target / top)


def link(source: str | Path, target: str | Path) -> None:
    """Link a file, or copy it where it would lie on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Ask an environment what it has."""
    code = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(names, found, strict=True))


def run_chosen(python: Path) -> str:
    """Run the chosen part of the suite, which trades checkpoints with this Python, and return pytest's closing line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LFRNS_OTHER_PYTHON": sys.executable}
    files = [f"tests/test_{name}.py" for name in CHOSEN]
    command = [python, "-m", "pytest", "-q", "--numprocesses=2", "--dist=loadfile", "--durations=5", *files]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as running:
        line = ""
        for line in running.stdout:
            print(line, end="", flush=True)
    return line.strip()


def run_floors(folder: Path) -> str:
    """Make the environment of the floors over this Python's torch and run the chosen part in it: pytest's end."""
    asked = floors(*(f"{name}=={metadata.version(name)}" for name in ("torch", "torchvision")))
    stamp = folder / "installed"
    if not stamp.is_file() or stamp.read_text() != repr(asked):
        if words := make(folder, asked, Path(metadata.distribution("torch").locate_file(""))):
            sys.exit(words)
        stamp.write_text(repr(asked))
    pins = dict(pin.split("==") for pin in asked)
    has = versions(folder / "bin" / "python", tuple(pins))
    print("floors:", *(f"{name} {version}" for name, version in has.items()))
    if wrong := [name for name, pin in pins.items() if not f"{has[name]}.0.".startswith(f"{pin}.")]:
        sys.exit(f"not at their floors: {wrong}")
    return run_chosen(folder / "bin" / "python")


def run_matrix(names: list[str], folder: Path) -> None:
    """Make each environment, run the chosen part and the tool's program, and write down what came of it."""
    for environment in [one for one in MATRIX if not names or one.name in names]:
        row = {"date": datetime.now(UTC).date().isoformat(), "python": sys.version.split()[0]}
        python = folder / "bin" / "python"
        if words := make(folder, environment.asked):
            row["refused"] = words
        else:
            row |= {"versions": versions(python, SHOWN), "suite": run_chosen(python)}
        if environment.tool and not words:
            command = [python, "tests/beside.py", environment.tool]
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
            row["beside"] = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
        rows = {**json.loads(RECORD.read_text(encoding="utf-8")), environment.name: row}
        RECORD.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        print(environment.name, row)
        shutil.rmtree(folder)
    write_page()


def write_page() -> None:
    """Write the matrix into CONTRIBUTING.md."""
    rows = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = ["| environment | asked of pip | what it gave | chosen part of the suite | the tool's own job | date |"]
    lines += ["|---|---|---|---|---|---|"]
    for environment in MATRIX:
        row = rows.get(environment.name, {})
        asked = (
            "each `>=` as `==`" if environment.name == "floors" else " ".join(f"`{pin}`" for pin in environment.asked)
        )
        gave = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
        cells = [environment.name, asked, gave or row.get("refused", "not run"), row.get("suite", "not run")]
        lines.append(f"| {' | '.join([*cells, row.get('beside', ''), row.get('date', '')])} |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text("\n".join([before + START, "", *lines, "", END + after]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["floors", "matrix"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(one.name for one in MATRIX))
    parser.add_argument("--folder", type=Path, help="where the environment is made")
    args = parser.parse_args()
    if unknown := {*args.names} - {one.name for one in MATRIX}:
        parser.error(f"{sorted(unknown)}: the environments are {[one.name for one in MATRIX]}")
    if args.what == "matrix":
        run_matrix(args.names, args.folder or ROOT / "out" / "environment")
    elif (
        " failed" in (end := run_floors(args.folder or ROOT / ".venv-floors"))
        or " passed" not in end
        or " error" in end
    ):
        sys.exit(1)
