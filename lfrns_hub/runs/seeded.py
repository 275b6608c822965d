"""Batches that hang on the seed, the epoch and their place in it alone: not on workers, processes or what ran before.

So training can go on from the middle of an epoch without loading again what went before.
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

Key = tuple[int, int, Any]  # epoch, place in it, index in the dataset


class SeededImages(Dataset):
    """A dataset that seeds python, numpy and torch for each image, so that its augmentation can be had again.

    One that draws for each image and then finishes a batch (`draw`, `finish`, as `load_data` gives it) is seeded for
    each image too. Any other that fetches whole batches (`__getitems__`) is seeded for each batch: its augmentation
    hangs on the batch size.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch  # as Accelerate calls it

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        epoch, place, index = key
        start_random(self.seed, epoch, place)
        return self.dataset[index]

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        source, indices = self.dataset, [index for _, _, index in keys]
        while isinstance(source, Subset):  # which fetches many at once whether its own source does or not
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
    """The batches of a batch sampler, in an order that the seed and the epoch set, each index with its place."""

    def __init__(self, batches: Any, order_seed: int):
        self.batches, self.order_seed, self.epoch = copy.copy(batches), order_seed, 0
        if hasattr(batches, "sampler"):
            self.batches.sampler = copy.copy(batches.sampler)
        self.batch_size = getattr(batches, "batch_size", None)
        self.drop_last = getattr(batches, "drop_last", False)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is run next, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Key]]:
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if hasattr(sampler, "generator"):  # all random ones of torch
                sampler.generator = torch.Generator().manual_seed(self.order_seed + self.epoch)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        place = 0
        for batch in self.batches:
            yield [(self.epoch, place + i, index) for i, index in enumerate(batch)]
            place += len(batch)


def seeded_loader(loader: DataLoader, seed: int, order_seed: int, *, pinned: bool = False) -> DataLoader:
    """Copy a loader so that order and augmentation are set by seeds.

    Args:
        loader: Any DataLoader. One of an IterableDataset, or without a batch sampler, is given back as it is.
        seed: Of the augmentation. It covers python's, numpy's and torch's own random numbers, in transforms and in
            `collate_fn`; generators that a dataset keeps for itself are beyond it.
        order_seed: Of the order: epoch e is shuffled by `order_seed + e`.
        pinned: Whether what workers load is to lie in pinned memory, which a GPU fetches by itself. Without workers
            a dataset may have its images on the GPU already, which cannot be pinned.
    Returns:
        A loader of the same batches; its `batch_sampler.set_epoch` is to be called before each epoch.
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
    """Yield batches with random numbers of their own, so that those of the model do not hang on how they are loaded."""
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
    """Yield the batches of an epoch from the one numbered `start` on; a loader with fewer begins anew.

    What comes before `start` is loaded and left out: a stream has no other way there.
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
    """What a loader's workers start with: a process group of their own, so that a SIGTERM to the run's spares them."""

    def __init__(self, then: Callable[[int], None] | None):
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        if self.then is not None:
            self.then(worker)


def start_random(*numbers: int) -> None:
    """Seed python's, numpy's and torch's CPU generator by a hash of some integers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=4).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)


def get_random() -> tuple[Any, Any, torch.Tensor]:
    """Return the states of python's, numpy's and torch's CPU generator."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Put states from `get_random` back."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@contextmanager
def random_kept() -> Iterator[None]:
    """Run something; python's, numpy's and torch's CPU generator are afterwards as before."""
    states = get_random()
    try:
        yield
    finally:
        set_random(states)
