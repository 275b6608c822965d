"""What the pages in docs/ show runs, in order, and prints what they say."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub

import lfrns_cli as cli
from lfrns_hub.trace import adapters
from lfrns_hub.trace.rules import registry

__all__ = ["hub"]
COLUMNS = 100  # of the tables in the page


def run_page(text: str, folder: Path) -> list[tuple[str, str]]:
    """Run a page's blocks: Python in one namespace, one that opens with a file's name written there, and `lfrns`.

    Returns:
        For each text block, what it says and what the block before it printed.
    """
    namespace, printed, pairs = {"__name__": "page"}, "", []
    for language, body in re.findall(r"```(python|sh|text)\n(.*?)```", text, flags=re.DOTALL):
        named = re.match(r"# (\w+\.py)\n", body)
        if language == "text":
            pairs.append((plain(body), plain(printed)))
        elif language == "sh":
            out = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
                patch.setattr(sys, "argv", body.split())
                with pytest.raises(SystemExit) as ended:
                    cli.main()
            assert not ended.value.code, out.getvalue()
            printed = out.getvalue()
        elif named:
            (folder / named[1]).write_text(body, encoding="utf-8")
        else:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, "page.md", "exec"), namespace)
            printed = out.getvalue()
    return pairs


def plain(text: str) -> str:
    """Text without spaces at the ends of its lines."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def test_extending_runs_and_prints_what_it_says(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))  # what the page registers leaves with it
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    try:
        pairs = run_page((repository / "docs" / "extending.md").read_text(encoding="utf-8"), tmp_path)
    finally:
        for name in ("mynet", "mynet_lfrns"):
            sys.modules.pop(name, None)
    assert len(pairs) == 8
    for said, printed in pairs:
        assert printed == said


# In a process whose Hub is the local one: the page pushes to it and loads from it.
RUN_PAGE = """
import sys
from pathlib import Path
from test_docs import run_page

for said, printed in run_page(Path(sys.argv[1]).read_text(encoding="utf-8"), Path.cwd()):
    assert printed == said, (printed, said)
    print("as it says")
"""


@pytest.mark.slow
def test_the_quickstart_runs_pushes_and_prints_what_it_says(hub, repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_PAGE, str(repository / "docs" / "quickstart.md")],
        env={**os.environ, **hub.env, "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "tests")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines().count("as it says") == 3
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files("user/digits.lfrns50"))
