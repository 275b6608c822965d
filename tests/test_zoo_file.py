"""The yaml file of `lfrns zoo`: what is read from it, and what each mistake in it is answered with."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import pytest

from lfrns_cli.options import Budget, Preprocessing
from lfrns_cli.zoo_file import (
    Data,
    Device,
    Latency,
    Model,
    Pruning,
    Run,
    Runtime,
    Training,
    Zoo,
    read,
    read_zoo,
    settings_of,
)
from lfrns_hub.runtimes import bench

LEAST = "out: zoo\nbudgets: [0.5]\ndata: digits\nmodels: [resnet50]\n"


def write(folder: Path, text: str) -> str:
    """Write a file."""
    (folder / "zoo.yaml").write_text(text, encoding="utf-8")
    return str(folder / "zoo.yaml")


def test_sections_are_common_or_a_models_own_and_paths_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "my.pth").touch()
    (tmp_path / "names.txt").touch()
    plan = read_zoo(
        write(
            tmp_path,
            """
out: made
budgets: [0.75, {macs: 0.5, params: 0.4}, {latency: 0.6}]
data: {path: pictures, val_split: 0.1, class_map: names.txt}
training: {epochs: 0, learning_rate: 1e-4}
models:
  - google/vit-base-patch16-224
  - {model: "my.nets:build", name: mine, weights: my.pth, license: mit, training: {epochs: 2}, budgets: [1]}
