"""The coverage table: every family has its row, and no network takes the run down with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from lfrns_hub.coverage import families, main
from lfrns_hub.coverage.cases import Case, build, list_cases, select_cases
from lfrns_hub.coverage.command import read_rows
from lfrns_hub.coverage.processes import run_cases
from lfrns_hub.coverage.table import cells_of, count_minutes, count_rows, worse_than, write_tables
from lfrns_hub.coverage.trial import OPTIONS, measure, shorten

TIMM_TABLES = (families.TIMM_CONVNETS, families.TIMM_VITS, families.TIMM_HYBRIDS)


def row_of(case: Case) -> dict[str, Any]:
    """Measure a network in this process."""
    row: dict[str, Any] = {"section": case.section, "family": case.family, "model": case.title, "option": case.option}
    measure(case, lambda **facts: row.update(facts))
    return row


def test_every_timm_module_that_registers_models_has_one_entry() -> None:
    own = [name for name in timm.list_modules() if hasattr(timm.models, name) and timm.list_models(module=name)]
    assert [name for name in own if sum(name in table for table in TIMM_TABLES) != 1] == []


def test_every_timm_entry_is_a_model_of_its_module() -> None:
    entries = [(family, model) for table in TIMM_TABLES for family, model in table.items()]
    assert [entry for entry in entries if entry[1] not in timm.list_models(module=entry[0])] == []


def test_every_transformers_classifier_has_an_entry_or_a_reason() -> None:
    tables = (families.TRANSFORMERS_CONVNETS, families.TRANSFORMERS_VITS, families.NOT_IMAGES)
    types = list(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    assert [name for name in types if sum(name in table for table in tables) != 1] == []


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "regnet", "convnext", "nfnet", "densenet"])
def test_each_family_with_options_has_at_least_three_variants_that_exist(family: str) -> None:
    options = families.VARIANTS[family]
    assert len(options) >= 3
    assert all(":" in model or timm.is_model(model) for _, model, _ in options)


def test_a_family_that_no_table_names_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfrns_hub.coverage.cases.TIMM_CONVNETS", {})
    monkeypatch.setattr("lfrns_hub.coverage.cases._smallest", lambda family: f"smallest of {family}")
    case = next(case for case in list_cases() if case.family == "dla")
    assert (case.model, case.option) == ("smallest of dla", "new in this timm, not sorted")


def test_patterns_choose_by_family_and_model_then_from_timm_then_by_any_name() -> None:
    assert {case.family for case in select_cases(["resnetv2"])} == {"resnetv2"}
    assert [case.model for case in select_cases(["mobileone_s1"])] == ["mobileone_s1"]
    assert [case.section for case in select_cases(["*:build_sequential"])] == ["third-party"]
    named = select_cases(["test_re*", "collections:Counter"], size=64)
    assert ("test_resnet", "timm", 64) in [(case.model, case.kind, case.size) for case in named]
    assert (named[-1].model, named[-1].kind) == ("collections:Counter", "function")


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"coverage\('no_such_\*'\): matches no family"):
        select_cases(["no_such_*"])


def test_a_limit_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"coverage\(--time-limit 0\): must be above 0"):
        main(["test_resnet", "--time-limit", "0"])


@pytest.mark.parametrize("name", ["deit", "levit"])
def test_a_transformers_type_with_several_classes_builds_the_first(name: str) -> None:
    case = next(case for case in list_cases() if case.section == "transformers ViTs" and case.family == name)
    model, shape = build(case)
    assert type(model).__name__ == MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[name][0]
    assert shape == (3, case.size, case.size)


@pytest.mark.parametrize(
    "case",
    [
        Case("named", "resnet", "test_resnet", size=64),
        Case("named", "convnext", "test_convnext", args={"num_classes": 7}, size=64),
        Case("third-party", "torch.nn", "lfrns_hub.coverage.cases:build_sequential", "function", size=32),
    ],
    ids=lambda case: case.family,
)
def test_a_network_that_works_passes_every_step(case: Case) -> None:
    row = row_of(case)
    assert row["step"] == "done"
    assert 0.5 < row["macs_fraction"] <= 0.75 + 1e-9
    assert row["reach"]["exact"] < 0.75
    assert row["check_error"] <= 1e-8
    assert row["reload_difference"] <= 1e-5
    assert sum(groups for groups, _ in row["groups"]["exact"].values()) > 0


def test_a_network_that_cannot_be_cut_says_why() -> None:
    case = Case("third-party", "torch.nn", "torch.nn:Linear", "function", {"in_features": 8, "out_features": 4}, 8)
    row: dict[str, Any] = {}
    with pytest.raises(ValueError, match=r"cannot be cut to 0.75 of its MACs: .* keeps 1.00"):
        measure(case, lambda **facts: row.update(facts))
    assert row["step"] == "slim"


@pytest.mark.slow
def test_a_network_that_dies_or_hangs_costs_its_own_row_alone(tmp_path: Path) -> None:
    cases = [
        Case("named", "dies", "os:abort", "function"),
        Case("named", "raises", "math:sqrt", "function", {"x": 1}),
        Case("named", "works", "lfrns_hub.coverage.cases:build_sequential", "function", size=32),
    ]
    rows = {row["family"]: row for row in run_cases(cases, workers=2)}
    assert rows["dies"]["reason"] == "its process was killed by SIGABRT"
    assert rows["raises"]["reason"].startswith("TypeError")
    assert rows["dies"]["step"] == rows["raises"]["step"] == "build"
    assert "reason" not in rows["works"]
    assert rows["works"]["step"] == "done" and rows["works"]["seconds"] > 0


def test_a_network_that_hangs_is_stopped() -> None:
    hangs, works = (
        Case("named", name, function, "function")
        for name, function in (("hangs", "signal:pause"), ("raises", "math:sqrt"))
    )
    rows = {row["family"]: row for row in run_cases([hangs, works], workers=1, time_limit=2)}
    assert rows["hangs"]["reason"] == "stopped after 2 s" and rows["hangs"]["seconds"] >= 2
    assert "raises" in rows


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was tried; nothing is built, and "test_vit" fails at its first try."""
    names: list[str] = []

    def run(cases: Any, **options: Any) -> Any:
        for case in cases:
            names.append(case.model)
            row = {"section": case.section, "family": case.family, "model": case.title, "option": "", "seconds": 1.0}
            failed = case.model == "test_vit" and names.count("test_vit") == 1
            yield row | ({"reason": "it did not work", "step": "trace"} if failed else {"slimmed": "exact"})

    monkeypatch.setattr("lfrns_hub.coverage.command.run_cases", run)
    return names


