"""Index of a folder of checkpoints of one model at several budgets: their names, and the README that compares them."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lfrns_hub.format.markdown import Markdown, escape
from lfrns_hub.format.untrusted import short
from lfrns_hub.hub.reach import address_of
from lfrns_hub.measure import Record, comparable_dense, main_figure, nearness, why_no_dense
from lfrns_hub.runs import draft_of, locked, put_in_place, settle

PICTURE = "accuracy.png"
START = "<!-- lfrns_hub writes this table; what stands above and below it stays -->"
END = "<!-- end of the table -->"


def checkpoint_name(
    model: str, data: str, macs: float | None = None, *, params: float | None = None, latency: float | None = None
) -> str:
    """Return the name of a checkpoint in the Hub's style: the architecture, the MACs kept, and the data.

    Args:
        model: A timm name, repo id, folder, or "package.module:function".
        data: A folder or a Hub id.
        macs, params, latency: Fractions that are kept, of those that are bounded.

    Example:
        >>> checkpoint_name("resnet50.a1_in1k", "uoft-cs/cifar100", 0.5)
        'resnet50.lfrns50_cifar100'
        >>> checkpoint_name("google/vit-base-patch16-224", "data/My Flowers/", 0.125)
        'vit-base-patch16-224.lfrns12p5_my_flowers'
        >>> checkpoint_name("resnet50", "flowers", 0.5, params=0.4), checkpoint_name("resnet50", "flowers", latency=0.7)
        ('resnet50.lfrns50_params40_flowers', 'resnet50.lfrns_latency70_flowers')
    """
    arch = Path(model.rpartition(":")[2]).name.partition(".")[0]
    kept = "" if macs is None else _percent(macs)
    kept += "".join(
        f"_{kind}{_percent(share)}" for kind, share in (("params", params), ("latency", latency)) if share is not None
    )
    return f"{_plain(arch)}.lfrns{kept}_{_plain(Path(data).resolve().name.lower())}"


def write_index(directory: str | Path, title: str) -> Path:
    """Write the README.md of a folder of checkpoints: one table, and a plot of accuracy against MACs.

    In an existing index, text that people wrote above and below the table is kept, including its title; any other
    README is replaced.

    Args:
        directory: Folder whose subfolders with a record.json are listed, the largest model first.
        title: Heading of a new index.
    Returns:
        Path of the README. A checkpoint whose record cannot be read has a line that says so.
    Raises:
        ValueError: No subfolder has a record that can be listed.
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
        above, below = around(readme) or (f"# {escape(title)}\n\n", "\n")
        names = sorted(records, key=lambda name: (-records[name].slim["macs_g"], name))
        rows = _table({name: records[name] for name in names}, draft / PICTURE)
        rows += [f"\n- {escape(name)}: not listed, {escape(why)}" for name, why in unread.items()]
        block = "\n".join([START, "", *rows, "", END])
        (draft / readme.name).write_text(above + block + below, encoding="utf-8")
        put_in_place(draft, whole, _is_own, exchanged=False)  # others may write to the checkpoints
    return readme


def _read_records(directory: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Read the records of the checkpoints in a folder; return them by name, and why others cannot be listed."""
    records, unread = {}, {}
    for path in sorted(directory.glob("*/record.json")):
        if path.parent.name.startswith("."):  # the draft of a save
            continue
        try:
            record = Record.load(path)
            if record.dense and not record.slim:  # of a dense model, by lfrns train
                continue
            if record.slim.get("macs_g") is None:
                raise ValueError("its record.json has no macs_g. Measure it again by lfrns evaluate")
            cells(record.slim, comparable_dense(asdict(record)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            unread[path.parent.name] = short(str(error) or type(error).__name__, 300)
        else:
            records[path.parent.name] = record
    return records, unread


def _is_own(name: str) -> bool:
    """Return whether `write_index` writes a file of this name in the folder."""
    return name in ("README.md", PICTURE)


def refresh_index(directory: str | Path) -> Path | None:
    """Update the index of a folder of checkpoints from their records.

    Args:
        directory: The folder that contains the checkpoints.
    Returns:
        Path of its README; None if there is none, or if `write_index` did not write it: then it is unchanged.
    """
    readme = Path(directory) / "README.md"
    return write_index(directory, "") if around(readme) else None


def around(readme: Path, begin: str = START) -> tuple[str, str] | None:
    """Return the text above and below the table of an index, which begins with a mark; None for any other file."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    above, start, rest = text.partition(begin)
    _, end, below = rest.partition(END)
    return (above, below) if start and end else None


def _table(records: dict[str, Record], picture: Path) -> list[str]:
    """Return the table and its footnotes, and draw the plot if all figures are from one occasion.

    Figures measured at another time or on other images are listed below a dense row of their own.
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
            f"| {linked(name, records[name].setup, name)} | "
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
        from lfrns_hub.plots import plot_ladder  # imported here: matplotlib is slow

        archs, slim = {name.partition(".lfrns")[0] for name in records}, [record.slim for record in records.values()]
        title = f"{archs.pop()}: slimmed to several budgets" if len(archs) == 1 else ""
        plot_ladder(slim, first, picture, title=title, setup=next(iter(records.values())).setup)
        lines += ["", f"![Accuracy against MACs and latency, dense and slim]({PICTURE})"]
    return lines


def linked(name: str, setup: dict[str, Any], path: str) -> Markdown:
    """Return a checkpoint's name with a link to its repository if it was pushed, else to its folder.

    Args:
        name: Name to show.
        setup: That of its record.
        path: The folder, relative to the page.
    """
    return Markdown(f"[{escape(name)}]({address_of(setup.get('pushed')) or quote(os.fsencode(path))})")


def columns(side: dict[str, Any]) -> Sequence[str]:
    """Return the headings of the figures of one model, which depend on its outputs."""
    near = nearness(side).label.replace("agreement with dense", "agreement")
    accuracy = main_figure(side).label
    return ("MACs kept", accuracy, near, "params, M", "GMACs", "latency, ms", "dense, ms", "size, MB")


def cells(side: dict[str, Any], dense: dict[str, Any] | None) -> Sequence[str]:
    """Return the figures of one model for `columns`."""
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
    """Return how the figures were measured, and why the dense model's are missing if they are."""
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


def _percent(share: float) -> str:
    """Return a share in percent as a part of a name."""
    return f"{100 * share:.4g}".replace(".", "p")


def _plain(name: str) -> str:
    """Return a name with only the characters that the Hub allows."""
    return re.sub(r"[^\w-]+", "_", name).strip("_")
