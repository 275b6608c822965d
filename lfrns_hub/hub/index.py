"""A folder of checkpoints of one model at several budgets: their names, and the README that compares them."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lfrns_hub.format.markdown import escape
from lfrns_hub.format.untrusted import short
from lfrns_hub.measure import Record, comparable_dense, main_figure, nearness, why_no_dense
from lfrns_hub.runs import draft_of, locked, put_in_place, settle

PICTURE = "accuracy.png"
START = "<!-- lfrns_hub writes this table; what stands above and below it stays -->"
END = "<!-- end of the table -->"


def checkpoint_name(model: str, data: str, macs: float) -> str:
    """Name a checkpoint as the Hub's collections do: the architecture, how much is left, and the data.

    Args:
        model: A timm name, repo id, folder, or "package.module:function".
        data: A folder or a Hub id.
        macs: Fraction of the MACs kept.

    Example:
        >>> checkpoint_name("resnet50.a1_in1k", "uoft-cs/cifar100", 0.5)
        'resnet50.lfrns50_cifar100'
        >>> checkpoint_name("google/vit-base-patch16-224", "data/My Flowers/", 0.125)
        'vit-base-patch16-224.lfrns12p5_my_flowers'
    """
    arch = Path(model.rpartition(":")[2]).name.partition(".")[0]
    return f"{_plain(arch)}.lfrns{f'{100 * macs:.4g}'.replace('.', 'p')}_{_plain(Path(data).resolve().name.lower())}"


def write_index(directory: str | Path, title: str) -> Path:
    """Write README.md over the checkpoints in a folder: one table, and accuracy against MACs as a picture.

    Of an index that is there, what people wrote above and below the table stays, its title included; any other README
    is replaced.

    Args:
        directory: Its subfolders with a record.json are listed, the largest model first.
        title: Heading of a new one.
    Returns:
        The README. A checkpoint whose record cannot be read has a line that says so.
    Raises:
        ValueError: No subfolder holds a record that can be listed.
        OSError: The folder cannot be written, or another process is writing to it.
    """
    directory = Path(directory)
    records, unread = _read_records(directory)
    if not records:
        why = next((f"{name}: {why}" for name, why in unread.items()), "no subfolder has a record.json")
        raise ValueError(f"write_index({str(directory)!r}): {why.rstrip('.')}. Run lfrns slim first, or evaluate.")
    readme, whole = directory / "README.md", directory.resolve()
    with locked(whole, f"write_index({str(directory)!r})"), draft_of(whole) as draft:
        settle(whole, _is_own)
        above, below = _around(readme) or (f"# {escape(title)}\n\n", "\n")
        names = sorted(records, key=lambda name: (-records[name].slim["macs_g"], name))
        rows = _table({name: records[name] for name in names}, draft / PICTURE)
        rows += [f"\n- {escape(name)}: not listed, {escape(why)}" for name, why in unread.items()]
        block = "\n".join([START, "", *rows, "", END])
        (draft / readme.name).write_text(above + block + below, encoding="utf-8")
        put_in_place(draft, whole, _is_own, exchanged=False)  # others may write to the checkpoints
    return readme


def _read_records(directory: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Read the records of the checkpoints in a folder, by their names; and say of those that cannot be listed why."""
    records, unread = {}, {}
    for path in sorted(directory.glob("*/record.json")):
        if path.parent.name.startswith("."):  # the draft of a save
            continue
        try:
            record = Record.load(path)
            if record.slim.get("macs_g") is None:
                raise ValueError("its record.json has no macs_g. Measure it again by lfrns evaluate")
            cells(record.slim, comparable_dense(asdict(record)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            unread[path.parent.name] = short(str(error) or type(error).__name__, 300)
        else:
            records[path.parent.name] = record
    return records, unread


def _is_own(name: str) -> bool:
    """Return whether a file of this name in the folder is one that `write_index` writes."""
    return name in ("README.md", PICTURE)


def refresh_index(directory: str | Path) -> Path | None:
    """Bring the index over a folder of checkpoints up to date with their records.

    Args:
        directory: The folder above the checkpoints.
    Returns:
        Its README; None where there is none, or one that `write_index` did not write, which stays as it is.
    """
    readme = Path(directory) / "README.md"
    return write_index(directory, "") if _around(readme) else None


def _around(readme: Path) -> tuple[str, str] | None:
    """Return what stands above and below the table of an index; None of a file that is none."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    above, start, rest = text.partition(START)
    _, end, below = rest.partition(END)
    return (above, below) if start and end else None


def _table(records: dict[str, Record], picture: Path) -> list[str]:
    """Lay out the table and its footnotes, and draw the picture where all figures are of one occasion.

    What was measured at another time or on other images stands under a dense row of its own.
    """
    fields = {name: asdict(record) for name, record in records.items()}
    dense = {name: comparable_dense(record) for name, record in fields.items()}
    together: dict[str, list[str]] = {}
    for name, record in records.items():
        together.setdefault(record.slim.get("occasion") or name, []).append(name)
    first_slim = next(iter(records.values())).slim
    headings = columns(first_slim)
    lines = ["| checkpoint | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    for names in together.values():
        first = dense[names[0]]
        if first:
            label = "dense" if len(together) == 1 else f"dense, beside {', '.join(names)}"
            lines.append(f"| {escape(label)} | " + " | ".join(cells(first, first)) + " |")
        lines += [
            f"| [{escape(name)}]({quote(os.fsencode(name))}) | "
            + " | ".join(cells(records[name].slim, dense[name]))
            + " |"
            for name in names
        ]
    notes: dict[str, list[str]] = {}
    for name, record in records.items():
        notes.setdefault(_footnote(record, dense[name], why_no_dense(fields[name])), []).append(name)
    lines += [
        "",
        *(notes if len(notes) == 1 else (f"- {escape(', '.join(named))}: {note}" for note, named in notes.items())),
    ]
    first, key = dense[next(iter(records))], main_figure(first_slim).key
    if len(together) > 1:
        lines += ["", "No picture: the checkpoints were measured at different times, and such figures do not compare."]
    elif first and all(side.get(key) is not None for side in [first, *(r.slim for r in records.values())]):
        from lfrns_hub.plots import plot_ladder  # here: matplotlib is slow to import

        plot_ladder([record.slim for record in records.values()], first, picture)
        lines += ["", f"![Accuracy against MACs and latency, dense and slim]({PICTURE})"]
    return lines


def columns(side: dict[str, Any]) -> Sequence[str]:
    """Return the headings of the figures of one model, which its outputs decide."""
    near = nearness(side).label.replace("agreement with dense", "agreement")
    accuracy = main_figure(side).label
    return ("MACs kept", accuracy, near, "params, M", "GMACs", "latency, ms", "dense, ms", "size, MB")


def cells(side: dict[str, Any], dense: dict[str, Any] | None) -> Sequence[str]:
    """Return the figures of one model under `columns`."""
    kept = side["macs_g"] / dense["macs_g"] if dense and dense.get("macs_g") else None
    before = (dense or {}).get("latency_ms")
    figures = [
        (kept, ".3f"),
        (side.get(main_figure(side).key), main_figure(side).form),
        (
            100.0 if side is dense and side.get(main_figure(side).key) is not None else side.get(nearness(side).key),
            ".2f",
        ),
        (side.get("params_m"), ".3f"),
        (side.get("macs_g"), ".4f"),
        (side.get("latency_ms"), ".2f"),
        (before, ".2f"),
        (side.get("size_mb"), ".2f"),
    ]
    return ["not measured" if value is None else format(value, form) for value, form in figures]


def _footnote(record: Record, dense: dict[str, Any], why: str | None) -> str:
    """Say what the figures were taken on, and why the dense model's are missing where they are."""
    setup, images = record.setup, record.slim.get("images")
    machine = setup.get("machine") or {}
    beside = (
        "each beside the dense model in turns" if dense.get("latency_ms") is not None else "without the dense model"
    )
    return escape(
        f"Accuracy on {images or 'no'} images of {setup.get('dataset') or 'unknown data'}. Latency: batch 1, "
        f"{setup.get('dtype')}, {machine.get('device')} ({machine.get('cpu')}), {machine.get('threads')} threads, "
        f"{beside}{f' ({why})' if why else ''}. One MAC is two FLOPs."
    )


def _plain(name: str) -> str:
    """Keep what the Hub takes in a name."""
    return re.sub(r"[^\w-]+", "_", name).strip("_")
