"""Calls in a process that was forked while torch had threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_IMPORTED_IN = os.getpid()


@contextmanager
def one_thread_if_forked() -> Iterator[None]:
    """Compute on one thread in a process forked from the one that imported this package; also as a decorator.

    GNU's OpenMP waits there forever for threads that a fork does not copy. The workers of torch's DataLoader compute on
    one thread as well.
    """
    if os.getpid() == _IMPORTED_IN:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
