"""Write published figures where they stand, each from its record: model_cards/*/record.json, benchmarks/results/*.json.

python benchmarks/published.py [--check]

`--check` writes nothing and fails where a page says something else than the records.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import table

ROOT = Path(__file__).parent.parent
CONTROLS = {
    "slim, not retrained": "cut",
    "random plan, same widths, cut alone, not retrained": "random_cut",
    "random plan, same widths, equally retrained": "random",
    "slim shape from scratch, as many epochs": "scratch",
    "dense, retrained as long": "dense_longer",
}


def read(card: str) -> Any:
    """Return the figures of a run as text: top-1 of all contestants in percent, MACs kept, images."""
    record = json.loads((ROOT / "model_cards" / card / "record.json").read_text(encoding="utf-8"))
    dense, slim, controls = record["dense"], record["slim"], record["setup"]["controls"]
    found = dict.fromkeys(CONTROLS.values(), "not measured")
    found |= {CONTROLS[row["name"]]: f"{row['top1_pct']:.2f}" for row in controls}
    found |= {"dense": f"{dense['top1_pct']:.2f}", "slim": f"{slim['top1_pct']:.2f}"}
    return SimpleNamespace(**found, macs=f"{slim['macs_g'] / dense['macs_g']:.3f}", images=f"{slim['images']:,}")


def recovered(rate: str) -> float:
    """Return by how many points two epochs at a peak rate moved VGG-16, right after the cut to then."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text(encoding="utf-8"))["cells"]
    cell = cells[f"vgg16-cifar10-macs0.5-params0.5 | {rate} | 0 | 2"]
    return cell["top1_pct"] - cell["after_cut"]["top1_pct"]


def curve(epochs: int) -> str:
    """Return top-1 of our ResNet-20 at each budget, as cells: right after the cut, or after so many epochs."""
    files = (f"resnet20-cifar10-macs{macs}.json" for macs in ("0.9", "0.75", "0.5", "0.25"))
    ours = (table.read(ROOT / "benchmarks" / "results" / name)[1]["ours"] for name in files)
    return " | ".join(table.mean_of(by_epochs.get(epochs, {}), "top1_pct") for by_epochs in ours)


def places() -> Iterator[tuple[str, str, str, str]]:
    """Yield a file, the text before a figure, the figures, and the text behind them."""
    digits, resnet, vit = map(read, ("vit.lfrns50_digits", "cifar_resnet20.lfrns50_cifar10", "vit.lfrns67_cifar10"))
    yield "README.md", "| right after the cut, lfrns_hub | ", curve(0), " |\n"
    yield "README.md", "| after 2 epochs, lfrns_hub | ", curve(2), " |\n"
    ours = table.read(ROOT / "benchmarks" / "results" / "resnet20-cifar10-macs0.5.json")[1]["ours"]
    yield "README.md", "where ours reach ", table.mean_of(ours[0], "top1_pct").split()[0], " ("
    yield "README.md", "of VGG-16 it takes ", f"{-recovered('rate 1x'):.1f}", " points in two"
    yield "README.md", "twentieth of it gains ", f"{recovered('rate 0.05x'):.1f}", " points"
    yield "README.md", "on handwritten digits to half of its MACs: ", short(digits, " -> "), " %, minutes"
    for run, begin, behind in (
        (digits, f"(recipes/vit_digits.py) | digits, {digits.images} held out | ", " | one thread"),
        (resnet, "(recipes/resnet56_cifar10.py), ResNet-20, 2 epochs | CIFAR-10 | ", " | one thread"),
        (vit, "(recipes/vit_cifar100.py), a small ViT, 1 epoch | CIFAR-10 | ", " | the same"),
    ):
        yield "README.md", begin, f"{row(run)} | {run.macs}", behind
    yield (
        "README.md",
        "Before retraining the digits stand at ",
        f"{digits.cut} % (units drawn at random: {digits.random_cut} %)",
        ";",
    )
    yield "README.md", "reaches ", digits.scratch, " %; a point"
    for run, begin in (
        (digits, "on scikit-learn's digits | "),
        (resnet, "`--macs 0.5 --epochs 2` | "),
        (vit, "`--macs 0.67 --epochs 1` | "),
    ):
        yield "recipes/README.md", begin, f"{row(run)} | {run.macs} | {run.images}", " | one thread"
    for run, begin in (
        (resnet, "(../recipes/resnet56_cifar10.py), 2 epochs, 24 min | "),
        (vit, "(../recipes/vit_cifar100.py), 1 epoch, 12 min | "),
        (digits, "(../recipes/vit_digits.py), 12 epochs, 3 min | "),
    ):
        figures = (run.macs, run.dense, run.slim, run.cut, run.random, run.dense_longer, run.images)
        yield "model_cards/README.md", begin, " | ".join(figures), " |\n"
    yield "model_cards/README.md", "as many epochs as dense and slim together: ", digits.scratch, " (a point"
    for name, run in (("resnet56_cifar10", resnet), ("vit_cifar100", vit)):
        begin = "2 epochs: " if run is resnet else "1 epoch: "
        yield f"recipes/{name}.py", begin, f"{run.dense} % dense, {run.slim} % slim", " (model_cards/)"
    told = f"{digits.dense} % dense, {digits.slim} % slim ({digits.cut} % before retraining), {digits.random} % random "
    told += f"units\n           at the same widths ({digits.random_cut} %), {digits.scratch} % the shape from scratch"
    yield "recipes/vit_digits.py", "Result:    ", told, " (seed 0"


def row(run: Any) -> str:
    """Write dense, slim and random plan as cells."""
    return f"{run.dense} | {run.slim} | {run.random}"


def short(run: Any, between: str) -> str:
    """Write dense and slim with one decimal."""
    return f"{float(run.dense):.1f}{between}{float(run.slim):.1f}"


def render() -> dict[Path, str]:
    """Return every file that has figures, as the records say.

    Raises:
        ValueError: A place is not there once.
    """
    texts: dict[Path, str] = {}
    for name, before, figures, behind in places():
        path = ROOT / name
        text = texts.setdefault(path, path.read_text(encoding="utf-8"))
        if text.count(before) != 1:
            raise ValueError(f"{name}: {before!r} stands {text.count(before)} times in it, once is needed.")
        start = text.index(before) + len(before)
        texts[path] = text[:start] + figures + text[text.index(behind, start) :]
    return texts


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file differs")
    check = parser.parse_args().check
    different = [path for path, text in render().items() if path.read_text(encoding="utf-8") != text]
    if check:
        sys.exit(
            f"not as the records say: {', '.join(str(p.relative_to(ROOT)) for p in different)}" if different else 0
        )
    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(different)} files changed")


if __name__ == "__main__":
    main()
