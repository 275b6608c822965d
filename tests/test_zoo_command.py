"""`lfrns zoo`, `lfrns card` and what stops a push: real processes, and a local Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import Hub, hub, serve
from huggingface_hub import constants
from PIL import Image
from test_checkpoint import slim_resnet
from timm.models import save_for_hf
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub.checkpoint import render_card_again
from lfrns_hub.hub.lineage import facts_of_base, refuse_unlicensed
from lfrns_hub.hub.zoo_index import Row, read_rows, write_zoo_index
from lfrns_hub.measure import Record
from lfrns_hub.zoo import load_data, make_transform, origin_of

__all__ = ["hub"]
ROOT = Path(__file__).parents[1]
# A zoo of a model at two budgets and at one that is out of its reach, and of a model that cannot be made.
ZOO = """
out: zoo
data: {path: images, val_split: 0.25}
budgets: [0.75, {macs: 0.5, params: 0.8}, 0.0001]
training: {epochs: 1, batch_size: 16}
pruning: {fcr_steps: 2, calibration_images: 48}
runtimes: [eager]
models:
  - {model: vit, name: first, license: mit}
  - {model: vit, name: broken, weights: images/a/0.png, license: mit, budgets: [0.5]}
"""
PUSHED = "push_to_hub: tester\ncollection: Narrow nets\n"


def lfrns_process(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start `lfrns` in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "lfrns_hub", *arguments],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """Run `lfrns` in a folder; gives what it printed."""
    process = lfrns_process(folder, *arguments, **environment)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (out[-2000:], err[-3000:])
    return out, err


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs `lfrns` in this process, in the folder; gives its exit code and what it printed."""
    monkeypatch.chdir(place)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lfrns", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three shades, and a network that was trained on them."""
    folder, draw = tmp_path_factory.mktemp("publisher"), np.random.default_rng(0)
    for i in range(96):
        path = folder / "images" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((draw.random((32, 32, 3)) * 60 + (i % 3) * 90).astype("uint8")).save(path)
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "depth": 1}
    dense = timm.create_model("test_vit", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **shape)
    transform = make_transform(dense, train=False)
    data = load_data(str(folder / "images"), "train", transform=transform, model=dense, val_split=0.25)
    lfrns.retrain(dense, DataLoader(data, 16, shuffle=True), epochs=12, learning_rate=3e-3, progress=False)
    save_for_hf(dense, folder / "vit", model_args=shape, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def pushed(place: Path, tmp_path_factory: pytest.TempPathFactory):
    """The zoo after three calls: killed in its first model, gone on with, and called again to push it."""
    (place / "zoo.yaml").write_text(ZOO)
    work, first = place / "zoo" / "work", place / "zoo" / "first"
    process = lfrns_process(place, "zoo", "zoo.yaml")
    while not list(first.glob("work/retrain-*")) and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = {"rows": (place / "zoo" / "table.json").exists(), "made": list(work.glob("*/*.made.json"))}
    time.sleep(2)  # its child ends with it
    made, _ = run(place, "zoo", "zoo.yaml", "--json", code=1)
    weights = {path: path.stat().st_mtime_ns for path in (place / "zoo").glob("*/*/model.safetensors")}
    with serve(tmp_path_factory.mktemp("hub")) as running:
        (place / "zoo.yaml").write_text(ZOO + PUSHED)
        table, log = run(place, "zoo", "zoo.yaml", code=1, **running.env)
        kept = {path: path.stat().st_mtime_ns for path in weights}
        yield {"killed": killed, "made": json.loads(made), "weights": weights, "kept": kept, "table": table, "log": log,
               "hub": running}  # fmt: skip


@pytest.mark.slow
def test_what_was_killed_goes_on_and_what_is_made_is_not_made_again(place: Path, pushed: dict) -> None:
    assert pushed["killed"] == {"rows": False, "made": []}
    rows = {row["checkpoint"]: row for row in pushed["made"]["rows"]}
    names = ["first.lfrns75_images", "first.lfrns50_params80_images", "first.lfrns0p01_images", "broken.lfrns50_images"]
    assert list(rows) == names
    assert [row["status"] for row in rows.values()] == ["done", "done", "failed", "failed"]
    assert [rows[name]["run"].get("attempts") for name in names] == [2, 2, None, None]
    assert len(pushed["weights"]) == 2 and pushed["kept"] == pushed["weights"]
    assert "[1/2] first: there already" in pushed["log"] and "[2/2] broken: 1 budget" in pushed["log"]


@pytest.mark.slow
def test_a_row_has_its_figures_or_its_reason(place: Path, pushed: dict) -> None:
    rows = {row["checkpoint"]: row for row in pushed["made"]["rows"]}
    for name in ("first.lfrns75_images", "first.lfrns50_params80_images"):
        row, record = rows[name], Record.load(place / "zoo" / "first" / name / "record.json")
        assert row["slim"]["macs_g"] / row["dense"]["macs_g"] <= row["budget"]["macs"]
        assert (
            row["dense"]["accuracy"] == record.dense["top1_pct"] and row["slim"]["accuracy"] == record.slim["top1_pct"]
        )
        assert all(ms > 0 for ms in row["ms"]["eager"]) and not row["left_out"]
        assert row["run"]["seconds"] > 1 and row["run"]["resident_mib"] > 100
        assert row["machine"]["threads"] == 1 and row["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert "holds no plain tensors" in rows["broken.lfrns50_images"]["reason"]
    assert str(place) not in rows["broken.lfrns50_images"]["reason"]
    assert "is not reachable" in rows["first.lfrns0p01_images"]["reason"]
    for text in (pushed["table"], (place / "zoo" / "README.md").read_text()):
        assert "MACs 0.5, parameters 0.8" in text
        assert "failed: ValueError" in text and "cpu, torch" in text and "same run" in text
    assert "Not all is done. The same command goes on" in pushed["table"]


@pytest.mark.slow
def test_other_settings_of_what_was_made_are_refused(place: Path, pushed: dict, here: Callable) -> None:
    before = (place / "zoo" / "table.json").read_bytes()
    (place / "other.yaml").write_text(ZOO.replace("epochs: 1", "epochs: 2"))
    code, _, said = here("zoo", "other.yaml")
    assert (
        code == 1
        and "first: training.epochs is 2, and was 1 when" in said
        and "name another out, or remove that folder" in said
    )
    assert (place / "zoo" / "table.json").read_bytes() == before
    (place / "other.yaml").write_text(ZOO.replace("out: zoo", "out: images"))
    assert "is not empty, and holds no zoo. Name another folder." in here("zoo", "other.yaml")[2]


@pytest.mark.slow
def test_what_was_pushed_is_collected_and_linked_from_index_and_cards(place: Path, pushed: dict) -> None:
    names = ["first.lfrns75_images", "first.lfrns50_params80_images"]
    running: Hub = pushed["hub"]
    assert running.collections() == {"Narrow nets": [f"tester/{name}" for name in names]}
    assert f"Collection: {running.endpoint}/collections/tester/narrow-nets-" in pushed["table"]
    index = (place / "zoo" / "README.md").read_text()
    for name in names:
        link = f"]({running.endpoint}/tester/{name})"
        there = running.files(f"tester/{name}")["README.md"].decode()
        assert link in index and link in (place / "zoo" / "first" / "README.md").read_text()
        assert link in there and link in (place / "zoo" / "first" / name / "README.md").read_text()
    first = running.files("tester/first.lfrns75_images")["README.md"].decode()
    assert f"]({running.endpoint}/tester/{names[1]}) |" in first and "license: mit" in first


@pytest.mark.slow
def test_card_renders_a_zoo_and_all_below_it_from_the_records(
    place: Path, pushed: dict, here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", pushed["hub"].endpoint)
    root = place / "copy"
    shutil.copytree(place / "zoo", root)
    card = root / "first" / "first.lfrns75_images" / "README.md"
    weights = card.with_name("model.safetensors")
    weights.write_bytes(b"no weights are read")
    whole = card.read_text()
    card.write_text(whole.replace("## What was removed", "## Mine\n\nI wrote this.\n\n## What was removed"))
    record = Record.load(card.with_name("record.json"))
    record.slim["top1_pct"] = 12.25
    record.save(card.with_name("record.json"))
    index = root / "README.md"
    index.write_text(index.read_text().replace("# Narrow nets", "# Our zoo\n\nAsk Ann.").replace("# Zoo", "# Our zoo"))
    (place / "empty").mkdir(exist_ok=True)
    assert "is neither a checkpoint nor a folder with an index" in here("card", "copy", "empty")[2]
    assert "12.25" not in card.read_text()
    code, out, _ = here("card", "copy", "--json")
    written = json.loads(out)
    assert code == 0 and len(written["written"]) == 4 and not written["failed"]
    text = card.read_text()
    assert "## Mine\n\nI wrote this." in text and "12.25 %" in text
    assert "12.25" in index.read_text() and index.read_text().startswith("# Our zoo\n")
    assert "12.25" in (root / "first" / "README.md").read_text()
    assert weights.read_bytes() == b"no weights are read"
    card.with_name("record.json").write_text("{")
    code, out, _ = here("card", "copy", "--json")
    failed = json.loads(out)
    assert (
        code == 1 and list(failed["failed"]) == ["copy/first/first.lfrns75_images", "copy"] and card.read_text() == text
    )


@pytest.mark.parametrize("make", [slim_resnet, lambda: ViTForImageClassification(ViTConfig(
    image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    num_labels=3))], ids=["timm", "transformers"])  # fmt: skip
def test_a_card_that_is_rendered_again_is_the_one_that_save_wrote(make: Callable, tmp_path: Path) -> None:
    record = Record(None, {"top1_pct": 50.0, "images": 4, "macs_g": 0.1}, {"label_names": ["a", "b", "c"]})
    folder = lfrns.save(make(), tmp_path / "out", record=record)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert render_card_again(folder) == folder / "README.md"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    render_card_again(folder, license="mit")
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["license"] == "mit"
    (folder / "record.json").unlink()
    render_card_again(folder, license="apache-2.0")
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["license"] == "apache-2.0"
    assert json.loads((folder / "config.json").read_text())["slim"]["license"] == "apache-2.0"
    lfrns.load(folder)


def test_a_damaged_table_is_one_sentence(tmp_path: Path) -> None:
    write_zoo_index(tmp_path, [Row("a|b", "<b>", {"macs": 0.5}, reason="# x | y")], title="# <i>")
    text = (tmp_path / "README.md").read_text()
    assert "<b>" not in text and "<i>" not in text and r"failed: \# x \| y" in text
    assert read_rows(tmp_path)[0].status == "failed"
    for damaged in ('{"rows": [{"model": 3}]}', '{"rows": 3}', "{}"):
        (tmp_path / "table.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"table.json is damaged .* Run lfrns zoo again"):
            read_rows(tmp_path)


LICENCES = {
    "": None,
    "base_model: a/b\nlicense: mit": None,
    "base_model: a/b\nlicense: cc-by-nc-4.0": None,
    "license: other\nlicense_name: own\nlicense_link: https://own.example/1": None,
    "base_model: a/b\nlicense: unknown": "a/b states no licence",
    "license: unknown": "the base of this model states no licence",
    "base_model: a/b": "a/b states no licence",
    "base_model: a/b\nlicense: cc-by-nc-nd-4.0": "has the licence cc-by-nc-nd-4.0, which allows nobody",
    "base_model: a/b\nlicense: cc-by-nd-4.0": "has the licence cc-by-nd-4.0, which allows nobody",
    "base_model: a/b\nlicense: other\nlicense_name: own": "has the licence own, whose terms are not linked",
}


@pytest.mark.parametrize("facts", LICENCES)
def test_a_base_is_shared_as_its_licence_says(facts: str) -> None:
    known = yaml.safe_load(facts) or {}
    if LICENCES[facts] is None:
        return refuse_unlicensed(known, "push('a')")
    with pytest.raises(ValueError) as raised:
        refuse_unlicensed(known, "push('a')")
    assert LICENCES[facts] in str(raised.value) and "--license ID, as --license mit." in str(raised.value)


def test_the_origin_of_weights_is_known_before_they_are_loaded(tmp_path: Path) -> None:
    assert origin_of("resnet50.a1_in1k") == {"base_model": "timm/resnet50.a1_in1k", "license": "apache-2.0"}
    assert origin_of("resnet50.a1_in1k", weights="mine.pth") == {}
    assert origin_of("cifar_resnet20") == origin_of("my.package:build") == {}
    assert origin_of("cifar_resnet20", base_model="resnet50.a1_in1k")["license"] == "apache-2.0"
    unlicensed = next(n for n in timm.list_pretrained("*") if timm.get_pretrained_cfg(n).license in (None, "unknown"))
    assert facts_of_base(unlicensed)["license"] == "unknown"
    ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "vit"
    )
    assert origin_of(str(tmp_path / "vit")) == {"license": "unknown"}
    lfrns.save(slim_resnet(), tmp_path / "own")
    assert origin_of(str(tmp_path / "own")) == {}


@pytest.mark.hub
def test_a_push_stops_until_a_licence_is_stated(hub: Hub, tmp_path: Path) -> None:
    unlicensed = next(n for n in timm.list_pretrained("*") if timm.get_pretrained_cfg(n).license in (None, "unknown"))
    folder = lfrns.save(slim_resnet(), tmp_path / "net", record=Record(None, {}), base_model=unlicensed)
    _, said = run(tmp_path, "push", "net", "tester/net", code=1, **hub.env)
    assert "states no licence" in said and "lfrns push --license ID" in said and len(said.splitlines()) == 1
    assert hub.store.read("tester/net") is None
    run(tmp_path, "push", "net", "tester/net", "--license", "cc-by-4.0", **hub.env)
    assert b"license: cc-by-4.0" in hub.files("tester/net")["README.md"]
    assert (folder / "README.md").read_bytes() == hub.files("tester/net")["README.md"]
    run(tmp_path, "push", "net", "tester/net", **hub.env)  # it is stated from then on
    stop = ["slim", unlicensed, "--data", "digits", "--macs", "0.5", "--out", "new", "--push-to-hub", "tester/other"]
    _, said = run(tmp_path, *stop, code=1, **hub.env)
    assert "lfrns slim: --push-to-hub tester/other" in said and "--license mit" in said
    assert not (tmp_path / "new").exists() and hub.store.read("tester/other") is None
