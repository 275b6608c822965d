"""Batches that depend only on the seed, the epoch and their position: not on workers, processes or earlier work.

So training can resume in the middle of an epoch without loading its earlier batches again.
"""

import copy
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

Key = tuple[int, int, Any]  # epoch, position in it, index in the dataset


class SeededImages(Dataset):
    """A dataset that seeds python, numpy and torch for each image, so that its augmentation is reproducible.

    A dataset that draws for each image and then finishes a batch (`draw`, `finish`, as from `load_data`) is also seeded
    for each image. Any other that fetches whole batches (`__getitems__`) is seeded for each batch: its augmentation
    depends on the batch size.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch  # called by Accelerate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        epoch, place, index = key
        start_random(self.seed, epoch, place)
        return self.dataset[index]

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        source, indices = self.dataset, [index for _, _, index in keys]
        while isinstance(source, Subset):  # it has __getitems__ whether its own source does or not
            indices = [source.indices[index] for index in indices]
            source = source.dataset
        if hasattr(source, "draw") and hasattr(source, "finish"):
            drawn = []
            for (epoch, place, _), index in zip(keys, indices, strict=True):
                start_random(self.seed, epoch, place)
                drawn.append(source.draw(index))
            return source.finish(drawn)
        if getattr(source, "__getitems__", None) is None:
            return [self[key] for key in keys]
        start_random(self.seed, *keys[0][:2])
        return source.__getitems__(indices)


class SeededBatches(Sampler):
    """The batches of a batch sampler, in an order set by seed and epoch, each index with its position."""

    def __init__(self, batches: Any, order_seed: int):
        self.batches, self.order_seed, self.epoch = copy.copy(batches), order_seed, 0
        if hasattr(batches, "sampler"):
            self.batches.sampler = copy.copy(batches.sampler)
        self.batch_size = getattr(batches, "batch_size", None)
        self.drop_last = getattr(batches, "drop_last", False)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Key]]:
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if hasattr(sampler, "generator"):  # all random samplers of torch
                sampler.generator = torch.Generator().manual_seed(self.order_seed + self.epoch)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        place = 0
        for batch in self.batches:
            yield [(self.epoch, place + i, index) for i, index in enumerate(batch)]
            place += len(batch)


def seeded_loader(loader: DataLoader, seed: int, order_seed: int, *, pinned: bool = False) -> DataLoader:
    """Return a copy of a loader whose order and augmentation are set by seeds.

    Args:
        loader: Any DataLoader. With an IterableDataset, or without a batch sampler, it is returned unchanged.
        seed: Seed of the augmentation. It covers python's, numpy's and torch's own random numbers, in transforms and in
            `collate_fn`; a dataset's own generators are not covered.
        order_seed: Seed of the order: epoch e is shuffled by `order_seed + e`.
        pinned: Whether batches of workers should be in pinned memory, for asynchronous transfer to a GPU. Without
            workers a dataset may have its images on the GPU already, which cannot be pinned.
    Returns:
        A loader of the same batches; call its `batch_sampler.set_epoch` before each epoch.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return loader
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    kept += ("generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order")
    options = {name: getattr(loader, name) for name in kept if hasattr(loader, name)}
    options["pin_memory"] = loader.pin_memory or (pinned and loader.num_workers > 0)
    options["worker_init_fn"] = OwnGroup(loader.worker_init_fn)
    batches = SeededBatches(loader.batch_sampler, order_seed)
    return DataLoader(SeededImages(loader.dataset, seed), batch_sampler=batches, **options)


def apart(batches: Iterable[Any], seed: int, epoch: int) -> Iterator[Any]:
    """Yield batches with separate random numbers, so that those of the model do not depend on the loading."""
    states = None
    iterator = None
    while True:
        with random_kept():
            if iterator is None:
                start_random(seed, epoch, -1)
                iterator = iter(batches)
            else:
                set_random(states)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            states = get_random()
        yield batch


def rounds(loader: Iterable[Any], batches: int, start: int = 0) -> Iterator[Any]:
    """Yield the batches of an epoch from number `start` on; a loader with fewer is started again.

    Batches before `start` are loaded and skipped: a stream has no other way.
    """
    number = 0
    while number < batches:
        begun = number
        for batch in itertools.islice(loader, batches - number):
            if number >= start:
                yield batch
            number += 1
        if number == begun:
            raise ValueError(
                "retrain(loader): the stream, or this process's share of it, gave no batch. Give it as many images as "
                "fill one for each process, or start fewer processes."
            )


class OwnGroup:
    """Worker initialisation: a process group of its own, so that a SIGTERM to the run's group spares the workers."""

    def __init__(self, then: Callable[[int], None] | None):
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        if self.then is not None:
            self.then(worker)


def start_random(*numbers: int) -> None:
    """Seed python's, numpy's and torch's CPU generators by a hash of some integers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=4).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)


def get_random() -> tuple[Any, Any, torch.Tensor]:
    """Return the states of python's, numpy's and torch's CPU generators."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Restore states from `get_random`."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@contextmanager
def random_kept() -> Iterator[None]:
    """Run something, and restore python's, numpy's and torch's CPU generators afterwards."""
    states = get_random()
    try:
        yield
    finally:
        set_random(states)
