"""A limit to what a piece of a test may allocate, which the system itself holds."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

GIBIBYTE = 1 << 30


@contextlib.contextmanager
def limited(more: int = GIBIBYTE) -> Iterator[None]:
    """Let this process take so many bytes of address space more than now; beyond it allocations fail."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        pytest.skip("needs Linux: /proc/self/statm")
    used = int(pages.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
