"""The Record of measured figures, its file, and its table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfrns_hub.format.terminal import cell
from lfrns_hub.format.untrusted import parse_json, read_json, short
from lfrns_hub.measure.figures import KINDS, Figure, heads_of, word_of
from lfrns_hub.measure.occasion import comparable_dense, why_no_dense
from lfrns_hub.runs import written_aside

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# Keys of numbers, or of None where not measured.
FIGURES = (
    *dict.fromkeys(figure.key for kind in KINDS.values() for figure in kind.figures),
    "images",
    "params_m",
    "macs_g",
    "flops_g",
    "latency_ms",
    "size_mb",
)
MAX_FIGURE = 1e15  # no figure is as large; excludes NaN and infinity
# Fields of a setup that are read, with their types.
SETUP = {
    **dict.fromkeys(("dense_id", "dense_missing", "pushed"), str),
    "machine": dict,
    "provenance": dict,
    "label_names": list,
    "controls": list,
    "budgets": list,
    "epochs": int,
}


@dataclass
class Record:
    """The measured figures of a slim model and, where given, of its dense one; None means not measured.

    Attributes:
        dense: output (meaning of the outputs: classes, labels, quantities or features; one word each for several
            heads), the figures that fit them (see `evaluate`), such as top1_pct, images, per_class_pct; and params_m,
            macs_g, flops_g, latency_ms, size_mb of the dense model.
        slim: The same for the slim model, plus agreement_pct and worst_class (for labels: the label that lost most)
            where the dense model was given; for quantities and features explained_pct, the share of the variance of
            the dense model's outputs that the slim model's explain, in percent.
            Each side states in `occasion` the call that measured it and in `images_id` the images: only figures
            measured together are ever compared.
        setup: Machine, dtype, batch and input size of the latency, versions, the slim model's provenance; `dense_id`
            of the dense model's weights, or `dense_missing`, why it was not measured; `pushed`, its repository.

    Example:
        >>> Record.from_json(Record(None, {"top1_pct": 87.3}).to_json()).slim["top1_pct"]
        87.3
    """

    dense: dict[str, Any] | None
    slim: dict[str, Any]
    setup: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as strict JSON (no NaN), indented, with one trailing newline."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read a record that `to_json` wrote.

        Raises:
            ValueError: The text is not a record.
        """
        return cls._from_fields(parse_json(text, "Record.from_json(...)"))

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "Record":
        """Build a record from its JSON fields."""
        if not {"slim"} <= fields.keys() <= {"dense", "slim", "setup"}:
            raise ValueError(
                f"Record.from_json({short(sorted(fields))}): a record has the keys dense, slim, setup. "
                "Is it record.json?"
            )
        dense, slim, setup = fields.get("dense"), fields["slim"], fields.get("setup", {})
        for side, figures in (("dense", dense or {}), ("slim", slim), ("setup", setup)):
            if not isinstance(figures, dict):
                raise ValueError(f"Record.from_json({side}={short(figures)}): figures by name are needed.")
            for key in FIGURES if side != "setup" else ():
                value = figures.get(key)
                if value is not None and not (isinstance(value, (int, float)) and abs(value) < MAX_FIGURE):
                    raise ValueError(
                        f"Record.from_json({side}.{key}={short(figures[key])}): a number or null is needed. Measure it "
                        "again by lfrns evaluate."
                    )
            for key in ("occasion", "images_id") if side != "setup" else ():
                if not isinstance(figures.get(key), (str, type(None))):
                    raise ValueError(f"Record.from_json({side}.{key}={short(figures[key])}): text or null is needed.")
        for key, kind in SETUP.items():
            if setup.get(key) is not None and not isinstance(setup[key], kind):
                raise ValueError(
                    f"Record.from_json(setup.{key}={short(setup[key])}): a {kind.__name__} or null is needed. Measure "
                    "it again by lfrns evaluate."
                )
        for key in ("controls", "budgets"):
            if not all(isinstance(row, dict) for row in setup.get(key) or []):
                raise ValueError(f"Record.from_json(setup.{key}={short(setup[key])}): rows of figures are needed.")
        return cls(dense, slim, setup)

    def save(self, path: str | Path) -> None:
        """Write the record to a file."""
        with written_aside(Path(path)) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Read the record that `save` wrote."""
        return cls._from_fields(read_json(path, f"Record.load({str(path)!r})"))


def format_table(record: Record) -> "Table":
    """Format a record as a table: dense, slim, and the change from a dense figure of the same occasion."""
    from rich.table import Table  # imported here: rich is used only for tables

    fields = asdict(record)
    why = why_no_dense(fields)
    caption = why and cell(f"Dense not measured: {short(why, 300)}.", 400, "table.caption")
    table = Table(title=cell(_title(record), style="table.title"), caption=caption)
    for heading, justify in (("", "left"), ("dense", "right"), ("slim", "right"), ("slim / dense", "right")):
        table.add_column(heading, justify=justify)
    dense, slim = comparable_dense(fields), record.slim
    for head, of_slim in heads_of(slim).items():
        kind = KINDS[word_of(of_slim)]
        of_dense = heads_of(dense).get(head, {})
        for figure in kind.figures:
            table.add_row(*_figure_row(figure, head, of_dense.get(figure.key), of_slim.get(figure.key)))
        if kind.worst:
            names = None if head else record.setup.get("label_names")
            table.add_row(*_worst_row(word_of(of_slim), head, of_slim.get("worst_class"), names))
    for label, key, form in (
        ("params, M", "params_m", ".3f"),
        ("FLOPs, G", "flops_g", ".4f"),
        ("MACs, G", "macs_g", ".4f"),
        ("latency, ms", "latency_ms", ".2f"),
    ):
        before, after = dense.get(key), slim.get(key)
        ratio = f"{after / before:.3f}" if before and after is not None else ""
        table.add_row(label, _text(before, form), _text(after, form), ratio)
    return table


def _figure_row(figure: Figure, head: str, before: float | None, after: float | None) -> "tuple[str | Text, ...]":
    """Format a figure of one head."""
    label, shown = cell(f"{head} {figure.label}".strip()), _text(after, figure.form)
    if not figure.change:
        return label, "", shown, ""
    points = " points" if figure.change == "points" else ""
    change = "" if None in (before, after) else f"{after - before:+{figure.form}}{points}"
    return label, _text(before, figure.form), shown, change


def _title(record: Record) -> str:
    """Return the number of images and the machine."""
    machine = record.setup.get("machine", {})
    images = record.slim.get("images")
    accuracy = f"{images} images tested" if images else "accuracy not measured"
    where = f"{record.setup.get('dtype')}, {machine.get('device')}, {machine.get('threads')} threads"
    return f"{accuracy}; latency: batch 1, {where}"


def _text(value: float | None, form: str) -> str:
    """Format a figure, or return "not measured"."""
    return "not measured" if value is None else format(value, form)


def _worst_row(word: str, head: str, worst: dict[str, Any] | None, names: Any) -> "tuple[str | Text, ...]":
    """Format the class or label that lost most."""
    label = f"{head} worst {'label' if word == 'labels' else 'class'}".strip()
    if worst is None:
        return cell(f"{label}, %"), "not measured", "not measured", ""
    name = short(str(names[worst["class"]] if names else worst["class"]))  # a name from a data set
    return (
        cell(f"{label} ({name}), %"),
        f"{worst['dense_pct']:.2f}",
        f"{worst['slim_pct']:.2f}",
        f"{-worst['drop_points']:+.2f} points",
    )
