"""`lfrns zoo`: models by budgets by runtimes, each model in a process of its own, and one table of all."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lfrns_cli.commands import Zoo
from lfrns_cli.zoo_file import ZooPlan, read_zoo, settings_of
from lfrns_hub.checkpoint import render_card_again
from lfrns_hub.cli.cards import push_each
from lfrns_hub.cli.resume import is_unfinished
from lfrns_hub.cli.terminal import show
from lfrns_hub.cli.zoo_model import JOB, LOG, OVER, Place
from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.hub.lineage import refuse_unlicensed
from lfrns_hub.hub.push import collect
from lfrns_hub.hub.reach import repository_of
from lfrns_hub.hub.zoo_index import (
    DONE,
    FAILED,
    NOT_MEASURED,
    Row,
    accuracy,
    accuracy_label,
    budget_of,
    costs,
    notes,
    number,
    reasons,
    runtimes_of,
    write_zoo_index,
)
from lfrns_hub.measure import Record
from lfrns_hub.runs import entries, locked, written_aside
from lfrns_hub.zoo import origin_of

NOTE = Path("work", "zoo.json")
CHILD = "import sys; from lfrns_hub.cli.zoo_model import main; main(sys.argv[1])"
STOP_SECONDS = 60  # of a model's process, from when it is told to stop: it finishes a step and keeps it
LAST_LINES = 64 << 10  # bytes of a log that are searched for a reason


def zoo(asked: Zoo) -> int:
    """Make what a file asks for and is not there yet, and the table of all; returns 1 where something failed."""
    plan = read_zoo(asked.file)
    runtimes = list(plan.zoo.runtimes if plan.zoo.runtimes is not None else ["eager"])
    places = [Place(plan.out, run) for run in plan.runs]
    call = f"lfrns zoo {asked.file}"
    with locked(plan.out, call):
        _check_folder(plan, places, call)
        _refuse_unlicensed(plan, call)
        failures, rows = dict.fromkeys((place.run.name for place in places), "not begun yet"), []
        for number_of, place in enumerate(places, start=1):
            told = f"[{number_of}/{len(places)}] {place.run.name}"
            failures[place.run.name] = _make(place, asked, runtimes, told)
            rows = [row for one in places for row in _rows_of(one, failures[one.run.name], runtimes)]
            write_zoo_index(plan.out, rows, title=plan.zoo.collection or "Zoo")
        _state_licences(places, rows)
        lines, found = _publish(plan, rows)
        readme = write_zoo_index(plan.out, rows, title=plan.zoo.collection or "Zoo")
    again = [f"Not all is done. The same command goes on with what is missing; logs: {plan.out / 'work'}/*/{LOG}"]
    unfinished = any(row.status != DONE for row in rows)
    found |= {"rows": [asdict(row) for row in rows], "index": str(readme)}
    lines = [*reasons(rows), *notes(rows), *lines, f"Index: {readme}", *(again if unfinished else [])]
    show(asked.as_json, found, _table(rows), *lines)
    return 1 if unfinished else 0


def _check_folder(plan: ZooPlan, places: list[Place], call: str) -> None:
    """Refuse a folder that no zoo is in, and settings other than those that checkpoints in it were made with.

    Raises:
        FileExistsError, ValueError: It is one, or they differ.
    """
    note = plan.out / NOTE
    if plan.out.exists() and not plan.out.is_dir():
        raise FileExistsError(f"{call}: out {plan.out}: is a file. Name a folder.")
    if plan.out.is_dir() and entries(plan.out) and not note.is_file():
        raise FileExistsError(f"{call}: out {plan.out}: is not empty, and holds no zoo. Name another folder.")
    before = read_json(note, f"{call}: {note}") if note.is_file() else {}
    now = {}
    for place in places:
        name, settings = place.run.name, settings_of(place.run)
        begun = is_unfinished(place.directory / "work") or any(map(place.is_made, place.names()))
        earlier = before.get(name)
        if begun and isinstance(earlier, dict) and earlier != settings:
            key, was, is_now = next(_differences(earlier, settings))
            raise ValueError(
                f"{call}: {name}: {key} is {short(is_now)}, and was {short(was)} when {place.directory} was begun. "
                f"Undo this, name another out, or remove that folder to make {name} again."
            )
        if earlier != settings and place.work.is_dir():
            shutil.rmtree(place.work)  # what was noted then is of other settings
        now[name] = settings
        if place.directory.is_dir() and not any(path.is_file() for path in place.directory.rglob("*")):
            shutil.rmtree(place.directory)  # a run that was killed before it wrote anything
    with written_aside(note) as partial:
        partial.write_text(json.dumps(before | now, indent=2) + "\n", encoding="utf-8")


def _differences(was: dict[str, Any], now: dict[str, Any], above: str = "") -> Any:
    """Yield the keys, with both values, that differ between two settings."""
    for key in sorted(was.keys() | now.keys()):
        one, other = was.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{above}{key}.")
        elif one != other:
            yield f"{above}{key}", one, other


def _refuse_unlicensed(plan: ZooPlan, call: str) -> None:
    """Refuse to begin what could not be pushed in the end.

    Raises:
        ValueError: A model's base states no licence, or one that forbids it, and the file gives none.
    """
    for place, run in enumerate(plan.runs if plan.zoo.push_to_hub else ()):
        if run.license is None:
            facts = origin_of(run.model, weights=run.weights, base_model=run.base_model)
            named = f"{call}: push_to_hub {plan.zoo.push_to_hub}: models[{place}] {run.name}"
            refuse_unlicensed(facts, named, "license: ID of that model in the file, as license: mit")


def _make(place: Place, asked: Zoo, runtimes: list[str], told: str) -> str:
    """Run the process of a model, if anything of it is missing; returns why it failed, "" if it did not."""
    if place.is_done(runtimes):
        print(f"{told}: there already", file=sys.stderr)
        return ""
    log = place.work / LOG
    several = "s" if len(place.run.budgets) > 1 else ""
    print(f"{told}: {len(place.run.budgets)} budget{several}; log: {log}", file=sys.stderr, flush=True)
    command = ["zoo", asked.file]
    content = {"command": command, "out": str(place.out), "run": asdict(place.run), "runtimes": runtimes}
    place.write(JOB, content)
    (place.work / OVER).unlink(missing_ok=True)
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # a model's own module may be there
    with log.open("ab", buffering=0) as file:
        file.write(f"\n$ {shlex.join(['lfrns', *command])}\n".encode())
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(place.work / JOB)],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,  # ends with this process
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for this process, which passes it on
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()
            print("The same command goes on with what is missing.", file=sys.stderr)
            raise
        finally:
            process.stdin.close()
    over = place.work / OVER
    failed = read_json(over, str(over)) if over.is_file() else {}
    why = "; ".join(failed.values()) or (_reason(log, begin, code) if code else "")
    print(f"{told}: {why or 'done'}", file=sys.stderr, flush=True)
    return why


def _reason(log: Path, begin: int, code: int) -> str:
    """Return why a process ended: the signal, or the last line of what it wrote."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (of all memory used up, perhaps)" if name == "SIGKILL" else "")
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - LAST_LINES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Warning: ", "ValueError: ", "OSError: ")) or "Error: " in line]
    return short((told or lines or [f"exit code {code}"])[-1], 300)


