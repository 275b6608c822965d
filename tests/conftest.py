"""What all tests share: few threads, no talk to the Hub, and the real data where it lies beside the checkout."""

import gc
import os
import resource
from collections.abc import Callable, Iterator

# Read by huggingface_hub when it is imported, so before everything else.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from lfrns_hub import plots
from lfrns_hub.checkpoint import files

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

# The networks are tiny: a second thread waits more than it works, and on a busy machine it makes a second a minute.
torch.set_num_threads(1)
# Tracing makes small objects by the million, which end by themselves: to look for them every 700 costs a tenth.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data and weights; the test is skipped where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared, the real data and weights")
    return SHARED


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def fill_disk() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond a size, which is what a program sees of a full disk; only until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size < 0 else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def free_port() -> str:
    """A port for processes to meet at: port 0 would have each of them wait at another."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def stamp(source: Any, path: Path) -> Path:
    """Stand in for plot_widths, which takes half of the time that a small checkpoint is saved in."""
    Image.new("L", (1, 1)).save(path, format="PNG")
    return path


@pytest.fixture(scope="session", autouse=True)
def _stamped() -> Iterator[None]:
    """Checkpoints come with a stamp in place of the picture of widths; tests of the picture itself ask for `drawn`."""
    files.plot_widths = stamp
    yield
    files.plot_widths = plots.plot_widths


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints come with the picture of their widths."""
    monkeypatch.setattr(files, "plot_widths", plots.plot_widths)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every matplotlib figure that is saved from here on, so that its axes and texts can be looked at."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(figure: Any, *args: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What modules have imported is no garbage: it is not looked through again, here or in forked children."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, and with no precision that an earlier test has settled."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(True)
    if datasets := sys.modules.get("datasets"):  # a stream that ends waits for threads that read the Hub
        datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
