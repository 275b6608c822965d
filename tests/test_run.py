"""`lfrns run`: a script runs as python runs it and opens slim checkpoints, and timm's validation counts as the record.

timm's own validate.py and train.py are run where TIMM_REPOSITORY names a clone of its repository.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from children import run_script
from hub_server import hub
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch.utils.data import DataLoader

import lfrns_hub as lfrns
from lfrns_hub.measure import Record
from lfrns_hub.zoo import load_data, make_transform

__all__ = ["hub"]
ROOT = Path(__file__).parents[1]
LFRNS = ROOT / "lfrns_hub" / "__main__.py"
# Numbered by timm as written here; by torchvision as Maple, kind 1, kind 10, kind 2, ...
CLASSES = [f"kind {number}" for number in range(1, 11)] + ["Maple"]

ECHO = """
import signal
import sys
import neighbour
print(__name__, __file__, sys.argv, sys.path[0], neighbour.VALUE)
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.modules["__main__"].neighbour is neighbour)
if "--raise" in sys.argv:
    raise ValueError("what the script has to say")
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Start processes as a terminal does, also where this one runs in the background, whose jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that says how it was run, with a module beside it."""
    (tmp_path / "neighbour.py").write_text("VALUE = 5\n")
    (tmp_path / "echo.py").write_text(ECHO)
    return tmp_path / "echo.py"


def python(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """Run python in a folder, where this checkout can be imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    typed = [sys.executable, *map(str, arguments)]
    return subprocess.run(typed, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def test_a_script_runs_as_python_runs_it(script: Path) -> None:
    typed = (script, "--help", "-m", "--json", "--", "two words")
    plain, ours = python(*typed, folder=ROOT), run_script(LFRNS, "run", *typed)
    assert "'--help', '-m', '--json', '--', 'two words'" in plain.stdout and "True" in plain.stdout
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, plain.stderr, 7)


def test_a_module_runs_as_python_runs_it(script: Path) -> None:
    typed = ("-m", "echo", "--help")
    plain, ours = (python(*start, *typed, folder=script.parent) for start in ((), (LFRNS, "run")))
    assert plain.stdout.startswith("__main__") and f"{script.parent} 5" in plain.stdout
    assert (ours.stdout, ours.returncode) == (plain.stdout, 7)


def test_an_error_of_the_script_keeps_its_traceback(script: Path) -> None:
    done = run_script(LFRNS, "run", script, "--raise")
    assert done.returncode == 1
    assert f'File "{script}", line 8' in done.stderr
    assert done.stderr.endswith("ValueError: what the script has to say\n")


