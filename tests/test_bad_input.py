"""The table of bad input: what each call answers, and that nothing is lost or half-written by it.

A row has the call, and of its message the value, the rule and the way out. After each one the models (weights, modes,
hooks, gradients) and every file of the place are as they were, and no file is new.
"""

import copy
import hashlib
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_checkpoint import MyNet, cut_pair
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub import checkpoint
from lfrns_hub.measure import Record, evaluate
from lfrns_hub.runtimes.bench import bench
from lfrns_hub.runtimes.export import export
from lfrns_hub.surgery import cut
from lfrns_hub.zoo import (
    check_images,
    create_base,
    create_dense,
    guard_against_chance,
    load_data,
    set_preprocessing,
)


class Net(nn.Module):
    """Two convolutions and five classes, for images [N, 3, 8, 8]."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images).relu()).relu().mean((2, 3)))


IMAGES, LABELS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
NAN = IMAGES.clone()
NAN[2, 0, 0, 0] = float("nan")


def loader(images: Tensor = IMAGES, labels: Tensor = LABELS) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models, and a place with a checkpoint, damaged copies of it, weights, data of several kinds."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    net, other = Net(), Net()
    other.head = nn.Linear(12, 4)
    slim = timm.create_model("test_vit", depth=1, img_size=32, num_classes=3)
    cut_pair(slim.blocks[0].mlp.fc1, slim.blocks[0].mlp.fc2, [0, 2, 5])
    good = checkpoint.save(slim, root / "good")
    own = MyNet()
    cut_pair(own.first, own.second, [1, 5, 6])
    own.hidden = 3
    checkpoint.save(own, root / "own", base=MyNet())
    for name in ("half", "newer", "unknown", "bare", "wide", "linked", "recordless"):
        shutil.copytree(good, root / name)
    weights = (good / "model.safetensors").read_bytes()
    (root / "half" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "bare" / "model.safetensors").unlink()
    (root / "linked" / "record.json").symlink_to(root / "mine.txt")
    for name, change in {
        "newer": lambda config: config["slim"].update(format_version=99),
        "unknown": lambda config: config["model_args"].update(base="resnet5O"),
        "wide": lambda config: config["model_args"]["shapes"].update({"norm.weight": [10**9]}),
    }.items():
        config = json.loads((root / name / "config.json").read_text())
        change(config)
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "recordless" / "record.json").write_text('{"slim": 3}')
    (root / "mine.txt").write_text("mine")
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("mine")
    (root / "text.pth").write_text("no weights")
    state = timm.create_model("cifar_resnet20").state_dict()
    save_file(state, root / "resnet20.safetensors")
    for name, classes in (("twelve", 12), ("broken", 10), ("ruined", 2), ("numbers", 0)):
        for split in ("train", "validation"):
            for i in range(12):
                path = root / name / split / f"class{i % classes:02}" / f"{i}.png" if classes else None
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(path)
                    if name == "ruined" or (name == "broken" and i != 5):
                        path.write_text("no picture")
    (root / "numbers").mkdir()
    (root / "numbers" / "train-0.parquet").write_text("no parquet")
    (root / "my_nets.py").write_text("def five():\n    return 5\n")
    return SimpleNamespace(root=root, net=net, other=other, slim=slim, groups=lfrns.find_units(net, IMAGES[:1]))


def files_of(root: Path) -> dict[str, str]:
    """Every file and link below a folder, with a hash of what it holds; caches of bytecode do not count."""
    found = {}
    for path in sorted(root.rglob("*")):
        if "__pycache__" not in path.parts and not path.is_dir():
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a call must not change in a model."""
    weights = b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in model.state_dict().values())
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "places": [str(p.device) for p in model.parameters()],
    }


def assert_says(message: str, value: str, rule: str, way_out: str) -> None:
    """A message is one line that has all three parts."""
    for part in (value, rule, way_out):
        assert re.search(part, message), f"{part!r} is not in {message!r}"
    assert "\n" not in message.strip()
    assert len(message) < 2000


