"""Batches hang on the seed, the epoch and their place in it alone."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from faulty_run import Pictures, mix
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from lfrns_hub.runs.seeded import apart, rounds, seeded_loader


def batches(loader: DataLoader, epoch: int, seed: int = 0) -> list[torch.Tensor]:
    seeded = seeded_loader(loader, seed, seed)
    seeded.batch_sampler.set_epoch(epoch)
    return [images for images, _ in apart(seeded, seed, epoch)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def loader(**options: Any) -> DataLoader:
    return DataLoader(Pictures(), 8, collate_fn=mix, **{"shuffle": True, **options})


def test_batches_are_the_same_with_any_workers_and_others_in_another_epoch_or_with_another_seed() -> None:
    first = batches(loader(), 1)
    random.random(), np.random.rand(), torch.rand(1)
    assert equal(batches(loader(), 1), first)
    assert equal(batches(loader(num_workers=2), 1), first)
    assert not equal(batches(loader(), 2), first)
    assert not equal(batches(loader(), 1, seed=1), first)


def test_the_order_is_that_of_a_generator_with_the_seed_and_the_epoch_added() -> None:
    seeded = seeded_loader(DataLoader(range(10), 4, shuffle=True), 5, 5)
    seeded.batch_sampler.set_epoch(2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(7)).tolist()
    assert [index for batch in seeded.batch_sampler for _, _, index in batch] == order
    assert [batch.tolist() for batch in seeded] == [order[:4], order[4:8], order[8:]]


def test_other_samplers_are_seeded_too_and_the_callers_stays_as_it_was() -> None:
    sampler = WeightedRandomSampler([1.0] * 30, 30)
    drawn = [batches(loader(shuffle=False, sampler=sampler), epoch) for epoch in (0, 0, 1)]
    assert equal(drawn[0], drawn[1])
    assert not equal(drawn[0], drawn[2])
    assert sampler.generator is None


def test_an_image_that_comes_twice_is_augmented_twice() -> None:
    twice = DataLoader(Pictures(), 2, sampler=[3, 3])
    (images,) = batches(twice, 0)
    assert not torch.equal(images[0], images[1])


class Together(Dataset):
    """Gives a batch at once, as `datasets` does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("one by one")

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [(torch.rand(2), index) for index in indices]


def test_a_dataset_that_gives_whole_batches_is_asked_for_them() -> None:
    first = batches(DataLoader(Together(), 3), 0)
    assert equal(batches(DataLoader(Together(), 3), 0), first)
    assert len(first) == 2


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(6):
            yield torch.rand(2)


def test_a_stream_is_left_as_it_is_and_seeded_by_epoch() -> None:
    stream = DataLoader(Stream(), 2)
    assert seeded_loader(stream, 0, 0) is stream
    drawn = [list(apart(stream, 0, epoch)) for epoch in (3, 3, 4)]
    assert equal(drawn[0], drawn[1])
    assert not equal(drawn[0], drawn[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_numbers_of_the_model_alone(workers: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [draw() for _ in range(3)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    seeded = seeded_loader(loader(num_workers=workers), 0, 0)
    assert [draw() for _ in islice(apart(seeded, 0, 0), 3)] == expected


def test_an_epoch_begins_anew_where_the_loader_ends_and_never_without_a_batch():
    assert list(rounds([1, 2, 3], 7, start=2)) == [3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="gave no batch"):
        list(rounds([], 2))