def test_a_run_is_taken_up_where_it_stopped_and_failures_are_tried_again(tried: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "docs" / "coverage.md")
    assert main(["test_resnet", "test_vit", "--output", output]) == 1
    assert tried == ["test_resnet", "test_vit"]
    with open(tmp_path / "docs" / "coverage.jsonl", "a") as file:
        file.write('{"section": "nam')  # where it was interrupted
    assert main(["test_resnet", "test_vit", "test_convnext", "--output", output, "--resume"]) == 1
    assert tried[2:] == ["test_convnext"]
    assert main(["test_*t", "--output", output, "--again"]) == 0
    assert tried.count("test_vit") == 2
    assert tried.count("test_resnet") == tried.count("test_convnext") == 1
    table = Path(output).read_text()
    assert "test_resnet" in table and "it did not work" not in table


def test_without_resume_a_run_starts_afresh(tried: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "coverage.md")
    for model in ("test_resnet", "test_convnext"):
        main([model, "--output", output])
    assert "test_resnet" not in Path(output).read_text()


def test_patterns_without_an_output_write_nothing(
    tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["test_resnet"]) == 0
    assert not list(tmp_path.iterdir())


def test_rows_of_other_versions_are_not_kept(tmp_path: Path) -> None:
    row = {
        "section": "named",
        "family": "a",
        "model": "a",
        "option": "",
        "versions": {"timm": "1.0"},
        "options": OPTIONS,
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, row | {"model": "b", "options": {"fcr_steps": 0}}])) + "\n")
    assert [key[2] for key in read_rows(path, {"timm": "1.0"})] == ["a"]
    assert read_rows(path, {"timm": "2.0"}) == {}


