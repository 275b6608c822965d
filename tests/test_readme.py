"""What the README shows runs, and prints what it says; what it points to is there."""

import contextlib
import io
import re
from pathlib import Path

import pytest


def blocks(repository: Path, language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)


def test_the_first_block_prints_what_the_readme_says(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = blocks(repository, "python")[0], blocks(repository, "text")[0]
    assert code.count("\n") + said.count("\n") <= 25
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert printed.getvalue().strip() == said.strip()


def test_every_other_python_block_compiles(repository: Path) -> None:
    for code in blocks(repository, "python"):
        compile(code, "README.md", "exec")


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md"])
def test_every_link_and_recipe_named_is_there(page: str, repository: Path) -> None:
    text = (repository / page).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert (repository / page).parent.joinpath(target).exists(), target
    for recipe in re.findall(r"recipes/\w+\.py", text):
        assert (repository / recipe).is_file(), recipe


def test_every_recipe_stands_in_the_table_of_results(repository: Path) -> None:
    text = (repository / "recipes" / "README.md").read_text()
    for path in (repository / "recipes").glob("*.py"):
        assert path.name in text


def test_every_make_target_named_is_there(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", (repository / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
