"""Streams of pictures: every picture once, whatever the number of processes, in another order each epoch."""

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lfrns_hub.pictures.stream import stream_data
from lfrns_hub.retrain import retrain

FILES, IN_EACH = 4, 10


def pixels(picture: Image.Image) -> torch.Tensor:
    """Return the picture's grey value."""
    return torch.tensor(picture.getpixel((0, 0))).float()


def noisy(picture: Image.Image) -> torch.Tensor:
    """Return the picture [3, 2, 2], augmented."""
    return torch.full((3, 2, 2), picture.getpixel((0, 0)) / 40) + 0.1 * torch.randn(3, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parquet files of 2x2 pictures, each of a grey of its own."""
    folder = tmp_path_factory.mktemp("stream")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    for file in range(FILES):
        greys = range(file * IN_EACH, (file + 1) * IN_EACH)
        rows = {"image": [Image.new("L", (2, 2), grey) for grey in greys], "label": [grey % 2 for grey in greys]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"train-{file:05}-of-{FILES:05}.parquet"))
    return folder


def read(loader):
    """Return the greys of an epoch in order."""
    return [int(grey) for batch in loader for grey in batch["pixel_values"]]


def labelled(loader):
    """Return the greys of an epoch, ascending, each with its label."""
    return sorted((int(g), int(y)) for b in loader for g, y in zip(b["pixel_values"], b["labels"], strict=True))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_picture_once(folder, processes):
    stream = stream_data(folder, "train", transform=pixels)
    assert (stream.images, stream.class_names) == (FILES * IN_EACH, ["even", "odd"])
    greys = []
    for rank in range(processes):
        share = {"num_processes": processes, "process_index": rank, "dispatch_batches": False}
        greys += read(prepare_data_loader(stream.loader(4), **share))
    assert sorted(greys) == list(range(FILES * IN_EACH))


def test_order_follows_seed_and_epoch(folder):
    loader = prepare_data_loader(stream_data(folder, "train", transform=pixels, seed=3).loader(4))
    same = prepare_data_loader(stream_data(folder, "train", transform=pixels, seed=3).loader(4))
    first, again = read(loader), read(same)
    loader.set_epoch(1)
    second = read(loader)
    assert first == again != list(range(FILES * IN_EACH))
    assert sorted(second) == sorted(first) and second != first


def test_front_is_labelled_and_the_same_everywhere(folder):
    stream = stream_data(folder, "train", transform=pixels, seed=1)
    front = stream.front(12, pixels)
    assert [int(image) % 2 for image, _ in front] == [label for _, label in front]
    assert len({int(image) for image, _ in front}) == 12
    assert [int(image) for image, _ in front] == [int(image) for image, _ in stream.front(12, pixels)]


@pytest.mark.parametrize("files", [1, 5])
def test_the_front_shows_all_files_and_says_where_it_shows_few_classes(files, tmp_path, caplog, monkeypatch):
    """Ten classes, sorted, each of 30 pictures; a buffer of 40 sees all files or the first two classes of the one."""
    monkeypatch.setattr("lfrns_hub.pictures.stream.SHUFFLE_BUFFER", 40)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for file in range(files):
        labels = [row * 10 // 300 for row in range(300 * file // files, 300 * (file + 1) // files)]
        rows = {"image": [Image.new("L", (2, 2), label) for label in labels], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"train-{file}.parquet"))
    seen = {label for _, label in stream_data(tmp_path, "train", transform=pixels).front(15, pixels)}
    if files == 1:
        assert len(seen) <= 3 and "of 10 classes: the files are sorted by class" in caplog.text
    else:
        assert {label // 2 for label in seen} == set(range(5)) and not caplog.text


def test_folder_of_pictures(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (2, 2), number).save(tmp_path / "train" / name / f"{number}.png")
    stream = stream_data(tmp_path, "train", transform=pixels)
    assert (stream.images, stream.class_names) == (6, ["cat", "dog"])
    assert sorted(read(stream.loader(4))) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("accumulated", "stop"), [(1, 7), (3, 5)], ids=["in an epoch", "after one"])
def test_training_on_a_stream_goes_on_where_it_was_stopped(accumulated, stop, folder, tmp_path):
    def train(name, stop=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        stream = stream_data(folder, "train", transform=noisy, seed=1)

        def track(values, step):
            if step == stop:
                raise KeyboardInterrupt

        options = {"epochs": 2, "images_per_epoch": stream.images, "progress": False, "tracker": track}
        options["gradient_accumulation_steps"] = accumulated  # 10 batches an epoch: 12 where three make a step
        return retrain(model, stream.loader(4), checkpoint_dir=tmp_path / name, checkpoint_every=1, **options)

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop=stop)
    again = train("stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_an_epoch_of_a_stream_has_as_many_images_as_is_said(folder):
    stream, steps = stream_data(folder, "train", transform=noisy), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    tracked = {"progress": False, "tracker": lambda _, step: steps.append(step)}
    retrain(model, stream.loader(4), epochs=1, images_per_epoch=100, **tracked)
    assert len(steps) == 25  # of 40 images: begun anew twice
    with pytest.raises(ValueError, match=r"the length of an epoch. Pass images_per_epoch"):
        retrain(model, stream.loader(4), epochs=1)
    sized = DataLoader(TensorDataset(torch.zeros(8, 12), torch.zeros(8, dtype=torch.int64)), 4)
    with pytest.raises(ValueError, match=r"images_per_epoch=4\): the loader has 8 images .* Leave it out"):
        retrain(model, sized, epochs=1, images_per_epoch=4)


def test_refuses_what_cannot_be_streamed(folder, tmp_path):
    with pytest.raises(ValueError, match=r"stream_data\(.*'train'\): there is no column 'kind'. It has image, label"):
        stream_data(folder, "train", transform=pixels, label_column="kind")
    with pytest.raises(ValueError, match="there is no such folder"):
        stream_data(tmp_path / "none", "train", transform=pixels)


def test_damaged_pictures_are_left_out_and_named(tmp_path, caplog):
    for number in range(8):
        path = tmp_path / "train" / ("even", "odd")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), number).save(path)
    (tmp_path / "train" / "odd" / "3.png").write_text("no picture")
    stream = stream_data(tmp_path, "train", transform=pixels)
    assert labelled(stream.loader(4)) == [(grey, grey % 2) for grey in range(8) if grey != 3]
    assert "3.png cannot be read" in caplog.text
    for path in tmp_path.rglob("*.png"):
        path.write_text("no picture")
    with pytest.raises(ValueError, match=r"3 pictures in a row cannot be read, at most 2 .*png.*raise max_unreadable"):
        read(stream_data(tmp_path, "train", transform=pixels, max_unreadable=2).loader(4))
    with pytest.raises(ValueError, match=r"the stream holds no pictures, 8 that cannot be read: \d\.png \(.*Check the"):
        stream_data(tmp_path, "train", transform=pixels).front(4, pixels)
    model, stream = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), stream_data(tmp_path, "train", transform=noisy)
    with pytest.raises(ValueError, match=r"retrain\(loader\): the stream, .* gave no batch"):
        retrain(model, stream.loader(4), epochs=1, images_per_epoch=stream.images, progress=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_that_begins_with_damaged_pictures_begins_with_readable_ones(seed, tmp_path):
    paths = [tmp_path / "train" / ("even", "odd")[number % 2] / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), number).save(path)
    order = read(stream_data(tmp_path, "train", transform=pixels, seed=seed).loader(4))
    for number in order[:3]:
        paths[number].write_text("no picture")
    stream = stream_data(tmp_path, "train", transform=pixels, seed=seed)
    assert read(stream.loader(4)) == order[3:]
    front = [(int(image), label) for image, label in stream.front(2, pixels)]
    assert len(set(front)) == 2 and set(front) <= {(grey, grey % 2) for grey in order[3:]}