def draw_classes(root: Path, images: dict[str, int]) -> Path:
    """Class folders of images that can be told apart, mostly, in many sizes: `images` of each class in each split."""
    random = np.random.default_rng(0)
    for split, count in images.items():
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                height, width = random.integers(50, 150, 2)
                y, x = np.mgrid[:height, :width] * (0.1 + 0.02 * number)
                waves = 50 * np.sin(x * np.cos(number) + y * np.sin(number))[..., None]
                colour = 127 + 40 * np.cos([number, 2 * number, 3 * number]) + random.normal(0, 15, 3)
                pixels = colour + waves + random.normal(0, 40, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{image}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of two splits."""
    return draw_classes(tmp_path_factory.mktemp("images"), {"train": 12, "validation": 6})


def trained(name: str, data: Path, epochs: int = 3) -> torch.nn.Module:
    """A model of timm as timm trains one, on the classes in timm's order."""
    torch.manual_seed(0)
    size = {"img_size": 64} if name == "test_vit" else {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    model = timm.create_model(name, num_classes=len(CLASSES), **size)
    config = resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    reading = {"use_prefetcher": False, "num_workers": 0, "device": torch.device("cpu"), "no_aug": True}
    loader = create_loader(create_dataset("", data, "train"), batch_size=12, is_training=True, **reading, **config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for pixels, labels in loader:
            torch.nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def slim(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slim checkpoint with the record of both models on the validation images."""
    dense, folder = trained(request.param, images), tmp_path_factory.mktemp(request.param) / "slim"
    data = {
        split: load_data(images, split, transform=make_transform(dense, train=False), model=dense)
        for split in ("train", "validation")
    }
    loader = DataLoader(data["train"], 32)
    model = lfrns.slim(dense, loader, macs=0.7, fcr_steps=0, progress=False).model
    record = lfrns.measure(model, DataLoader(data["validation"], 32), dense=dense, progress=False)
    lfrns.save(model, folder, record=record, label_names=data["train"].class_names)
    assert 25 < record.slim["top1_pct"] < 95  # so that another order of classes, or other pixels, would show
    return folder


VALIDATE = """
import json, sys
import timm, torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

top1 = {}
for name in sys.argv[2:]:
    model = timm.create_model(name, pretrained=True).eval()
    reading = {"use_prefetcher": False, "num_workers": 0, "device": torch.device("cpu")}
    dataset = create_dataset("", sys.argv[1], "validation")
    loader = create_loader(dataset, batch_size=32, **reading, **resolve_model_data_config(model))
    with torch.inference_mode():
        hits = [model(images).argmax(1) == labels for images, labels in loader]
    top1[name] = [100 * torch.cat(hits).double().mean().item(), len(torch.cat(hits))]
print(json.dumps(top1))
"""


def test_a_script_of_timm_counts_as_the_record_does(slim: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(VALIDATE)
    done = run_script(LFRNS, "run", tmp_path / "check.py", images, f"local-dir:{slim}")
    assert done.returncode == 0, done.stderr
    counted = Record.load(slim / "record.json").slim
    ((top1_pct, count),) = json.loads(done.stdout).values()
    assert (top1_pct, count) == (pytest.approx(counted["top1_pct"], abs=1e-9), counted["images"])


@pytest.mark.hub
def test_a_script_of_timm_opens_a_slim_model_on_the_hub(hub, images: Path, tmp_path: Path) -> None:
    lfrns.save(timm.create_model("test_vit", img_size=64, num_classes=len(CLASSES)), tmp_path / "slim")
    (tmp_path / "check.py").write_text(f"import lfrns_hub\nlfrns_hub.push('slim', 'tester/slim')\n{VALIDATE}")
    done = subprocess.run(
        [sys.executable, LFRNS, "run", "check.py", images, "hf-hub:tester/slim", "local-dir:slim"],
        env={**os.environ, **hub.env, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout).values()
    assert there == here and here[1] == 6 * len(CLASSES)


def timm_script(name: str) -> Path:
    """A script in a clone of timm's repository; the test is skipped without one."""
    path = Path(os.environ.get("TIMM_REPOSITORY", "")) / name
    if "TIMM_REPOSITORY" not in os.environ or not path.is_file():
        pytest.skip(f"TIMM_REPOSITORY names no clone of timm's repository, which holds {name}")
    return path


def validated(slim: Path, images: Path, *more: str) -> float:
    """The top-1 of timm's own validate.py."""
    typed = ("--data-dir", images, "--model", f"local-dir:{slim}", "--device", "cpu", "-b", 16, "-j", 0, *more)
    done = run_script(LFRNS, "run", timm_script("validate.py"), *typed)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("--result\n")[2])["top1"]


def test_timms_own_validation_counts_as_the_record_does(slim: Path, images: Path) -> None:
    counted = Record.load(slim / "record.json").slim["top1_pct"]
    assert validated(slim, images) == pytest.approx(counted, abs=1e-4)  # it rounds to four digits


def test_what_timms_own_training_saves_is_opened_measured_and_saved_again(
    slim: Path, images: Path, tmp_path: Path
) -> None:
    typed = ("--data-dir", images, "--model", f"local-dir:{slim}", "--pretrained", "--device", "cpu", "-b", 12, "-j", 0)
    typed += ("--epochs", 1, "--warmup-epochs", 0, "--opt", "adamw", "--lr", 1e-3)
    done = run_script(LFRNS, "run", timm_script("train.py"), *typed, "--output", tmp_path, "--experiment", "out")
    assert done.returncode == 0, done.stderr
    best = tmp_path / "out" / "model_best.pth.tar"
    header, last = (tmp_path / "out" / "summary.csv").read_text().split()
    told = dict(zip(header.split(","), map(float, last.split(",")), strict=True))["eval_top1"]
    assert validated(slim, images, "--checkpoint", str(best)) == pytest.approx(told, abs=1e-4)
    model = lfrns.load(slim)
    timm.models.load_checkpoint(model, str(best))
    lfrns.save(model, tmp_path / "again")
    data = load_data(images, "validation", transform=make_transform(model, train=False), model=model)
    record = lfrns.measure(lfrns.load(tmp_path / "again"), DataLoader(data, 32), progress=False)
    assert record.slim["top1_pct"] == pytest.approx(told, abs=1e-4)


def test_folders_that_torchvision_numbers_differently_are_numbered_as_timm_does_and_that_is_said(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=len(CLASSES))
    transform = make_transform(model, train=False)
    with caplog.at_level(logging.WARNING):
        data = load_data(images, "validation", transform=transform, model=model)
    assert data.class_names == CLASSES == list(create_dataset("", images, "validation").reader.class_to_idx)
    assert "class 0 is 'kind 1', as timm numbers folders, and not 'Maple', as torchvision does" in caplog.text
    caplog.clear()
    (tmp_path / "classes.txt").write_text("\n".join(sorted(CLASSES)))
    data = load_data(images, "validation", transform=transform, model=model, class_map=tmp_path / "classes.txt")
    assert data.class_names == sorted(CLASSES) and not caplog.text
