"""Checkpoints between releases of transformers that name the parts of a model otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_checkpoint import slim_transformers
from transformers import AutoModelForImageClassification
from ways_in import distance, logits

from lfrns_cli.app import command_error
from lfrns_hub import checkpoint
from lfrns_hub.format.compat import RENAMED

KINDS = ("vit", "deit", "dinov2")


def write(root: Path) -> None:
    """Write a checkpoint of each kind with fewer heads and neurons, and what it answers."""
    for kind in KINDS:
        model, images = slim_transformers(kind), torch.randn(2, 3, 32, 32)
        checkpoint.save(model, root / kind)
        save_file({"images": images, "logits": logits(model, images)}, root / kind / "answers.safetensors")


def read(root: Path) -> float:
    """Open what `write` wrote by two doors, and say how far any answer lies from what it was."""
    doors = (checkpoint.load, AutoModelForImageClassification.from_pretrained)
    saved = {kind: load_file(root / kind / "answers.safetensors") for kind in KINDS}
    return max(distance(door(root / kind), saved[kind]) for kind in KINDS for door in doors)


def respelled(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Spell a name as the releases do that are not this one: newer or older."""
    newer = older = name
    for old, new in pairs:
        newer = newer.replace(old, new)
    for old, new in reversed(pairs):
        older = older.replace(new, old)
    return newer if newer != name else older


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_another_release_stated_are_said_in_the_names_of_this_one(kind: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / kind / "config.json"
    config = json.loads(path.read_text())
    pairs, stated = RENAMED[kind], config["lfrns"]
    shapes = {respelled(name, pairs): shape for name, shape in stated["shapes"].items()}
    assert shapes.keys() != stated["shapes"].keys()
    attrs = {respelled(name, pairs): values for name, values in stated["attrs"].items()}
    # The newer spelling states heads at the attention, the older one module deeper, with their width in all.
    for name in [name for name, values in attrs.items() if "num_attention_heads" in values]:
        values = attrs.pop(name)
        deeper = "all_head_size" not in values
        size = (
            next(shape[0] for owner, shape in shapes.items() if owner.endswith("attention.query.weight"))
            if deeper
            else 0
        )
        values = {"num_attention_heads": values["num_attention_heads"], **({"all_head_size": size} if deeper else {})}
        attrs[f"{name}.attention" if deeper else name.removesuffix(".attention")] = values
    path.write_text(
        json.dumps({**config, "transformers_version": "5.1.2", "lfrns": {**stated, "shapes": shapes, "attrs": attrs}})
    )
    assert read(tmp_path) <= 1e-6


def test_a_part_that_has_no_name_here_is_refused_by_both_releases(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "vit" / "config.json"
    text = path.read_text().replace("vit.layers.", "vit.steps.").replace("vit.encoder.layer.", "vit.steps.")
    path.write_text(json.dumps({**json.loads(text), "transformers_version": "5.1.2"}))
    here = transformers.__version__.replace(".", r"\.")
    with pytest.raises(
        ValueError, match=rf"written by transformers 5\.1\.2, and its vit\.steps\.0.* no name in {here}"
    ):
        checkpoint.load(path.parent)


@pytest.mark.skipif("LFRNS_OTHER_PYTHON" not in os.environ, reason="needs a second environment: make test-floors")
def test_what_either_environment_wrote_opens_in_the_other(tmp_path: Path) -> None:
    def other(what: str, folder: Path) -> str:
        command = [os.environ["LFRNS_OTHER_PYTHON"], __file__, what, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    other("write", tmp_path / "theirs")
    write(tmp_path / "ours")
    assert read(tmp_path / "theirs") <= 1e-6
    assert float(other("read", tmp_path / "ours")) <= 1e-6


def test_what_typer_raises_of_bad_arguments_tells_it_in_one_line() -> None:
    assert callable(command_error().format_message)


if __name__ == "__main__":
    torch.manual_seed(0)
    print({"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2])))
