"""The table of a zoo: a row for each model and budget, its record table.json, and the README.md that shows it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lfrns_hub.format.markdown import escape
from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.hub.index import END, around, linked
from lfrns_hub.measure import Record, comparable_dense, main_figure
from lfrns_hub.runs import draft_of, locked, put_in_place, settle

TABLE = "table.json"
START = "<!-- lfrns zoo writes this table; what stands above and below it stays -->"
DONE, FAILED = "done", "failed"
KINDS = {"macs": "MACs", "params": "parameters", "latency": "latency"}
NOT_MEASURED = "not measured"


@dataclass
class Row:
    """One model at one budget.

    Attributes:
        model, checkpoint: Names of its folders, one in the other.
        budget: Fraction of the dense model's to keep, by name.
        status: "done", "failed", or what is not done of a checkpoint that was made.
        reason: Why it is not done.
        dense, slim: Figures of both models, of one occasion: accuracy (the main figure of such outputs), params_m,
            macs_g; empty where nothing was measured.
        figure: Label of the accuracy, and the form of its numbers.
        images, data: Number of images that it was measured on, and their name.
        ms: Milliseconds of a forward pass of one image, dense and slim, by runtime.
        left_out: Why a runtime has none.
        run: Of the process that made the checkpoint, and perhaps others: its id, seconds, attempts (those before were
            interrupted), resident_mib and gpu_mib (its peaks of memory).
        machine: cpu, threads, device and torch of the figures.
        pushed: Its repository on the Hub.
    """

    model: str
    checkpoint: str
    budget: dict[str, float]
    status: str = FAILED
    reason: str = ""
    dense: dict[str, float] = field(default_factory=dict)
    slim: dict[str, float] = field(default_factory=dict)
    figure: dict[str, str] = field(default_factory=dict)
    images: int | None = None
    data: str = ""
    ms: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    pushed: str | None = None

    def take(self, record: Record) -> None:
        """Take over the figures of a checkpoint's record.

        Raises:
            ValueError: It has none.
        """
        slim, setup = record.slim, record.setup
        if slim.get("macs_g") is None:
            raise ValueError("its record has no figures: lfrns evaluate measures it")
        dense, figure = comparable_dense(asdict(record)), main_figure(slim)
        for side, figures in ((self.dense, dense), (self.slim, slim)):
            side.clear()
            found = {"accuracy": figures.get(figure.key), **{key: figures.get(key) for key in ("params_m", "macs_g")}}
            side |= {key: value for key, value in found.items() if value is not None}
        machine = setup.get("machine") or {}
        self.figure = {"label": figure.label, "form": figure.form}
        self.images, self.data = slim.get("images"), str(setup.get("dataset") or "")
        self.machine = {key: machine.get(key) for key in ("cpu", "threads", "device")}
        self.machine["torch"] = (setup.get("versions") or {}).get("torch")
        self.pushed = setup.get("pushed")

    def kept(self, key: str) -> float | None:
        """Return the share of a count, params_m or macs_g, that is kept."""
        return self.slim[key] / self.dense[key] if self.dense.get(key) and key in self.slim else None


def read_rows(directory: str | Path) -> list[Row]:
    """Read table.json, with the figures that the checkpoints' records have now.

    Raises:
        ValueError: It is damaged, or there is none.
    """
    directory = Path(directory)
    call = f"read_rows({str(directory)!r})"
    if not (directory / TABLE).is_file():
        raise ValueError(f"{call}: it has no {TABLE}. Name a folder that lfrns zoo wrote.")
    content = read_json(directory / TABLE, call)
    try:
        rows = [Row(**row) for row in content["rows"]]
        markdown_of(rows)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{call}: {TABLE} is damaged ({short(str(error), 120)}). Run lfrns zoo again.") from error
    for row in rows:
        path = directory / row.model / row.checkpoint / "record.json"
        if row.slim and path.is_file():
            row.take(Record.load(path))
    return rows


def write_zoo_index(directory: str | Path, rows: Sequence[Row], *, title: str = "Zoo") -> Path:
    """Write table.json and README.md, which change together; text that people wrote around the table stays.

    Args:
        directory: The zoo's folder.
        rows: In their order.
        title: Heading of a new page.
    Returns:
        Path of the README.
    Raises:
        OSError: The folder cannot be written, or another process is writing to it.
    """
    directory = Path(directory)
    readme, whole = directory / "README.md", directory.resolve()
    with locked(whole, f"write_zoo_index({str(directory)!r})"), draft_of(whole) as draft:
        settle(whole, _is_own)
        above, below = around(readme, START) or (f"# {escape(title)}\n\n", "\n")
        text = json.dumps({"rows": [asdict(row) for row in rows]}, indent=2, allow_nan=False) + "\n"
        (draft / TABLE).write_text(text, encoding="utf-8")
        (draft / readme.name).write_text(above + "\n".join([START, "", *markdown_of(rows), "", END]) + below, "utf-8")
        put_in_place(draft, whole, _is_own, exchanged=False)  # others may write to the checkpoints
    return readme


def markdown_of(rows: Sequence[Row], *, folders: bool = True) -> list[str]:
    """Return the table and its notes as lines of Markdown.

    Args:
        rows: The rows.
        folders: Link to the checkpoints' folders where there is no repository.
    """
    runtimes, label = runtimes_of(rows), accuracy_label(rows)
    head = ["checkpoint", "budget", "MACs kept", "params kept", f"{label}, dense", "slim"]
    head += [cell for runtime in runtimes for cell in (f"{runtime}, dense, ms", "slim, ms")]
    head += ["seconds", "peak, MiB", "status"]
    lines = [f"| {' | '.join(map(escape, head))} |", f"|---|---|{'---:|' * (len(head) - 3)}---|"]
    earlier: set[str] = set()
    for row in rows:
        there = bool(row.slim) and (folders or row.pushed)
        name = linked(row.checkpoint, {"pushed": row.pushed}, f"{row.model}/{row.checkpoint}") if there else None
        cells = [budget_of(row), number(row.kept("macs_g"), ".3f"), number(row.kept("params_m"), ".3f")]
        cells += [accuracy(row, side) for side in (row.dense, row.slim)]
        cells += [number(ms, ".2f") for runtime in runtimes for ms in row.ms.get(runtime, (None, None))]
        cells += [*costs(row, earlier), f"{row.status}: {row.reason}" if row.reason else row.status]
        lines.append(f"| {' | '.join([name or escape(row.checkpoint), *map(escape, cells)])} |")
    return [*lines, "", *(f"- {escape(note)}" for note in notes(rows))]


def is_zoo(directory: str | Path) -> bool:
    """Return whether `write_zoo_index` wrote a folder's README.md and table.json."""
    directory = Path(directory)
    return (directory / TABLE).is_file() and around(directory / "README.md", START) is not None


