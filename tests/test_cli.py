"""The command line says what it did, and refuses bad input in one line."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.table import Table
from typer.testing import CliRunner

import lfrns_cli as cli
import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.cli.terminal import show
from lfrns_hub.measure import Record

RUNNER = CliRunner()
COMMANDS = ["units", "curve", "slim", "retrain", "evaluate", "predict", "bench", "push", "export"]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `lfrns ARGUMENTS` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["lfrns", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_help_names_every_command() -> None:
    text = RUNNER.invoke(cli.app, ["--help"]).output
    for command in (
        "demo",
        "units",
        "curve",
        "slim",
        "retrain",
        "evaluate",
        "predict",
        "bench",
        "push",
        "export",
        "card",
        "zoo",
        "run",
        "coverage",
    ):
        assert command in text


@pytest.mark.parametrize(
    "command", ["units", "curve", "slim", "retrain", "evaluate", "predict", "bench", "push", "export", "card", "zoo"]
)
def test_each_command_shows_examples_and_speaks_json(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = RUNNER.invoke(cli.app, [command, "--help"]).output
    assert f"lfrns {command} " in text.partition("Examples")[2]
    assert "--json" in text


def test_units_lists_groups_with_their_kinds_and_sizes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_main(monkeypatch, "units", "test_vit") == 0
    text = capsys.readouterr().out
    assert "neuron" in text
    assert "head" in text
    assert "can go" in text
    assert "blocks.0.mlp.fc2" in text  # what reads the neurons


def test_units_as_json_gives_each_group_its_share_of_the_macs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run_main(monkeypatch, "units", "cifar_resnet20", "--json") == 0
    groups = {group["name"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    # Of 40.55 M MACs two 3x3 convolutions make and read each of these 16 channels, at 32x32: 2 x 2.36 M.
    assert groups["layer1.0.conv1"]["macs_share"] == pytest.approx(2 * 9 * 16 * 16 * 1024 / 40.55e6, rel=1e-3)
    assert groups["layer1.0.conv1"]["taps"] == ["layer1.0.conv2"]
    assert groups["linear"]["frozen_reason"] == "it is the network's output"


def test_units_at_a_budget_shows_what_each_group_keeps(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run_main(monkeypatch, "units", "cifar_resnet20", "--macs", "0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    kept = {group["name"]: group["kept"] for group in found["groups"]}
    sizes = {group["name"]: group["size"] for group in found["groups"]}
    # The nine inner groups and the streams keep one share; half of the MACs need about 0.7 of both sides of each layer.
    assert 0.45 < found["left"]["macs"] <= 0.5
    assert {name for name in kept if kept[name] < sizes[name]} >= {"layer1.0.conv1", "layer3.2.conv1"}
    assert all(abs(kept[name] / sizes[name] - 0.7) < 0.08 for name in kept if kept[name] < sizes[name])
    assert kept["linear"] == sizes["linear"]
    assert run_main(monkeypatch, "units", "cifar_resnet20", "--macs", "0.0001") == 1
    assert "the smallest that this model can be cut to is" in capsys.readouterr().err


def test_evaluate_refuses_a_folder_without_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "evaluate", str(tmp_path), "--data", "x") == 1
    assert "config.json" in capsys.readouterr().err


def test_evaluate_leaves_damaged_pictures_out_and_says_so_on_the_card(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    lfrns.save(timm.create_model("test_vit", depth=1, img_size=32, num_classes=3), tmp_path / "slim")
    for i in range(9):
        path = tmp_path / "data" / "validation" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(path)
    path.write_text("no picture")
    arguments = ["evaluate", str(tmp_path / "slim"), "--data", str(tmp_path / "data")]
    assert run_main(monkeypatch, *arguments, "--json") == 0
    slim = json.loads(capsys.readouterr().out)["slim"]
    assert (slim["images"], slim["images_skipped"], slim["class_counts"]) == (8, 1, [3, 3, 2])
    assert "1 image could not be read; no figure counts them." in (tmp_path / "slim" / "README.md").read_text()
    assert run_main(monkeypatch, *arguments) == 0
    assert "could not be read and were left out: 8.png." in capsys.readouterr().out
    assert run_main(monkeypatch, *arguments, "--max-unreadable", "0") == 1
    assert "1 of 9 pictures cannot be read, at most 0 are left out: 8.png" in capsys.readouterr().err


def test_demo_hands_its_options_to_the_digits_recipe(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run_main(monkeypatch, "demo", "--smoke", "--output-dir", str(tmp_path)) == 1
    assert f"--output-dir {tmp_path}: is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("resumed", [False, True])
def test_demo_as_json_prints_the_record_alone(
    resumed: bool, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    def recipe_that_talks(path: str, run_name: str) -> None:
        assert sys.argv[1:] == ["--smoke", "--output-dir", str(tmp_path)]
        print("a table")
        (tmp_path / "record.json").write_text('{"slim": {}}')
        if resumed:
            raise SystemExit(0)

    monkeypatch.setattr("runpy.run_path", recipe_that_talks)
    assert run_main(monkeypatch, "demo", "--smoke", "--json", "--output-dir", str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"slim": {}}
    assert "a table" in printed.err


def test_predict_names_classes_and_probabilities(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", depth=1, img_size=32, num_classes=3)
    model.head.weight.data.zero_()
    model.head.bias.data.copy_(torch.tensor([0.0, 2.0, 1.0]))
    lfrns.save(model, tmp_path / "slim", label_names=["ant", "bee", "[red]cat"])
    for name in ("b.png", "a.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 50), (200, 0, 0)).save(tmp_path / "photos" / name)
    words = ["predict", str(tmp_path / "slim"), str(tmp_path / "photos"), "--top", "2"]
    assert run_main(monkeypatch, *words, "--json") == 0
    said = json.loads(capsys.readouterr().out)["photos"]
    assert [Path(row["photo"]).name for row in said] == ["a.png", "b.png"]
    assert [one["name"] for one in said[0]["answers"]] == ["bee", "[red]cat"]
    expected = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    assert [one["value"] for one in said[0]["answers"]] == pytest.approx([float(expected[1]), float(expected[2])])
    assert run_main(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "[red]cat" in out and "\\[" not in out
    (tmp_path / "photos" / "a.png").write_text("no picture")
    assert run_main(monkeypatch, *words) == 1
    assert "a.png: cannot be read as an image" in capsys.readouterr().err


class Probable(torch.nn.Module):
    """Ends with its own softmax, and drops the batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 8)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).squeeze().softmax(-1)