def slim(**options: Any) -> Callable[[SimpleNamespace], Any]:
    """A row's call: slim the small network."""
    batches = options.pop("batches", None)
    return lambda at: lfrns.slim(at.net, loader() if batches is None else batches, progress=False, **options)


def retrain(**options: Any) -> Callable[[SimpleNamespace], Any]:
    """A row's call: retrain the small network."""
    batches = options.pop("batches", None)
    return lambda at: lfrns.retrain(at.net, loader() if batches is None else batches, progress=False, **options)


def data(name: str, split: str = "train", **options: Any) -> Callable[[SimpleNamespace], Any]:
    """A row's call: load data of the place and read all of it."""

    def read(at: SimpleNamespace) -> None:
        where = name if name in ("digits", "nowhere") else at.root / name
        pictures = load_data(where, split, transform=lambda picture: picture, **options)
        for index in range(len(pictures)):
            pictures[index]

    return read


F, T, V = FileNotFoundError, TypeError, ValueError
LATENCY = lfrns.LatencySetup(batch=2)
API = {
    # name: call, error, value, rule, way out
    "macs in percent": (slim(macs=50), V, r"slim\(macs=50\)", r"must be in \(0, 1\]", "For 50 % pass 0.5"),
    "params of zero": (slim(params=0), V, r"slim\(params=0\)", r"must be in \(0, 1\]", "pass 0.5"),
    "macs below zero": (slim(macs=-0.5), V, r"slim\(macs=-0\.5\)", r"must be in \(0, 1\]", "pass 0.5"),
    "macs not a number": (slim(macs=float("nan")), V, r"slim\(macs=nan\)", r"must be in \(0, 1\]", "pass 0.5"),
    "macs as text": (slim(macs="half"), V, r"slim\(macs=half\)", r"must be in \(0, 1\]", "pass 0.5"),
    "macs as truth": (slim(macs=True), V, r"slim\(macs=True\)", r"must be in \(0, 1\]", "pass 0.5"),
    "no budget": (slim(), V, r"slim\(\)", "needs a budget", "macs=0.5"),
    "latency in percent": (slim(latency=50), V, r"slim\(latency=50\)", "time of a forward pass", "pass 0.5"),
    "a setup alone": (slim(macs=0.5, latency_setup=LATENCY), V, "latency=None", "how the budget", "Pass both"),
    "another setup": (slim(latency=0.5, latency_setup=8), V, "latency_setup=8", "a LatencySetup", "Pass both"),
    "out of reach": (slim(macs=0.001), V, r"\{'macs': 0\.001\}|macs=0\.001", "not reachable", "Ask for more"),
    "unknown kind": (slim(macs=0.5, kinds=("filter",)), V, r"\['filter'\]", "kinds are channel, head, neuron", "Leave"),
    "a kind alone": (slim(macs=0.5, kinds="head"), V, "kinds=head", "a list", r"kinds=\['head'\]"),
    "no head here": (slim(macs=0.5, kinds=("head",)), V, "first: not chosen", "no prunable unit", "See find_units"),
    "unknown preset": (slim(macs=0.5, preset="mine"), V, "preset='mine'", "'ours' and 'paper'", "Leave it out"),
    "unknown widths": (slim(macs=0.5, widths="thin"), V, "widths='thin'", "'global' or 'uniform'", "Leave it out"),
    "min_keep of zero": (slim(macs=0.5, min_keep=0), V, "min_keep=0", "at least one unit", "default is 1"),
    "min_keep of a half": (slim(macs=0.5, min_keep=0.5), V, r"min_keep=0\.5", "whole number", "default is 1"),
    "unknown distance": (slim(macs=0.5, distance="far"), V, "distance='far'", "'functional'", "or a function"),
    "unknown contribution": (slim(macs=0.5, contribution="x"), V, "contribution='x'", "'fcr'", "or a function"),
    "pattern of nothing": (slim(macs=0.5, groups=["x.*"]), V, r"'x\.\*'", "matches no group", "has first, second"),
    "a pattern alone": (slim(macs=0.5, groups="first"), V, "groups=first", "a list", r"groups=\['first'\]"),
    "exclude of nothing": (slim(macs=0.5, exclude=["x"]), V, "'x'", "matches no group", "has first, second"),
    "steps below zero": (slim(macs=0.5, fcr_steps=-1), V, "fcr_steps=-1", "whole number from 0", "0: no gate"),
    "rounding to zero": (slim(macs=0.5, round_to=0), V, "round_to=0", "whole number from 1", "1 rounds nothing"),
    "no images": (slim(macs=0.5, batches=[]), V, "slim.loader", "empty", "Give at least"),
    "no loader": (slim(macs=0.5, batches=5), T, "loader=int", "yields batches", "DataLoader"),
    "a batch of text": (slim(macs=0.5, batches=["x"]), V, "a batch is a str", "yield", "bare images"),
    "a dict without images": (slim(macs=0.5, batches=[{"x": 1}]), V, r"\['x'\]", "must come as", "pixel_values"),
    "NaN in images": (slim(macs=0.5, batches=[NAN]), V, "1 of 8 images", "not finite", "Look at what prepares"),
    "images of two channels": (
        slim(macs=0.5, batches=[IMAGES[:, :2]]), V, r"\[1, 2, 8, 8\]", "itself raises Runtime", "must run on images",
    ),
    "labels out of range": (
        slim(macs=0.8, fcr_steps=1, batches=[(IMAGES, LABELS + 3)]), V, r"from \d to 7", r"in \[0, 5\)", "a head",
    ),
    "fewer labels than images": (
        slim(macs=0.5, batches=[(IMAGES, LABELS[:3])]), V, "8 images and 3 labels", "one label", "Give",
    ),
    "labels that are fractions": (
        slim(macs=0.8, fcr_steps=1, batches=[(IMAGES, LABELS / 2)]), V, "float32", "class numbers", "problem_type",
    ),
    "a name for a model": (
        lambda at: lfrns.slim("resnet50", loader(), macs=0.5), T, r"slim\(str\)", "Module is needed", "create_model",
    ),
    "a model without values": (
        lambda at: lfrns.slim(copy.deepcopy(at.net).to("meta"), loader(), macs=0.5), V, "first.weight", "no values",
        "Load weights first",
    ),
    "an example that is no image": (
        lambda at: lfrns.find_units(at.net, [1]), V, "example_input=list", "images", "such as torch.zeros",
    ),
    "plan of an unknown group": (
        lambda at: cut(at.net, at.groups, lfrns.SlimPlan({"third": [0]})), V, "'third'", "none of this name", "List",
    ),
    "plan of a frozen group": (
        lambda at: cut(at.net, at.groups, lfrns.SlimPlan({"head": [0]})), V, "'head'", "frozen", "Leave it out",
    ),
    "plan beyond a group": (
        lambda at: cut(at.net, at.groups, lfrns.SlimPlan({"first": [3, 16]})), V, "'first'.* 16", "ascend within",
        "List the groups",
    ),
    "plan that is none": (
        lambda at: lfrns.SlimPlan.from_json('{"keep": {"a": "01"}}'), V, "keep", "a plan reads", "SlimPlan.to_json",
    ),
    "record that is none": (
        lambda at: Record.from_json('{"x": 1}'), V, "'x'", "has the keys dense, slim, setup", "Is it record.json",
    ),
    # retrain
    "a list to train on": (retrain(batches=[IMAGES]), T, "loader=list", "DataLoader is needed", "Wrap the images"),
    "nothing to train on": (
        retrain(batches=DataLoader(TensorDataset(IMAGES[:2]), 4, drop_last=True)), V, "2 images", "empty",
        "lower batch",
    ),
    "epochs below zero": (retrain(epochs=-1), V, "epochs=-1", "0 or more", "default is 3"),
    "half an epoch": (retrain(epochs=0.5), V, r"epochs=0\.5", "0 or more", "default is 3"),
    "its own teacher": (
        lambda at: lfrns.retrain(at.net, loader(), teacher=at.net), V, "teacher=model", "cannot teach",
        "Pass the dense",
    ),
    "a teacher of other classes": (
        lambda at: lfrns.retrain(at.net, loader(), teacher=at.other, progress=False), V, "4 classes", "the model has 5",
        "Teach with",
    ),
    "warm-up in percent": (retrain(warmup_fraction=10), V, "warmup_fraction=10", r"in \[0, 1\)", "pass 0.1"),
    "smoothing below zero": (retrain(label_smoothing=-1), V, "label_smoothing=-1", r"in \[0, 1\)", "pass 0.1"),
    "distillation beyond one": (retrain(distill_weight=2), V, "distill_weight=2", r"in \[0, 1\]", "pass 0.1"),
    "temperature of zero": (retrain(temperature=0), V, "temperature=0", "above 0", "default is 4"),
    "unknown optimizer": (retrain(optimizer="lamb"), V, 'optimizer="lamb"', "it must be", '"sgd" or "adamw"'),
    "rate of zero": (retrain(learning_rate=0), V, "learning_rate=0", "above 0", "None takes the default"),
    "accumulation of zero": (
        retrain(gradient_accumulation_steps=0), V, "accumulation_steps=0", "1 or more", "default is 1",
    ),
    "classes that the model has not": (
        retrain(batches=loader(labels=LABELS + 3)), V, "labels from", r"in \[0, 5\)", "a head that fits",
    ),
    "NaN to train on": (
        retrain(batches=loader(NAN)), FloatingPointError, "loss is nan at step 1", "learning_rate=", "look for images",
    ),
    "no labels and no teacher": (
        retrain(batches=DataLoader(IMAGES, 4)), V, "without labels", r"Yield \(images, labels\)", "pass the dense",
    ),
    # measure
    "nothing to evaluate on": (
        lambda at: evaluate(at.net, [], progress=False), V, "no image", "is empty", "Check the folder",
    ),
    "no labels to evaluate by": (
        lambda at: evaluate(at.net, [IMAGES], progress=False), V, "without labels", "accuracy needs", r"Yield \(images",
    ),
    "labels beyond the model": (
        lambda at: evaluate(at.net, loader(labels=LABELS + 3), progress=False), V, "labels from 3", r"in \[0, 5\)",
        "a head",
    ),
    "NaN to evaluate on": (
        lambda at: evaluate(at.net, loader(NAN), progress=False), V, "1 of 4 images", "not finite", "Look at what",
    ),
    "a head that does not fit the data": (
        lambda at: guard_against_chance(at.net, loader(labels=LABELS + 3), "DIR"), V, "DIR holds label", "5 classes",
        "Fine-tune",
    ),
    "images of another size of pixels": (
        lambda at: check_images(at.net, [IMAGES.to(torch.uint8)]), V, "torch.uint8", r"takes \[N, 3, 8, 8\]",
        "Make them",
    ),
    "images of one channel": (
        lambda at: check_images(at.net, [IMAGES[:, :1]]), V, "1 channels", r"takes \[N, 3, 8, 8\]", "Make them",
    ),
    "NaN to check": (lambda at: check_images(at.net, [NAN]), V, "1 of 8", "not finite", "Look at what prepares"),
    # checkpoints
    "a folder that is full": (
        lambda at: lfrns.save(at.slim, at.root / "full"), FileExistsError, "full", "not empty", "overwrite=True",
    ),
    "a file for a folder": (
        lambda at: lfrns.save(at.slim, at.root / "mine.txt"), FileExistsError, "mine.txt", "exists", "a new name",
    ),
    "a file for a parent folder": (
        lambda at: lfrns.save(at.slim, at.root / "mine.txt" / "x"), OSError, "mine.txt", "cannot be written", "Name a",
    ),
    "overwriting a file": (
        lambda at: lfrns.save(at.slim, at.root / "mine.txt", overwrite=True), FileExistsError, "mine.txt", "is a file",
        "Name a folder",
    ),
    "too few label names": (
        lambda at: lfrns.save(at.slim, at.root / "new", label_names=["a"]), V, "label_names of 1", "3 classes",
        "Name each",
    ),
    "a base that is none": (
        lambda at: lfrns.save(at.slim, at.root / "new", base="resnet5O"), V, "base='resnet5O'", "no such timm model",
        "pass",
    ),
    "a base that takes other arguments": (
        lambda at: lfrns.save(at.slim, at.root / "new", base="test_resnet"), V, "base='test_resnet'", "build no model",
        "Give the base",
    ),
    "a base of other layers": (
        lambda at: lfrns.save(timm.create_model("test_resnet"), at.root / "new", base="cifar_resnet20"), V, "describe",
        "not in both", "Give the base",
    ),
    "no folder and no id": (lambda at: lfrns.load("a/b/c"), F, "a/b/c", "neither a folder nor a Hub id", "user/name"),
    "a Hub that is off": (
        lambda at: lfrns.load("user/none"), ConnectionError, "user/none", "cannot be reached", "Give a local folder",
    ),
    "a folder of something else": (
        lambda at: lfrns.load(at.root / "full"), V, "full", "no config.json", "Give a folder",
    ),
    "no weights": (lambda at: lfrns.load(at.root / "bare"), V, "bare", "no model.safetensors", "save the model again"),
    "half-downloaded weights": (
        lambda at: lfrns.load(at.root / "half"), V, "half", "model.safetensors cannot be read", "download it again",
    ),
    "a newer format": (lambda at: lfrns.load(at.root / "newer"), V, "99", "reads 1", "upgrade lfrns_hub"),
    "an unknown base": (
        lambda at: lfrns.load(at.root / "unknown"), V, "resnet5O", "not a model of this timm", "upgrade timm",
    ),
    "sizes beyond the base": (
        lambda at: lfrns.load(at.root / "wide"), V, "1000000000", "from 1 to the base's own", "download it again",
    ),
    "one's own class without it": (
        lambda at: lfrns.load(at.root / "own"), V, "MyNet", "neither timm nor transformers", r"model=MyNet\(\)",
    ),
    "one's own class with another": (
        lambda at: lfrns.load(at.root / "own", model=nn.Linear(2, 2)), V, r"model=Linear", "no such", "again",
    ),
    "a push of something else": (
        lambda at: lfrns.push(at.root / "full", "user/name"), F, "full", "no config.json", "Push a folder",
    ),
    "a push by two ways": (
        lambda at: lfrns.push(at.root / "good", "user/name", revision="b", create_pr=True), V, "revision='b'",
        "default branch", "Give only one",
    ),
    "a push to no id": (
        lambda at: lfrns.push(at.root / "good", "no spaces"), V, "no spaces", "Repo id", "form user/name",
    ),
    "a push of a link": (
        lambda at: lfrns.push(at.root / "linked", "user/name"), V, "record.json", "leads out of the folder",
        "remove it",
    ),
    "an export to no format": (
        lambda at: export(at.net, at.root / "new.tflite", IMAGES, format="tflite"), V, "'tflite'", "the formats are",
        "onnx",
    ),
    "an export to another name": (
        lambda at: export(at.net, at.root / "new.pt2", IMAGES, format="onnx"), V, "new.pt2", "must end in", r"\.onnx",
    ),
    "a bench of no batch": (
        lambda at: bench(at.net, at.net, IMAGES, batches=[0]), V, r"batches=\[0\]", "1 or more", r"as batches=\[1, 32",
    ),
    "no dense model": (lambda at: create_base(at.root / "own"), V, "own", "does not say", "--dense"),
    # models and data by name
    "a misspelt model": (lambda at: create_dense("resnet5O"), V, "resnet5O", "neither timm", "Near matches: resnet50"),
    "a misspelt tag": (lambda at: create_dense("resnet50.x"), V, "resnet50.x", "no such weights", "Near|a1_in1k|Give"),
    "weights that are gone": (
        lambda at: create_dense("cifar_resnet20", weights="gone.pth"), V, "gone.pth", "no such file", "Give a",
    ),
    "weights that are text": (
        lambda at: create_dense("cifar_resnet20", weights=at.root / "text.pth"), V, "text.pth", "no plain tensors",
        "Save",
    ),
    "weights of another model": (
        lambda at: create_dense("cifar_resnet56", weights=at.root / "resnet20.safetensors"), V, "resnet20.safetensors",
        "do not fit", "216 missing .* Give",
    ),
    "a function that is not there": (
        lambda at: create_dense("no_module:build"), V, "no_module:build", "cannot import", "Run where",
    ),
    "a crop in percent": (
        lambda at: set_preprocessing(copy.copy(at.net), crop_pct=87.5), V, r"crop_pct=87\.5", r"in \(0, 1\]", r"0\.875",
    ),
    "a deviation of zero": (
        lambda at: set_preprocessing(copy.copy(at.net), std=(0, 1, 1)), V, r"std=\(0, 1, 1\)", "above 0", "ImageNet's",
    ),
    "unknown interpolation": (
        lambda at: set_preprocessing(copy.copy(at.net), interpolation="cubic"), V, "'cubic'", "must be one of",
        "bicubic",
    ),
    "data that is not there": (data("nowhere"), V, "nowhere", "no such folder", "Give a folder"),
    "a split that is none": (data("digits", "trian"), V, "'trian'", "the splits are", "train, validation"),
    "no pictures at all": (data("digits", limit=0), V, "limit=0", "at least one", "pass None"),
    "a share in percent": (data("twelve", val_split=10), V, "val_split=10", r"in \(0, 1\)", "pass 0.1"),
    "a column that is none": (
        data("twelve", label_column="kind"), V, "'kind'", "no column", "It has image, label",
    ),
    "a class map that is gone": (
        data("twelve", class_map="gone.txt"), V, "gone.txt", "no such file", "names a class on each line",
    ),
    "parquet that is none": (data("numbers"), V, "numbers", "cannot be read as pictures", "Write|download|Check"),
    "a folder without splits": (data("full"), V, "found mine.txt", "must hold", "--val-split"),
    "more damage than allowed": (
        data("broken", max_unreadable=3), V, "4 of 12 pictures", "at most 3", "--max-unreadable",
    ),
    "only damage": (data("ruined"), V, "12 of 12 pictures", "cannot be read", "Mend or remove"),
    "damage below zero": (data("broken", max_unreadable=-1), V, "max_unreadable=-1", "0 or more", "With 0"),
}  # fmt: skip