def test_the_table_counts_what_works_and_gives_the_reason_of_what_does_not(tmp_path: Path) -> None:
    common = {"section": "timm ViTs", "option": "", "params_m": 5.0, "input_size": [3, 64, 64], "seconds": 3.0}
    works = common | {
        "family": "deit",
        "model": "deit_tiny",
        "groups": {"exact": {"head": [2, 6], "neuron": [2, 96]}, "approximate": {"channel": [1, 48]}, "frozen": {}},
        "reach": {"exact": 0.25, "approximate": 0.1},
        "slimmed": "exact",
        "macs_fraction": 0.749,
        "check_error": 2e-16,
        "reload_difference": 0.0,
        "session": "one",
        "elapsed_s": 60.0,
    }
    inexact = works | {"model": "deit_other", "slimmed": "approximate", "check_error": None, "elapsed_s": 120.0}
    fails = common | {
        "family": "odd",
        "model": "odd_vit",
        "reason": "ValueError: cannot",
        "step": "slim",
        "frozen": [
            {"kind": "head", "groups": 2, "units": 6, "first": "blocks.0", "reason": "no rule (aten.x in m, in `y[0]`)"}
        ],
        "session": "two",
        "elapsed_s": 60.0,
    }
    assert cells_of(works)[4:8] == ["head 2/6, neuron 2/96", "channel 1/48", "", "0.25 / 0.10"]
    assert cells_of(inexact)[8:11] == ["approximate", "0.749", "no exact group"]
    rows = [works, inexact, fails]
    assert count_rows(rows) == "2 of 3, 1 of them with approximate groups"
    assert count_minutes(rows) == 3
    write_tables(rows, {"machine": "a | b"}, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| timm ViTs | 2 of 3, 1 of them with approximate groups |" in text
    assert "- odd, odd\\_vit: ValueError: cannot (at: slim)" in text
    assert "6 heads in 2 groups (blocks.0 ...): no rule (aten.x in m, in `y\\[0\\]`)" in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith(("| family", "| deit", "| odd"))}
    assert len(widths) == 1


def test_reasons_name_no_folder_of_this_machine() -> None:
    text = 'File "/home/me/venv/lib/python3/site-packages/timm/layers/pool.py", line 7,\n   in forward'
    assert shorten(text) == 'File "timm/layers/pool.py", line 7, in forward'
    assert len(shorten("x" * 1000)) == 300


def test_what_got_worse_than_in_an_earlier_table_and_what_took_long_is_listed(tmp_path: Path) -> None:
    def row(model: str, reach: float, reason: str = "", seconds: float = 1.0) -> dict[str, Any]:
        facts = {"family": "f", "model": model, "option": "", "section": "third-party", "seconds": seconds}
        return facts | {"reach": {"exact": reach, "approximate": reach}, "reason": reason, "slimmed": "exact"}

    before = [row("same", 0.3), row("frozen", 0.3), row("broken", 0.3), row("mended", 0.3, "it failed")]
    now = [row("same", 0.3, seconds=181.0), row("frozen", 0.5), row("broken", 0.3, "it fails"), row("mended", 0.2)]
    assert worse_than(before, now) == [
        "- f, frozen: smallest MACs 0.30 before, 0.50 now",
        "- f, broken: slimmed before; now it fails (at: start)",
    ]
    write_tables(now, {}, tmp_path / "table.md", before)
    text = (tmp_path / "table.md").read_text()
    assert "Longer than 3 minutes:\n\n- f, same: 181 s\n" in text
    assert "Worse than in the table before this one:\n\n- f, frozen" in text