""",
        )
    )
    first, second = plan.runs
    assert plan.out == tmp_path / "made" and [run.name for run in plan.runs] == ["vit-base-patch16-224", "mine"]
    assert first.budgets == [Budget(macs=0.75), Budget(macs=0.5, params=0.4), Budget(latency=0.6)]
    assert (first.data.path, first.data.class_map) == (str(tmp_path / "pictures"), str(tmp_path / "names.txt"))
    assert (first.training.epochs, first.training.learning_rate, first.weights) == (0, 1e-4, None)
    assert (second.training.epochs, second.training.learning_rate) == (2, None)
    assert (second.weights, second.license, second.budgets) == (str(tmp_path / "my.pth"), "mit", [Budget(macs=1.0)])
    assert read(Run, json.loads(json.dumps(asdict(second))), "run") == second
    assert not settings_of(second).keys() & {"license", "budgets"} and "device" not in settings_of(second)["machine"]
    assert get_args(Runtime) == bench.RUNTIMES


def test_the_file_on_the_page_is_read_and_the_page_names_every_key(repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs" / "zoo.md").read_text(encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "my.pth").touch()
    plan = read_zoo(write(tmp_path, page.partition("```yaml\n")[2].partition("```")[0]))
    assert [run.name for run in plan.runs] == ["resnet50", "mine"] and plan.zoo.collection
    table = page.partition("## What the file may hold")[2].partition("## What happens")[0]
    sections = (Zoo, Model, Data, Training, Pruning, Latency, Device, Budget, Preprocessing)
    names = {one.name for section in sections for one in fields(section)}
    assert not [name for name in names if f"`{name}`" not in table]


def test_the_benchmarks_file_is_read(repository: Path, shared: Path) -> None:
    plan = read_zoo(str(repository / "benchmarks" / "zoo.yaml"))
    assert [len(run.budgets) for run in plan.runs] == [2] * 4
    assert plan.out == repository / "out" / "zoo" and all(Path(run.data.path).is_dir() for run in plan.runs)


MISTAKES = {
    # the file: what the answer says
    "": ("the file None", "keys with their values"),
    "a: [": ("is no YAML that can be read", "Mend it"),
    "out: z": ("models: is missing",),
    f"{LEAST}traning: 3": ("traning 3: there is no such key", "Did you mean training?"),
    f"{LEAST}training: {{epochs: ten}}": ("training.epochs 'ten'", "a whole number"),
    f"{LEAST}training: {{epochs: -1}}": ("training.epochs -1", "at least 0"),
    f"{LEAST}training: {{epochs: true}}": ("training.epochs True", "a whole number"),
    f"{LEAST}training: {{learning_rate: 0}}": ("training.learning_rate 0", "above 0"),
    f"{LEAST}training: {{batch_size: 0}}": ("training.batch_size 0", "at least 1"),
    f"{LEAST}pruning: {{preset: mine}}": ("pruning.preset 'mine'", "ours, paper"),
    f"{LEAST}pruning: {{calibration_images: 0}}": ("pruning.calibration_images 0", "at least one image"),
    f"{LEAST}preprocessing: {{mean: [1, 2]}}": ("preprocessing.mean [1, 2]", "a list of 3 numbers"),
    f"{LEAST}machine: {{mixed_precision: no}}": ("machine.mixed_precision False", "in quotes"),
    f"{LEAST}seed: 99999999999": ("seed 99999999999", "from 0 to 4294967295"),
    f"{LEAST}runtimes: [fast]": ("runtimes[0] 'fast'", "eager, compiled, onnxruntime"),
    f"{LEAST}runtimes: eager": ("runtimes 'eager'", "a list"),
    f"{LEAST}private: true": ("private True", "Add push_to_hub"),
    f"{LEAST}collection: Mine": ("collection Mine", "Add push_to_hub"),
    f"{LEAST}push_to_hub: me/net": ("push_to_hub me/net", "alone"),
    f"{LEAST}latency: {{batch: 0}}": ("latency.batch 0", "at least 1"),
    f"{LEAST}out: other": ("line 5: out stands there for the second time",),
    LEAST.replace("[0.5]", "[50]"): ("budgets[0].macs 50", "For 50 % pass 0.5"),
    LEAST.replace("[0.5]", "[{}]"): ("budgets[0]: names nothing to keep",),
    LEAST.replace("[0.5]", "[0.5, 0.500001]"): ("budgets[1]", "stands there twice"),
    LEAST.replace("budgets: [0.5]\n", ""): ("models[0].budgets: is missing",),
    LEAST.replace("data: digits\n", ""): ("models[0].data: is missing",),
    LEAST.replace("digits", "{path: digits, val_split: 10}"): ("data.val_split 10", "pass 0.1"),
    LEAST.replace("digits", "../not/here"): ("data.path ../not/here: there is no such folder",),
    LEAST.replace("digits", "{path: digits, class_map: gone.txt}"): ("data.class_map gone.txt: there is no such file",),
    LEAST.replace("[resnet50]", "[]"): ("models []", "at least one"),
    LEAST.replace("[resnet50]", "[{modle: x}]"): ("models[0].modle 'x'", "Did you mean model?"),
    LEAST.replace("[resnet50]", "[{name: x}]"): ("models[0].model: is missing",),
    LEAST.replace("[resnet50]", "[./x]"): ("models[0].model ./x: there is no such folder",),
    LEAST.replace("[resnet50]", "[resnet50, Resnet50]"): ("models[1].name Resnet50", "of its own"),
    LEAST.replace("[resnet50]", "[{model: x, name: a/b}]"): ("models[0].name 'a/b'", "letters"),
    LEAST.replace("[resnet50]", "[{model: x, weights: gone.pth}]"): ("models[0].weights gone.pth", "no such file"),
    LEAST.replace("[resnet50]", "[{model: x, license: Mine!}]"): ("models[0].license Mine!", "apache-2.0"),
    LEAST.replace("[resnet50]", "[{model: x, budgets: [0.5, {latency: 3}]}]"): ("models[0].budgets[1].latency 3",),
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES, ids=[parts[0] for parts in MISTAKES.values()])
def test_each_mistake_is_one_sentence_with_the_key_and_its_value(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as raised:
        read_zoo(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ") and len(said.splitlines()) == 1
    for part in MISTAKES[text]:
        assert part in said