@pytest.mark.parametrize("row", API)
def test_a_call_says_value_rule_and_way_out_and_leaves_all_as_it_was(
    row: str, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, error, *parts = API[row]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(made.root)
    models = (made.net, made.other, made.slim)
    before = [state_of(model) for model in models], files_of(made.root)
    with pytest.raises(error) as caught:
        call(made)
    assert_says(str(caught.value), *parts)
    assert ([state_of(model) for model in models], files_of(made.root)) == before


COMMANDS = {
    # arguments of lfrns: value, rule, way out
    "units resnet5O": ("resnet5O", "neither timm", "resnet50"),
    "units test_vit --jason": ("--jason", "No such option", "See --help"),
    "units": ("units", "Missing argument", "See --help"),
    "unit test_vit": ("unit test_vit", "No such command", "See --help"),
    "slim test_vit --data x --macs 0.5": ("slim test_vit", "Missing option '--out'", "See --help"),
    "slim test_vit --data x --out new --macs 0.5,50": ("--macs 0.5,50", r"in \(0, 1\]", "For 50 % pass 0.5"),
    "slim test_vit --data x --out new --macs half": ("--macs half", "numbers", "as 1,32 or 0.75,0.5"),
    "slim test_vit --data x --out new --params 50": (r"--params 50\.0", r"in \(0, 1\]", "For 50 % pass 0.5"),
    "slim test_vit --data x --out new --latency 50": (r"--latency 50\.0", r"in \(0, 1\]", "For 50 % pass 0.5"),
    "slim test_vit --data x --out new": ("lfrns slim", "must say how much", "--macs 0.5"),
    "slim test_vit --data x --out new --macs 0.5,0.3 --push-to-hub me/it": ("me/it", "2 budgets", "Give the user"),
    "slim test_vit --data x --out full --macs 0.5": ("full", "not empty", "--overwrite"),
    "slim test_vit --data x --out mine.txt --macs 0.5": ("mine.txt", "is a file", "Name a folder"),
    "slim test_vit --data x --out new --macs 0.5 --batch-size 0": (
        "--batch-size 0",
        "than or equal to 1",
        "See --help",
    ),
    "slim test_vit --data x --out new --macs 0.5 --epochs -1": ("--epochs -1", "than or equal to 0", "See --help"),
    "slim test_vit --data x --out new --macs 0.5 --max-unreadable -1": ("-1", "than or equal to 0", "See --help"),
    "slim cifar_resnet20 --data nowhere --out new --macs 0.5": ("nowhere", "no such folder", "Give a folder"),
    "slim cifar_resnet20 --data twelve --out new --macs 0.5": (r"12 classes \(class00", "answers 10", "--class-map"),
    "slim cifar_resnet20 --data twelve --out new --macs 0.5 --preset mine": ("mine", "one of|ours", "See --help"),
    "slim cifar_resnet20 --data broken --out new --macs 0.5 --max-unreadable 2": ("3 of 12", "at most 2", "Mend"),
    "slim cifar_resnet20 --data twelve --out new --macs 0.5 --crop-pct 87.5": (r"87\.5", r"in \(0, 1\]", "ImageNet"),
    "slim cifar_resnet20 --data twelve --out new --macs 0.5 --weights gone.pth": ("gone.pth", "no such file", "Give a"),
    "slim cifar_resnet20 --data broken --out new --macs 0.5 --calibration-images 0": (
        "--calibration-images 0",
        "at least one",
        "2000",
    ),
    "curve cifar_resnet20 --data twelve --macs 2": ("--macs 2", r"in \(0, 1\]", "For 2 % pass 0.02"),
    "retrain nowhere --data x": ("nowhere", "neither|cannot", "Give a|user/name"),
    "retrain full --data x": ("full", "no config.json", "Give a folder"),
    "evaluate half --data twelve": ("half", "cannot be read", "download it again"),
    "evaluate good --data twelve": (r"12 classes \(class00", "the model answers 3", "--class-map"),
    "retrain good --data twelve": (r"12 classes \(class00", "the model answers 3", "--class-map"),
    "evaluate good --data nowhere": ("nowhere", "no such folder", "Give a folder"),
    "bench bare": ("bare", "no model.safetensors", "save the model again"),
    "bench own": ("MyNet", "neither timm nor transformers", "--dense"),
    "bench good --batches x": ("--batches x", "numbers", "as 1,32"),
    "bench good --runs 0": ("--runs 0", "1 or more", "30"),
    "export good --format tflite": ("tflite", "onnx", "See --help"),
    "export unknown": ("resnet5O", "not a model", "upgrade timm"),
    "push full user/name": ("full", "no config.json", "Push a folder"),
    "push linked user/name": ("record.json", "leads out of", "remove it"),
    "push good user/name --revision b --pr": ("revision='b'", "default branch", "Give only one"),
    "demo --macs 50": ("50", r"in \(0, 1\]", "For 50 % pass 0.5"),
    "demo --output-dir full": ("full", "not empty", "--overwrite"),
}


def run_and_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, made: SimpleNamespace, call: Callable, *, lines: int | None = None
) -> str:
    """Make a call that ends the process; gives the last line of what it said, after nothing has changed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(made.root)
    before = files_of(made.root)
    with pytest.raises(SystemExit) as ended:
        call()
    printed = capsys.readouterr()
    said = printed.err.strip().splitlines()
    if lines is None:  # of argparse, with the usage in front
        assert ended.value.code in (1, 2)
    else:
        assert (ended.value.code, len(said)) == (1, lines), printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert files_of(made.root) == before
    return said[-1]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_command_says_value_rule_and_way_out_and_writes_nothing(
    arguments: str, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["lfrns", *arguments.split()])
    lines = None if arguments.startswith("demo") or "broken" in arguments else 1  # each damaged picture has a line
    assert_says(run_and_refuse(monkeypatch, capsys, made, cli.main, lines=lines), *COMMANDS[arguments])


RECIPES = {
    # recipe and its options: value, rule, way out
    "vit_digits --macs 50": ("50", r"in \(0, 1\]", "For 50 % pass 0.5"),
    "vit_digits --macs nan": ("nan", r"in \(0, 1\]", "For 50 % pass 0.5"),
    "vit_digits --output-dir full": ("full", "not empty", "Pass --resume"),
    "vit_digits --output-dir mine.txt": ("mine.txt", "is a file", "Name a folder"),
    "vit_digits --output-dir new --data-dir twelve": ("twelve", "ship with scikit-learn", "vit_cifar100.py"),
    "vit_digits --output-dir new --epochs -1": ("-1", "0 or more", "0 skips"),
    "vit_digits --output-dir new --dense-epochs half": ("half", "whole number", "0 skips"),
    "vit_digits --output-dir new --batch-size 0": ("0", "1 or more", "64"),
    "resnet56_cifar10 --output-dir full": ("full", "not empty", "Pass --resume"),
    "resnet56_cifar10 --output-dir new --model cifar_resnet21 --data-dir twelve": ("resnet21", "neither timm",
        "resnet20"),
    "vit_cifar100 --output-dir full": ("full", "not empty", "Pass --resume"),
    "vit_cifar100 --output-dir new --model resnet5O": ("resnet5O", "neither timm", "Near matches"),
    "vit_cifar100 --output-dir new --model cifar_resnet20 --data-dir nowhere": ("nowhere", "no such", "Give a folder"),
    "vit_cifar100 --output-dir new --model cifar_resnet20 --data-dir twelve --dense-epochs 0": (
        "--dense-epochs 0", "12 classes", "Fine-tune it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", RECIPES)
def test_a_recipe_says_value_rule_and_way_out_before_it_trains(
    arguments: str,
    made: SimpleNamespace,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    name, *options = arguments.split()
    script = str(repository / "recipes" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(lfrns, "retrain", lambda *_, **__: pytest.fail("it trains"))
    said = run_and_refuse(monkeypatch, capsys, made, lambda: runpy.run_path(script, run_name="__main__"))
    assert_says(said, *RECIPES[arguments])


def test_the_table_has_the_rows_that_are_promised() -> None:
    assert len(API) + len(COMMANDS) + len(RECIPES) >= 60


def test_what_a_row_must_leave_alone_is_noticed_when_it_changes(made: SimpleNamespace, tmp_path: Path) -> None:
    model = copy.deepcopy(made.net)
    before = state_of(model)
    assert state_of(model) == before
    for change in (
        lambda: model.train(not model.training),
        lambda: model.first.weight.data.add_(1),
        lambda: model.first.register_forward_hook(print),
        lambda: model.head.requires_grad_(False),
    ):
        change()
        assert state_of(model) != before
        before = state_of(model)
    assert files_of(tmp_path) == {}
    (tmp_path / ".draft").mkdir()
    (tmp_path / ".draft" / "x").write_text("x")
    assert list(files_of(tmp_path)) == [".draft/x"]
    with pytest.raises(AssertionError):
        assert_says("slim(macs=50): must be in (0, 1].", "macs=50", r"in \(0, 1\]", "For 50 % pass 0.5")