def _rows_of(place: Place, why: str, runtimes: list[str]) -> list[Row]:
    """Return the rows of a model, from what lies in its folders.

    Args:
        place: The model.
        why: Why its process failed; "" if it did not.
        runtimes: Those that were asked for.
    """
    over = place.work / OVER
    failed = read_json(over, str(over)) if over.is_file() else {}
    rows = []
    for name, budget in zip(place.names(), place.run.budgets, strict=True):
        row = Row(place.run.name, name, budget.shares)
        rows.append(row)
        if not place.is_made(name):
            never = (place.note(name, "never") or {}).get("why")
            row.reason = _public(never or failed.get(name) or why or "it was not measured, see the log")
            continue
        try:
            row.take(Record.load(place.directory / name / "record.json"))
        except ValueError as error:
            row.reason = _public(str(error))
            continue
        timed, row.run = place.note(name, "timed") or {}, place.note(name, "made") or {}
        row.ms = {runtime: ms for runtime, ms in timed.get("ms", {}).items() if runtime in runtimes}
        row.left_out = {what: told for what, told in timed.get("left_out", {}).items() if what in runtimes}
        row.status = DONE
        if not place.is_timed(name, runtimes):
            row.status, row.reason = "not timed", _public(why or "see the log")
    return rows


def _public(reason: str) -> str:
    """Return a reason for the table, which others may see: of a path the last part, and no more than a few lines."""
    return short(re.sub(r"(?<![\w:/])/(?:[^\s/'\"]+/)+", "", reason), 300)


