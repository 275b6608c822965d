"""Trials of networks in separate processes: a network that hangs, dies or uses up the memory loses only its own row."""

import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lfrns_hub.coverage.cases import Case
from lfrns_hub.coverage.table import Row
from lfrns_hub.coverage.trial import measure, shorten


def run_cases(cases: Sequence[Case], *, workers: int = 2, time_limit: float = 240.0) -> Iterator[Row]:
    """Try networks in separate processes and yield each one's row as it finishes.

    Args:
        cases: The networks.
        workers: Number of processes at a time, one thread each.
        time_limit: Seconds for one network; its process is then killed.
    """
    # Before the child processes import numpy: one thread per process.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # imports take ten seconds: once, not once per network
        context.set_forkserver_preload(["lfrns_hub.coverage.processes", "torch._export", "torch._dynamo"])
    waiting, running = list(reversed(cases)), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                case = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(case, sender), daemon=True)
                process.start()
                sender.close()
                row = {"section": case.section, "family": case.family, "model": case.title, "option": case.option}
                running[receiver] = (process, row, time.monotonic())
            oldest = min(started for _, _, started in running.values())
            ready = multiprocessing.connection.wait(
                list(running), timeout=max(0.0, oldest + time_limit - time.monotonic())
            )
            for receiver, (process, row, started) in list(running.items()):
                alive = receiver not in ready or receive(receiver, row)
                late = time.monotonic() - started >= time_limit
                if alive and not late:
                    continue
                if alive:
                    process.kill()
                process.join()
                receiver.close()
                del running[receiver]
                yield finish(row, process.exitcode, time.monotonic() - started, time_limit if alive else None)
    finally:
        for process, _, _ in running.values():
            process.kill()


def work(case: Case, sender: Any) -> None:
    """Try one network, in its own process; the facts are sent to the parent."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    try:
        measure(case, lambda **facts: sender.send(facts))
    except Exception as error:  # any error becomes the network's row
        sender.send({"reason": shorten(f"{type(error).__name__}: {error}")})
    finally:
        sender.send({"seconds": time.process_time()})
        sender.close()


def receive(receiver: Any, row: Row) -> bool:
    """Add facts received from a process to its row; return False when there are no more."""
    try:
        row.update(receiver.recv())
    except EOFError:
        return False
    return True


def finish(row: Row, exitcode: int | None, seconds: float, limit: float | None) -> Row:
    """Complete a row: the time if the process could not report it, and the reason if it ended early."""
    row.setdefault("seconds", seconds)
    if limit is not None:
        row["reason"] = f"stopped after {limit:g} s"
    elif exitcode:
        how = f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exited with {exitcode}"
        row["reason"] = f"its process was {how}" if exitcode < 0 else f"its process {how}"
    return row
