"""SECURITY.md says what is promised and which test holds each promise: here, that there is such a test."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def rows(text: str) -> list[list[str]]:
    """The promises and what they are held by, of all tables of the section of promises."""
    section = text.partition("## What is promised\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line] for line in lines if "---" not in line[0] and "promise" not in line[0].split()
    ]


def named(cell: str) -> list[tuple[str, str]]:
    """The tests in a cell: file and function."""
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)


def exists(file: str, function: str) -> bool:
    """Whether a file of the suite has a test of that name, which is not skipped whatever happens."""
    path = TESTS / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return bool(found) and not any(ast.unparse(mark) == "pytest.mark.skip" for mark in found[0].decorator_list)


def test_each_promise_names_tests_that_there_are(repository: Path) -> None:
    promises = rows((repository / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(promises) > 30
    for row in promises:
        assert len(row) == 2, row
        promise, held_by = row
        assert named(held_by), f"nothing holds: {promise}"
        assert re.sub(r"`[^`]*`|[, ]", "", held_by) == "", f"more than tests: {held_by}"
        missing = [f"{file}::{name}" for file, name in named(held_by) if not exists(file, name)]
        assert not missing, f"{promise} {missing}"


def test_a_promise_without_a_test_is_noticed() -> None:
    table = "## What is promised\n| promise | held by |\n|---|---|\n| A. | `test_x.py::test_y` |\n| B. | |\n"
    assert [bool(named(row[-1])) for row in rows(table + "\n## Next\n| C. |\n")] == [True, False]
    assert not exists("test_security.py", "test_that_is_not_there") and not exists("test_none.py", "test_x")
    assert exists("test_security.py", "test_a_promise_without_a_test_is_noticed")