def test_predict_shows_probabilities_that_a_model_gives_itself(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("lfrns_hub.cli.judge.load_slim", lambda *_: Probable())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert run_main(monkeypatch, "predict", "slim", str(tmp_path / "a.png"), "--top", "1", "--json") == 0
    (best,) = json.loads(capsys.readouterr().out)["photos"][0]["answers"]
    assert best["name"] == "class 1"
    assert best["value"] == pytest.approx(float(torch.tensor([0.0, 2.0, 1.0]).softmax(0)[1]), abs=1e-5)


def test_a_table_in_a_pipe_cuts_no_name(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    names = ["layers.0.blocks.1.attention.projection" * 2, "b" * 60]
    table = Table(*names)
    table.add_row(*names)
    show(False, None, table)
    out = capsys.readouterr().out
    assert [out.count(name) for name in names] == [2, 2]
    monkeypatch.setenv("COLUMNS", "40")
    show(False, None, table)
    assert "…" not in capsys.readouterr().out


def test_push_as_json_gives_the_address(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    asked = {}

    def push(folder: str, repo: str, **options: object) -> str:
        asked.update(options, folder=folder, repo=repo)
        return "https://hub/me/it/commit/1"

    monkeypatch.setattr("lfrns_hub.push", push)
    assert run_main(monkeypatch, "push", str(tmp_path), "me/it", "--private", "--revision", "b", "--pr", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"url": "https://hub/me/it/commit/1"}
    assert asked["folder"] == str(tmp_path)
    assert asked["repo"] == "me/it"
    assert [asked[key] for key in ("private", "revision", "create_pr")] == [True, "b", True]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        recipe.run(broken)


def test_user_errors_are_raised_where_a_traceback_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("slim(macs=50)")

    monkeypatch.setenv("LFRNS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="macs=50"):
        recipe.run(refuse)


def test_a_path_is_no_markup_on_the_terminal(capsys: pytest.CaptureFixture) -> None:
    name = "/data/[red]a[/red] [/b] :smile: [link=x]y"
    show(False, None, f"Checkpoint: {name}", Table("group" * 10, title=name))
    recipe.print_results(Record(None, {}, {}), [{"name": name, "top1_pct": 1.0, "images": 1}], Path(name))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"Checkpoint: {name}") == 2
    assert said.count(name) == 4
