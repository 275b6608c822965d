"""The notebook runs from top to bottom in a fresh process, prints what it shows, and shows nothing of the machine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from children import run_script

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "slim_a_model.ipynb"
# The cells one after the other, as a kernel runs them, with a line after what each has printed.
RUN = """
import json, sys
namespace = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
        print("-- end of cell --")
"""


def code_cells() -> list[dict[str, Any]]:
    """The notebook's cells of code."""
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def form(text: str) -> str:
    """Text without its numbers, which other processors round differently, and without its spaces."""
    return re.sub(r"#(,#)+", "#", re.sub(r"[-+]?\d+(\.\d+)?", "#", re.sub(r"\s+", "", text)))


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    done = run_script(tmp_path / "run.py", NOTEBOOK, MPLBACKEND="Agg", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("-- end of cell --\n")[:-1]
    cells = code_cells()
    shown = ["".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in cells]
    assert len(shown) == len(printed) == len(cells) > 8
    assert [form(text) for text in printed] == [form(text) for text in shown]
    assert "the same answers: True" in printed[-1]


def test_what_the_notebook_shows_is_whole_and_names_no_machine() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not re.search(r"/(root|home|Users|tmp|work)/", json.dumps(outputs))
