"""The command line says what it did, and refuses bad input in one line."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lfrns_hub import cli

RUNNER = CliRunner()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `lfrns ARGUMENTS` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["lfrns", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_help_names_every_command() -> None:
    text = RUNNER.invoke(cli.app, ["--help"]).output
    for command in ("demo", "units", "slim", "evaluate", "push"):
        assert command in text


def test_units_lists_groups_with_their_kinds_and_sizes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_main(monkeypatch, "units", "test_vit") == 0
    text = capsys.readouterr().out
    assert "neuron" in text
    assert "head" in text
    assert "can go" in text


def test_an_unknown_model_is_one_line_with_near_matches(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run_main(monkeypatch, "units", "resnet5O") == 1
    error = capsys.readouterr().err
    assert "resnet5O" in error
    assert "resnet50" in error
    assert "Traceback" not in error


def test_slim_refuses_a_folder_that_is_not_empty(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run_main(monkeypatch, "slim", "test_vit", "--data", "x", "--macs", "0.5", "--out", str(tmp_path)) == 1
    assert "is not empty" in capsys.readouterr().err


def test_evaluate_refuses_a_folder_without_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "evaluate", str(tmp_path), "--data", "x") == 1
    assert "config.json" in capsys.readouterr().err


def test_demo_hands_its_options_to_the_digits_recipe(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run_main(monkeypatch, "demo", "--smoke", "--output-dir", str(tmp_path)) == 1
    assert f"--output-dir {tmp_path}: is not empty" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.recipe.run(broken)


def test_user_errors_are_raised_where_a_traceback_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("slim(macs=50)")

    monkeypatch.setenv("LFRNS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="macs=50"):
        cli.recipe.run(refuse)
