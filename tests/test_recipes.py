"""Every recipe runs, start to end, as a user starts it; what it must refuse, it refuses before it writes anything."""

import argparse
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import torch
from children import run_script
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import lfrns_hub as lfrns
from lfrns_hub import recipe
from lfrns_hub.measure import Record
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.units import SlimPlan

RECIPES = ("vit_digits", "resnet56_cifar10", "vit_cifar100", "resnet50_imagenet1k")


def launch(
    repository: Path, name: str, *arguments: object, processes: int = 1, port: str = "0"
) -> subprocess.CompletedProcess:
    """Run a recipe under accelerate, each process on one core."""
    # `--multi_gpu` is how accelerate 1.15 starts several processes on a CPU; `--cpu` silently starts one.
    several = ["--multi_gpu"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, str(repository / "recipes" / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )


def run_plainly(repository: Path, name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a recipe by python alone."""
    return run_script(repository / "recipes" / f"{name}.py", *arguments, ACCELERATE_MIXED_PRECISION="no")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as 32x32 pictures in parquet, with the columns and file names of CIFAR-10 on the Hub."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    for split, rows in (("train", range(0, 300)), ("validation", range(300, 400))):
        images = []
        for row in rows:
            buffer = io.BytesIO()
            grey = Image.fromarray((digits.images[row] * 15.9).astype("uint8")).convert("RGB")
            grey.resize((32, 32)).save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        frame = pandas.DataFrame({"img": images, "label": digits.target[list(rows)]})
        frame.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers ViT with ten classes and random weights, in a folder."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def check_folder(folder: Path, macs: float) -> dict:
    """The checkpoint is whole, loads, and keeps what was asked for; returns its record."""
    for name in ("config.json", "model.safetensors", "README.md", "record.json"):
        assert (folder / name).is_file(), name
    record = json.loads((folder / "record.json").read_text())
    assert record["slim"]["macs_g"] <= macs * record["dense"]["macs_g"] * (1 + 1e-9)
    assert not lfrns.load(folder).training
    return record


@pytest.mark.slow
def test_the_digits_recipe_runs_and_resuming_a_finished_run_only_prints(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    done = launch(repository, "vit_digits", "--smoke", "--output-dir", out)
    assert done.returncode == 0, done.stderr[-3000:]
    record = check_folder(out, 0.5)
    assert record["slim"]["images"] == 500
    assert len(record["setup"]["controls"]) == 4
    written = (out / "model.safetensors").stat().st_mtime_ns
    path = str(repository / "recipes" / "vit_digits.py")
    monkeypatch.setattr(sys, "argv", [path, "--smoke", "--output-dir", str(out), "--resume"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 0
    assert "Checkpoint" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_cifar_recipe_runs(repository: Path, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--smoke", "--model", "cifar_resnet20", "--data-dir", pictures, "--output-dir", out)
    done = run_plainly(repository, "resnet56_cifar10", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Slim, not retrained" in done.stdout
    controls = check_folder(out, 0.5)["setup"]["controls"]
    assert [row["name"].split(",")[0] for row in controls] == ["slim", "random plan", "dense"]


@pytest.mark.slow
def test_the_recipe_of_streams_runs(repository: Path, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--smoke", "--model", "cifar_resnet20", "--data-dir", pictures, "--output-dir", out, "--workers", 0)
    done = run_plainly(repository, "resnet50_imagenet1k", *arguments, "--batch-size", 64)
    assert done.returncode == 0, done.stderr[-3000:]
    record = check_folder(out, 0.5)
    assert record["setup"]["epochs"] == 1 and record["setup"]["controls"][0]["name"] == "slim, not retrained"


@pytest.mark.slow
def test_the_vit_recipe_makes_the_same_plan_on_one_and_on_two_processes(
    repository: Path, tmp_path: Path, pictures: Path, small_vit: Path, free_port: str
) -> None:
    plans = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        arguments = ("--smoke", "--no-controls", "--data-dir", pictures, "--model", small_vit, "--output-dir", out)
        if processes == 1:
            done = run_plainly(repository, "vit_cifar100", *arguments)
        else:
            done = launch(repository, "vit_cifar100", *arguments, processes=processes, port=free_port)
        assert done.returncode == 0, done.stderr[-3000:]
        check_folder(out, 0.67)
        plans.append(json.loads((out / "config.json").read_text())["slim"]["plan"])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_refuses_a_folder_that_is_not_empty(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    path = str(repository / "recipes" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--smoke", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code not in (0, None)
    assert re.search(r"FileExistsError: --output-dir .* is not empty\. Pass --resume", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("1", 1.0)])
def test_a_budget_is_read_as_a_fraction(text: str, value: float) -> None:
    assert recipe.kept_fraction(text) == value


@pytest.mark.parametrize("text", ["50", "0", "-0.5", "nan", "half"])
def test_a_budget_outside_of_its_range_is_refused_with_its_value(text: str, capsys: pytest.CaptureFixture) -> None:
    parser = recipe.recipe_parser("x", path=__file__, model=None, macs=0.5, epochs=1, batch_size=1, dense_epochs=1)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--macs={text}"])
    assert f"{text}: the fraction to keep must be in (0, 1]" in capsys.readouterr().err


def test_every_recipe_has_the_options_of_the_design(repository: Path) -> None:
    options = {"--data-dir", "--model", "--macs", "--epochs", "--batch-size", "--seed", "--dense-epochs"}
    options |= {"--output-dir", "--overwrite", "--resume", "--push-to-hub", "--smoke"}
    parser = recipe.recipe_parser("x", path=__file__, model=None, macs=0.5, epochs=1, batch_size=1, dense_epochs=1)
    assert options <= set(parser.format_help().replace("[", " ").replace("]", " ").split())
    for path in (repository / "recipes").glob("*.py"):
        assert "recipe_parser(" in path.read_text()


def test_weights_kept_for_resume_come_back_equal(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    recipe.save_weights(model, tmp_path / "work" / "dense.safetensors", make_accelerator())
    recipe.load_weights(other, tmp_path / "work" / "dense.safetensors")
    assert torch.equal(model.weight, other.weight)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["dense.safetensors"]


def options(*typed: object) -> argparse.Namespace:
    parser = recipe.recipe_parser("x", path=__file__, model=None, macs=0.5, epochs=1, batch_size=1, dense_epochs=1)
    return parser.parse_args([str(word) for word in typed])


def test_a_run_is_gone_on_with_by_its_own_options_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    recipe.check_same_run(out, options("--resume"))  # nothing is there yet
    work = recipe.begin_run(out, options("--macs", 0.6, "--data-dir", "data"), make_accelerator())
    same = ("--resume", "--macs", 0.6, "--data-dir", tmp_path / "data", "--output-dir", out, "--push-to-hub", "a/b")
    recipe.check_same_run(out, options(*same))
    with pytest.raises(ValueError, match=r"--resume: the run in .*out has --macs 0\.6, this one 0\.7\. Repeat"):
        recipe.check_same_run(out, options(*same, "--macs", 0.7))
    assert [path.name for path in work.iterdir()] == ["run.json"]


def test_a_recipe_that_was_edited_since_its_run_began_is_not_gone_on_with(tmp_path: Path) -> None:
    script, out = tmp_path / "mine.py", tmp_path / "out"

    def told(code: str, *typed: str) -> argparse.Namespace:
        script.write_text(code)
        figures = {"macs": 0.5, "epochs": 1, "batch_size": 1, "dense_epochs": 1}
        return recipe.recipe_parser("x", path=script, model=None, **figures).parse_args(typed)

    begun = told('"""Mine."""\n\nRATE = 0.1\nprint(RATE)\n')
    assert begun.output_dir == "out/mine"
    recipe.begin_run(out, begun, make_accelerator())
    edited = '"""Result: 98 %."""\nRATE = 0.2  # as of then\nprint(RATE)\n'
    recipe.check_same_run(out, told(edited.replace("0.2", "0.1"), "--resume"))  # comments and the docstring alone
    with pytest.raises(ValueError, match=r"the recipe was edited .*out began \(-RATE = 0\.1 \+RATE = 0\.2\): .* Undo"):
        recipe.check_same_run(out, told(edited, "--resume"))
    recipe.check_same_run(out, told(edited, "--overwrite"))


def test_a_finished_run_is_printed_once_more_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ("--output-dir", tmp_path, "--seed", 7)
    out, accelerator = recipe.open_run(options(*typed))
    assert (out, list(tmp_path.iterdir())) == (tmp_path, [])
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    recipe.begin_run(out, options(*typed), accelerator)
    (out / "config.json").write_text("{}")
    (out / "record.json").write_text(Record(None, {"top1_pct": 98.0}, {"controls": []}).to_json())
    with pytest.raises(SystemExit) as ended:
        recipe.open_run(options(*typed, "--resume"))
    assert ended.value.code == 0
    assert "Checkpoint" in capsys.readouterr().out


def test_overwrite_removes_a_run_and_its_checkpoint_and_resume_leaves_them(tmp_path: Path) -> None:
    for how, left in (("--resume", True), ("--overwrite", False)):
        out = tmp_path / how
        for name in ("mine.txt", "config.json", "model.safetensors", "work/retrain/step", "work/run.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text('{"slim": "lfrns"}')
        recipe.check_output_dir(out, resume=how == "--resume", overwrite=how == "--overwrite")
        recipe.begin_run(out, options(how), make_accelerator())
        assert (out / "mine.txt").exists() and (out / "work" / "run.json").exists()
        for name in ("config.json", "model.safetensors", "work/retrain/step"):
            assert (out / name).exists() is left


def test_overwrite_touches_only_what_is_ours_and_names_what_a_link_leads_to(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("mine")
    (tmp_path / "out").symlink_to(home)
    for several in (False, True):
        with pytest.raises(FileExistsError, match=rf"--out .*out, a link to {home},: holds no checkpoint or run"):
            recipe.check_output_dir(tmp_path / "out", resume=False, overwrite=True, option="--out", several=several)
    (home / "net.lfrns50").mkdir()
    (home / "net.lfrns50" / "config.json").write_text('{"architecture": "lfrns_slim"}')
    assert recipe.check_output_dir(tmp_path / "out", resume=False, overwrite=True, several=True) == home
    (home / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds README.md and no checkpoint or run"):
        recipe.check_output_dir(home, resume=True, overwrite=False)
    assert (home / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"macs": "' + "x" * 999 + '"}', '{"code_of_the_recipe": 3}'])
def test_an_edited_run_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    recipe.begin_run(tmp_path, options(), make_accelerator())
    (tmp_path / "work" / "run.json").write_text(content)
    with pytest.raises(ValueError, match="--resume: ") as refused:
        recipe.check_same_run(tmp_path, options("--resume"))
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"slim": {"worst_class": 3, "output": "classes"}},
        {"slim": {"worst_class": {"class": 9}}, "setup": {"label_names": ["a"]}},
        {"slim": {}, "setup": {"controls": [{"name": "a"}]}},
        {"slim": {}, "setup": {"controls": ["a"]}},
        {"slim": {"heads": 3}},
        {"slim": {"output": ["classes"]}},
        {"slim": {}, "setup": {"machine": {"threads": [1]}, "dtype": {"a": 1}, "controls": None}},
    ],
)
def test_an_edited_record_of_a_finished_run_is_one_line_and_its_run_stays(
    fields: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, accelerator = recipe.open_run(options("--output-dir", tmp_path))
    work = recipe.begin_run(out, options("--output-dir", tmp_path), accelerator)
    (work / "retrain").mkdir()
    (out / "config.json").write_text("{}")
    (out / "record.json").write_text(json.dumps(fields))
    try:
        recipe.finish(out, accelerator, None)
    except ValueError as refused:
        assert "\n" not in str(refused) and (work / "retrain").is_dir()


def test_a_finished_run_leaves_the_dense_weights_and_its_options(tmp_path: Path) -> None:
    work = recipe.begin_run(tmp_path, options(), make_accelerator())
    recipe.save_weights(torch.nn.Linear(3, 2), work / "dense.safetensors", make_accelerator())
    (work / "retrain" / "step_000000001").mkdir(parents=True)
    recipe.tidy(tmp_path)
    assert sorted(path.name for path in work.iterdir()) == ["dense.safetensors", "run.json"]


def test_sigterm_ends_a_recipe_with_one_line_and_143(capsys: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def told() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(SystemExit) as stopped:
        recipe.run(told)
    assert stopped.value.code == 143
    said = "SIGTERM: stopped. What was kept before is there still; what was being done is not.\n"
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_random_plan_has_the_widths_of_the_plan_and_follows_its_seed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2)).eval()
    groups = lfrns.find_units(model, torch.zeros(1, 4))
    plan = SlimPlan({groups[0].name: [0, 1, 2, 3, 4]})
    drawn = recipe.random_plan(plan, groups, seed=1).keep[groups[0].name]
    assert len(set(drawn)) == 5
    assert drawn == sorted(drawn)
    assert max(drawn) < 12
    assert drawn == recipe.random_plan(plan, groups, seed=1).keep[groups[0].name]


def test_the_controls_are_the_dense_model_and_as_many_units_at_random() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2)).eval()
    groups = lfrns.find_units(model, torch.zeros(1, 4))
    drawn, dense = recipe.make_controls(model, SlimPlan({groups[0].name: [0, 1, 2]}), groups, seed=1).values()
    kept = recipe.random_plan(SlimPlan({groups[0].name: [0, 1, 2]}), groups, seed=1).keep[groups[0].name]
    assert torch.equal(drawn[0].weight, model[0].weight[kept])
    assert torch.equal(dense[0].weight, model[0].weight) and dense is not model


def test_a_command_on_the_card_shows_no_folder_of_the_machine(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["x", "--data-dir=/home/me/pictures/", "--output-dir", "/scratch/out", "--macs", "0.5", "--model", "a/b"]
    monkeypatch.setattr(sys, "argv", typed)
    told = recipe.describe_run(str(repository / "recipes" / "vit_digits.py"))["command"]
    assert told.endswith("recipes/vit_digits.py --data-dir=pictures --output-dir out --macs 0.5 --model a/b")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("local-dir:/home/alice/secret/net", "net"), ("../../home/alice/net", "net"), ("./alice/net/", "net"),
        ("C:/Users/alice/net", "net"), ("C:\\Users\\alice\\net", "net"), ("\\\\server\\alice\\net", "net"),
        ("~/alice/net", "net"), ("~alice/net", "net"), ("~alice", "~"), ("/home/alice", "~"), ("/Users/alice/", "~"),
        ("file:///home/alice/net", "net"), ("file:%2Fhome%2Falice%2Fnet", "net"), ("s3://alice/x/net", "net"),
        ("https://alice:word@host/alice/net?token=alice#alice", "net"), ("https://alice:word@host", "host"),
        ("-o/home/alice/net", "net"), ("/data/alice,/home/alice/net", "net"), ("alice/deep/net", "net"), ("..", "."),
        ("alice/..", "."), ("hf_aliceAliceAliceAliceAlice", "hf_..."), ("user/name", "user/name"), ("", ""),
        ("hf-hub:user/name@v1.0", "hf-hub:user/name@v1.0"), ("resnet50.a1_in1k", "resnet50.a1_in1k"), ("0.5", "0.5"),
        ("package.module:fn", "package.module:fn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["", "--model="])
def test_of_a_path_in_any_form_the_last_part_is_told(option: str, typed: str, told: str) -> None:
    assert recipe.without_folders(option + typed) == option + told


def test_a_folder_here_that_has_the_form_of_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "alice" / "net").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert recipe.without_folders("alice/net") == "net"


def test_a_run_is_finished_when_record_and_config_are_there(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    assert not recipe.is_finished(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert recipe.is_finished(tmp_path)