def runtimes_of(rows: Iterable[Row]) -> list[str]:
    """Return the runtimes that any row has times of, or a reason for none."""
    return list(dict.fromkeys(name for row in rows for name in (*row.ms, *row.left_out)))


def accuracy_label(rows: Iterable[Row]) -> str:
    """Return what the accuracy of all rows is called."""
    labels = list(dict.fromkeys(row.figure["label"] for row in rows if row.figure))
    return labels[0] if len(labels) == 1 else " or ".join(labels) or "accuracy"


def accuracy(row: Row, side: dict[str, float]) -> str:
    """Format the accuracy of one side."""
    return number(side.get("accuracy"), row.figure.get("form", ".2f"))


def number(value: float | None, form: str) -> str:
    """Format a figure, or return "not measured"."""
    return NOT_MEASURED if value is None else format(value, form)


def budget_of(row: Row) -> str:
    """Return a budget in words."""
    return ", ".join(f"{KINDS.get(kind, kind)} {share:g}" for kind, share in row.budget.items())


def costs(row: Row, earlier: set[str]) -> tuple[str, str]:
    """Return the seconds and the peak of memory in MiB of a row's run, or that they are those of a row above.

    Args:
        row: The row.
        earlier: Ids of the runs of the rows above; this one's is added.
    """
    run = row.run
    if not run:
        return NOT_MEASURED, NOT_MEASURED
    if run["id"] in earlier:
        return "same run", "same run"
    earlier.add(run["id"])
    seconds = f"{run['seconds']:.0f}" + (" (went on)" if run["attempts"] > 1 else "")
    peaks = [number(run["resident_mib"], ",.0f"), *([f"{run['gpu_mib']:,.0f} GPU"] if run.get("gpu_mib") else [])]
    return seconds, " + ".join(peaks)


def reasons(rows: Sequence[Row]) -> list[str]:
    """Return why rows are not done, in plain text: each reason once, with its rows."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            told.setdefault(f"{row.status}: {row.reason}", []).append(row.checkpoint)
    return [f"{', '.join(names)}: {why}" for why, names in told.items()]


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what the figures stand on, in plain text: each note once, with the rows that it is of if not of all."""
    told: dict[str, list[str]] = {}
    measured = [row for row in rows if row.slim]
    for row in measured:
        machine = row.machine
        threads = f"{machine.get('threads')} thread{'' if machine.get('threads') == 1 else 's'}"
        where = f"{machine.get('cpu')}, {threads}, {machine.get('device')}"
        accurate = f"{accuracy_label([row])} on {row.images or 'no'} images of {row.data or 'unknown data'}."
        timed = f"Times: a forward pass of one image in ms, dense and slim in turns, medians; {where}, torch "
        told.setdefault(f"{accurate[0].upper()}{accurate[1:]} {timed}{machine.get('torch')}.", []).append(
            row.checkpoint
        )
        for runtime, why in row.left_out.items():
            told.setdefault(f"No time in {runtime}: {why}.", []).append(row.checkpoint)
    lines = [
        text if len(names) == len(measured) else f"{', '.join(names)}: {text[0].lower() + text[1:]}"
        for text, names in told.items()
    ]
    if any(row.run for row in rows):
        lines.append(
            "Seconds, and peak of memory (MiB resident), are of the process that made all checkpoints of a model: "
            "analysis, cuts, retraining and measurement, without the times above."
        )
    return lines


def _is_own(name: str) -> bool:
    """Return whether `write_zoo_index` writes a file of this name in the folder."""
    return name in ("README.md", TABLE)
