"""Calibration images are shuffled by their content: what is held out is images, whatever order a loader has."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.method.recalibrate import recalibrated
from lfrns_hub.method.responses import fitting, held_out
from lfrns_hub.model_io.batches import shuffle_images
from lfrns_hub.options import read_loader

EVERY = 5


def numbered(count: int, size: int = 2) -> torch.Tensor:
    """Images [N, 1, size, size], each of a grey of its own."""
    return torch.arange(count).float().reshape(-1, 1, 1, 1).expand(-1, 1, size, size).clone()


def shuffled(images: torch.Tensor, labels, batch_size: int, seed: int = 0) -> list:
    """Batches of images in their order, shuffled."""
    batches = list(zip(images.split(batch_size), labels, strict=True))
    return shuffle_images(batches, held_out_every=EVERY, seed=seed)


def greys(batches: list) -> set[int]:
    """The images of some batches."""
    return {int(image.flatten()[0]) for batch in batches for image in batch[0]}


def test_of_a_loader_sorted_by_class_a_fifth_of_each_class_is_held_out() -> None:
    images = numbered(1000)
    batches = shuffled(images, (images[:, 0, 0, 0] // 100).long().split(50), 50)
    held, fitted = held_out(batches), fitting(batches)
    assert (len(greys(held)), len(greys(fitted)), greys(held) & greys(fitted)) == (200, 800, set())
    for part, share in ((held, 20), (fitted, 80)):
        per_class = torch.cat([labels for _, labels in part]).bincount(minlength=10)
        assert ((per_class - share).abs() < 15).all(), per_class  # sorted: all of a class on one side
    for some, labels in batches:
        assert torch.equal(some[:, 0, 0, 0] // 100, labels.float())


@pytest.mark.parametrize("count", [1, 4, 5, 6, 9, 31, 128, 640])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_every_image_comes_once_and_no_batch_is_larger_than_the_loaders(count: int, batch_size: int) -> None:
    images = numbered(count)
    batches = shuffled(images, [None] * len(images.split(batch_size)), batch_size)
    assert sorted(int(v) for batch, _ in batches for v in batch[:, 0, 0, 0]) == list(range(count))
    assert max(len(batch) for batch, _ in batches) <= batch_size
    assert (greys(fitting(batches)) & greys(held_out(batches)) == set()) == (count >= EVERY)
    assert all(labels is None for _, labels in batches)


def test_what_is_held_out_depends_on_the_images_and_the_seed_alone() -> None:
    images = numbered(400)
    order = torch.randperm(400)

    def held(images: torch.Tensor, batch_size: int, seed: int = 0) -> set[int]:
        return greys(held_out(shuffled(images, [None] * len(images.split(batch_size)), batch_size, seed)))

    assert held(images, 64) == held(images[order], 64) == held(images[order], 10)
    assert held(images, 64) != held(images, 64, seed=1)


@pytest.mark.parametrize(
    "labelled",
    [
        lambda numbers: numbers,
        lambda numbers: numbers.tolist(),
        lambda numbers: numbers.numpy(),
        lambda numbers: [{"boxes": torch.ones(1 + n % 3, 4), "grey": n} for n in numbers.tolist()],
        lambda numbers: {"grey": numbers, "of": {"twice": 2 * numbers}},
        lambda numbers: (numbers, torch.nn.functional.one_hot(numbers % 5, 5)),
        lambda numbers: [torch.zeros(n % 2 + 1) + n for n in numbers.tolist()],
    ],
)
def test_labels_of_any_form_follow_their_image(labelled) -> None:
    images = numbered(22)
    batches = shuffled(images, [labelled(part) for part in torch.arange(22).split(8)], 8)
    for some, labels in batches:
        expected = labelled(some[:, 0, 0, 0].long())
        assert type(labels) is type(expected)
        assert str(labels) == str(expected)


def test_images_of_several_sizes_stay_apart_and_keep_their_labels() -> None:
    batches = [
        (numbered(12, 4), torch.arange(12)),
        (numbered(30, 2), torch.arange(30)),
        (numbered(3, 8), torch.arange(3)),
    ]
    dealt = shuffle_images(list(batches), held_out_every=EVERY)
    assert dealt[0][0].shape[1:] == (1, 2, 2)  # the most frequent size
    for some, labels in dealt:
        assert torch.equal(some[:, 0, 0, 0], labels.float())
    sizes = {some.shape[-1]: 0 for some, _ in dealt}
    for some, _ in held_out(dealt):
        sizes[some.shape[-1]] += len(some)
    assert sizes == {2: 6, 4: 2, 8: 0}


def test_batches_are_let_go_one_after_another() -> None:
    batches = [(numbered(4), None) for _ in range(3)]
    gone = [weakref.ref(images) for images, _ in batches]

    class Last:
        """A batch that looks at the others when it is read."""

        def __len__(self) -> int:
            return 4

        def __iter__(self):
            assert [images() for images in gone] == [None] * 3
            return iter(numbered(4))

    batches.append((Last(), None))
    assert sum(len(images) for images, _ in shuffle_images(batches, held_out_every=EVERY)) == 16


def test_labels_in_some_batches_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="some batches have labels and others have none"):
        read_loader([(numbered(4), torch.arange(4)), numbered(4)], nn.Flatten(), 0)


def test_a_sorted_loader_and_a_shuffled_one_make_the_same_slim_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)
    ).eval()
    labels = torch.arange(4).repeat_interleave(25)
    images = torch.randn(100, 3, 8, 8) + labels[:, None, None, None]
    data, options = TensorDataset(images, labels), {"macs": 0.6, "fcr_steps": 3, "progress": False}
    in_order, in_another = (
        lfrns.slim(model, DataLoader(data, 25, shuffle=shuffle), **options).model.state_dict()
        for shuffle in (False, True)
    )
    assert all(torch.equal(tensor, in_another[name]) for name, tensor in in_order.items())


def test_an_image_alone_of_its_size_gives_no_statistics_and_hinders_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    several, alone = torch.randn(12, 3, 8, 8), torch.randn(1, 3, 6, 6)
    (of_all,), (of_several,) = recalibrated(model.eval(), [several, alone]), recalibrated(model, [several])
    assert torch.equal(of_all[2].running_mean, of_several[2].running_mean)
    assert recalibrated(model, [alone, torch.randn(1, 3, 7, 7)]) == []