def _state_licences(places: list[Place], rows: list[Row]) -> None:
    """Write the licences that the file gives onto the cards that state another."""
    for place in places:
        for row in rows:
            folder = place.directory / row.checkpoint
            if place.run.license and row.model == place.run.name and row.status != FAILED:
                record = Record.load(folder / "record.json")
                if record.setup.get("license") != place.run.license:
                    render_card_again(folder, record=record, license=place.run.license)


def _publish(plan: ZooPlan, rows: list[Row]) -> tuple[list[str], dict[str, Any]]:
    """Push what was made and collect it, if the file says so; rows of what was not pushed say why.

    Returns:
        What to say of it, in lines and as JSON has it.
    """
    owner = plan.zoo.push_to_hub
    if owner is None:
        return [], {"pushed": [], "collection": None}
    made = {plan.out / row.model / row.checkpoint: row for row in rows if row.status != FAILED}
    repositories = {folder: f"{owner}/{row.checkpoint}" for folder, row in made.items()}
    urls, failed = push_each(repositories, with_images=plan.zoo.with_images, private=plan.zoo.private)
    for folder, error in failed.items():
        made[folder].status, made[folder].reason = "not pushed", _public(str(error))
    for folder, url in urls.items():
        made[folder].pushed = repository_of(url)
    lines, collection = [f"Pushed: {url}" for url in urls.values()], None
    if plan.zoo.collection and urls:
        pushed = [row.pushed for row in rows if row.pushed]
        try:
            collection = collect(plan.zoo.collection, owner, pushed, private=plan.zoo.private)
            lines.append(f"Collection: {collection}")
        except ConnectionError as error:
            for row in rows:
                if row.pushed and row.status == DONE:
                    row.status, row.reason = "not collected", _public(str(error))
    return lines, {"pushed": list(urls.values()), "collection": collection}


def _table(rows: list[Row]) -> Table:
    """Lay out the rows for the terminal, each with the dense model's figures above the slim one's."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model\nbudget")
    table.add_column("")
    runtimes = [runtime for runtime in runtimes_of(rows) if any(runtime in row.ms for row in rows)]
    for heading in ("MACs", "params", accuracy_label(rows).replace(", ", "\n"), *(f"{name}\nms" for name in runtimes)):
        table.add_column(heading, justify="right")
    table.add_column("seconds\nMiB", justify="right")
    table.add_column("status")
    earlier: set[str] = set()
    for row in rows:
        shares = [number(row.kept(key), ".3f") for key in ("macs_g", "params_m")]
        pairs = [(number(1.0 if row.slim else None, ".3f"), share) for share in shares]
        pairs += [(accuracy(row, row.dense), accuracy(row, row.slim))]
        pairs += [tuple(number(ms, ".2f") for ms in row.ms.get(runtime, (None, None))) for runtime in runtimes]
        pairs += [costs(row, earlier)]
        cells = ["\n".join("-" if part == NOT_MEASURED else part for part in pair) for pair in pairs]
        table.add_row(f"{row.model}\n{budget_of(row)}", "dense\nslim", *cells, row.status)
    return table
