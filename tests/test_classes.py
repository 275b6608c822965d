"""A label means the class that the model numbers so: by name across splits, files and the model, or refused."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from test_pictures import plain, values_of, write_parquet
from torch import nn

from lfrns_hub.pictures.class_folders import list_classes
from lfrns_hub.pictures.stream import stream_data
from lfrns_hub.zoo import load_data

STRING, INT = datasets.Value("string"), datasets.Value("int64")


def answering(count: int, names: list[str] | None = None) -> nn.Module:
    """A model of so many classes, as transformers has them."""
    model = nn.Identity()
    model.config = SimpleNamespace(num_labels=count, id2label=dict(enumerate(names)) if names else None)
    return model


def folders(root: Path, split: str, names: str, empty: str = "") -> Path:
    """A folder per letter, with a picture whose grey value is the letter's code; `empty` ones without a picture."""
    for name in names + empty:
        (root / split / name).mkdir(parents=True, exist_ok=True)
        if name in names:
            Image.new("RGB", (4, 4), (ord(name),) * 3).save(root / split / name / f"{name}.png")
    return root


def labels_of(data) -> dict[str, int]:
    """The label of each letter's picture."""
    return {chr(value): label for value, label in values_of(data)}


@pytest.mark.parametrize("kind", ["empty", "missing"])
def test_a_class_without_pictures_in_train_keeps_its_number_in_both_splits(kind: str, tmp_path: Path) -> None:
    folders(tmp_path, "train", "abdef", "c" if kind == "empty" else "")
    folders(tmp_path, "val", "abcdef")
    train, test = (load_data(tmp_path, s, transform=plain, model=answering(6)) for s in ("train", "validation"))
    assert train.class_names == test.class_names == list("abcdef")
    assert labels_of(train) == {"a": 0, "b": 1, "d": 3, "e": 4, "f": 5}
    assert labels_of(test) == {letter: number for number, letter in enumerate("abcdef")}


def test_folders_are_numbered_by_the_names_that_the_model_has(tmp_path: Path) -> None:
    folders(tmp_path, "train", "abc")
    data = load_data(tmp_path, "train", transform=plain, model=answering(4, ["C", "b", "x", "A"]))
    assert labels_of(data) == {"a": 3, "b": 1, "c": 0}
    assert data.class_names == ["C", "b", "x", "A"]


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (answering(4), "has 3 classes .a, b, c.*the model answers 4.*--class-map"),
        (answering(2), "has 3 classes .*the model answers 2"),
        (answering(3, ["a", "c", "z"]), "among them 'b', which is none of the model's 3 .a, c, z.*--class-map"),
        (answering(4, list("wxyz")), "has 3 classes, among them 'a', which is none of the model's 4"),
    ],
)
def test_classes_that_are_not_the_models_are_refused_before_a_picture_is_read(
    model: nn.Module, rule: str, tmp_path: Path
) -> None:
    folders(tmp_path, "train", "abc")
    for split in ("train", "validation"):
        folders(tmp_path, "validation", "ab")
        with pytest.raises(ValueError, match=rule):
            load_data(tmp_path, split, transform=plain, model=model)


def test_a_single_class_folder_is_a_class_and_does_not_fit_a_model_of_ten(tmp_path: Path) -> None:
    folders(tmp_path, "train", "a")
    assert load_data(tmp_path, "train", transform=plain).class_names == ["a"]
    with pytest.raises(ValueError, match=r"has 1 classes .a., the model answers 10"):
        load_data(tmp_path, "train", transform=plain, model=answering(10))


def test_words_in_another_language_are_numbered_in_order_and_that_is_said(tmp_path: Path, caplog) -> None:
    folders(tmp_path, "train", "abc")
    assert labels_of(load_data(tmp_path, "train", transform=plain, model=answering(3, list("xyz")))) == {
        "a": 0, "b": 1, "c": 2,
    }  # fmt: skip
    assert "name their 3 classes by other words, so they are taken in order: 'a' as 'x', ..." in caplog.text


def test_names_of_which_some_are_the_models_are_not_numbered_in_order(tmp_path: Path) -> None:
    folders(tmp_path, "train", "abc")
    with pytest.raises(ValueError, match=r"among them 'c', which is none of the model's 3 \(a, b, d\)"):
        load_data(tmp_path, "train", transform=plain, model=answering(3, ["a", "b", "d"]))


def test_splits_of_other_classes_are_not_matched_by_their_order(tmp_path: Path) -> None:
    folders(tmp_path, "train", "cde")
    folders(tmp_path, "validation", "acd")
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=r"has 4 classes \(a, c, d, e\), the model answers 3"):
            load_data(tmp_path, split, transform=plain, model=answering(3))
        with pytest.raises(ValueError, match=r"among them 'a', which is none of the model's 3 \(c, d, e\)"):
            load_data(tmp_path, split, transform=plain, model=answering(3, list("cde")))


@pytest.mark.parametrize("divided", [True, False])
def test_class_folders_named_as_splits_are_classes(divided: bool, tmp_path: Path) -> None:
    names = ("bus", "dev", "test", "train", "val")
    root = tmp_path / "train" if divided else tmp_path
    for number, name in enumerate(names):
        deeper = root / name / "deeper" if divided else root / name
        deeper.mkdir(parents=True)
        for row in range(4):
            Image.new("RGB", (4, 4), (number, 0, 0)).save((deeper if row == 3 else root / name) / f"{row}.png")
    data = load_data(tmp_path, "train", transform=lambda p: torch.tensor(p.getpixel((0, 0))[0]).float(), val_split=0.25)
    assert data.class_names == list(names)
    assert sorted((int(data[i][0]), data[i][1]) for i in range(len(data))) == [
        (n, n) for n in range(5) for _ in range(3)
    ]


def pictures_at(root: Path, *files: str) -> Path:
    """A folder with a small picture under each of these names."""
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / file)
    return root


def reds(data) -> list[int]:
    """The numbers of the pictures, as `pictures_at` counts them."""
    return [int(image[0]) for image in (row[0] if data.labels else row for row in (data[i] for i in range(len(data))))]


def red(picture: Image.Image) -> torch.Tensor:
    """The number of a picture."""
    return torch.tensor([picture.getpixel((0, 0))[0]]).float()


def test_pictures_whose_names_have_a_splits_word_are_all_there(tmp_path: Path) -> None:
    names = ["a.png", "test_1.png", "val-2.png", "eval_3.png", "dev.png", "my-train-5.png", "training.png"]
    pictures_at(tmp_path, *(f"train/{name}" for name in names))
    data = load_data(tmp_path, "train", transform=red)
    assert sorted(reds(data)) == list(range(len(names))) and data.labels is None


def test_metadata_describes_folders_that_are_called_as_splits(tmp_path: Path, caplog) -> None:
    names = ["bus", "test", "train", "validation"]
    pictures_at(tmp_path, *(f"train/{name}/x.png" for name in names))
    table = tmp_path / "train" / "metadata.csv"
    table.write_text("file_name,label\n" + "".join(f"{name}/x.png,{name}\n" for name in names))
    data = load_data(tmp_path, "train", transform=red)
    assert dict(zip(reds(data), data.labels, strict=True)) == {0: 0, 1: 1, 2: 2, 3: 3} and data.class_names == names
    assert not caplog.text
    table.write_text("file_name,label\nbus/x.png,bus\n")
    load_data(tmp_path, "train", transform=red)
    assert "the metadata names 1 of 4 pictures; the others are left out" in caplog.text
    table.rename(tmp_path / "train" / "bus" / "metadata.csv")
    with pytest.raises(ValueError, match="bus has a table of metadata and validation has none: the folders can"):
        load_data(tmp_path, "train", transform=red)


def test_an_archive_among_pictures_is_not_unpacked(tmp_path: Path) -> None:
    pictures_at(tmp_path, "more/y.png", "data/train/x.png")
    shutil.make_archive(str(tmp_path / "data" / "train" / "more"), "zip", tmp_path / "more")
    assert reds(load_data(tmp_path / "data", "train", transform=red)) == [1]
    (tmp_path / "data" / "train" / "metadata.csv").write_text("file_name,label\nx.png,a\n")
    assert reds(load_data(tmp_path / "data", "train", transform=red)) == [1]


def test_a_folder_is_read_by_its_name_and_not_as_a_pattern(tmp_path: Path) -> None:
    for number, name in enumerate(("data[1]", "data1")):
        table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), (number, 0, 0))], "label": [number]})
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    assert reds(load_data(tmp_path / "data[1]", "train", transform=red)) == [0]
    pictures_at(tmp_path / "set[1]", "train/a.png")
    assert reds(load_data(tmp_path / "set[1]", "train", transform=red)) == [0]


def test_files_of_a_split_are_of_one_writing_and_missing_ones_are_told(tmp_path: Path, caplog) -> None:
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "label": [0]})
    table.to_parquet(tmp_path / "train-00001-of-00003.parquet")
    assert len(load_data(tmp_path, "train", transform=red)) == 1
    assert "1 of 3 files are there: the split is not whole" in caplog.text
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"train-00000-of-00001.parquet and train-00001-of-00003.parquet are of two wr"
    ):
        load_data(tmp_path, "train", transform=red)


def test_pictures_beside_class_folders_are_refused(tmp_path: Path) -> None:
    pictures_at(tmp_path, "train/a/1.png", "train/b/1.png", "train/stray.png")
    with pytest.raises(ValueError, match=r"'train'\): 1 pictures in train \(stray.png\) lie in no class folder"):
        load_data(tmp_path, "train", transform=red)


def test_a_folder_that_is_a_split_or_a_class_is_refused(tmp_path: Path) -> None:
    pictures_at(tmp_path, "bus/1.png", "car/1.png", "train/x/1.png", "train/y/1.png")
    with pytest.raises(ValueError, match=r"train holds folders, and bus, car beside it hold pictures: it can be"):
        load_data(tmp_path, "train", transform=red, val_split=0.5)
    pictures_at(tmp_path, "val/x/1.png")  # with another split there is no doubt
    assert load_data(tmp_path, "train", transform=red).class_names == ["x", "y"]


@pytest.mark.parametrize(("train", "test"), [("training", "eval"), ("Train", "Test"), ("TRAIN", "evaluation")])
def test_splits_of_other_names_are_splits_and_no_classes(train: str, test: str, tmp_path: Path) -> None:
    pictures_at(tmp_path, *(f"{split}/{name}/{n}.png" for split in (train, test) for name in "ab" for n in range(2)))
    for split, numbers in (("train", [0, 1, 2, 3]), ("validation", [4, 5, 6, 7])):
        data = load_data(tmp_path, split, transform=red)
        assert reds(data) == numbers and data.class_names == ["a", "b"]
    assert load_data(tmp_path, "train", transform=red, val_split=0.5).class_names == ["a", "b"]


def test_a_link_back_is_not_followed_round(tmp_path: Path) -> None:
    pictures_at(tmp_path, "data/train/a/1.png", "data/train/b/1.png", "elsewhere/2.png")
    train = tmp_path / "data" / "train"
    for link, target in (("a/self", train / "a"), ("a/up", train), ("b/more", tmp_path / "elsewhere")):
        (train / link).symlink_to(target)
    data = load_data(tmp_path / "data", "train", transform=red)
    assert list(zip(reds(data), data.labels, strict=True)) == [(0, 0), (1, 1), (2, 1)]


def test_a_pipe_among_pictures_is_not_waited_for(tmp_path: Path) -> None:
    pictures_at(tmp_path, "train/a/1.png", "train/b/1.png")
    os.mkfifo(tmp_path / "train" / "a" / "2.png")
    data = load_data(tmp_path, "train", transform=red)
    assert reds(data) == [0, 1, 1] and data.unreadable == ["2.png"]


def test_files_that_are_no_pictures_and_hidden_folders_are_no_class(tmp_path: Path) -> None:
    folders(tmp_path, "train", "ab")
    for place in (".cache", "__MACOSX", "notes"):
        (tmp_path / "train" / place).mkdir()
        (tmp_path / "train" / place / "x.txt").write_text("x")
    (tmp_path / "train" / "a" / "thumbs.db").write_text("x")
    assert load_data(tmp_path, "train", transform=plain).class_names == ["a", "b"]


def test_parquet_splits_that_number_their_names_differently_are_brought_to_trains_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [0, 1, 2], kind=datasets.ClassLabel(names=["cat", "dog", "owl"]))
    write_parquet(tmp_path / "d", "validation", [0, 1, 2], kind=datasets.ClassLabel(names=["owl", "cat", "dog"]))
    for model in (None, answering(3), answering(3, ["x", "y", "z"])):
        data = load_data(tmp_path / "d", "validation", transform=plain, model=model)
        assert [label for _, label in values_of(data)] == [2, 0, 1]
    named = load_data(tmp_path / "d", "validation", transform=plain, model=answering(3, ["dog", "owl", "cat"]))
    assert [label for _, label in values_of(named)] == [1, 2, 0]


def test_a_parquet_class_that_train_lacks_is_refused_unless_the_model_names_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [0, 1], kind=datasets.ClassLabel(names=["cat", "owl"]))
    write_parquet(tmp_path / "d", "validation", [0, 1, 2], kind=datasets.ClassLabel(names=["cat", "dog", "owl"]))
    with pytest.raises(ValueError, match="has the class 'dog', which the training split lacks"):
        load_data(tmp_path / "d", "validation", transform=plain, model=answering(3))
    model = answering(3, ["cat", "dog", "owl"])
    assert [label for _, label in values_of(load_data(tmp_path / "d", "train", transform=plain, model=model))] == [0, 2]


def test_files_of_one_split_that_number_names_differently_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [0], kind=datasets.ClassLabel(names=["cat", "dog"]))
    (tmp_path / "d" / "train-00000-of-00001.parquet").rename(tmp_path / "d" / "train-0.parquet")
    write_parquet(tmp_path / "d", "train", [0], kind=datasets.ClassLabel(names=["dog", "cat"]))
    (tmp_path / "d" / "train-00000-of-00001.parquet").rename(tmp_path / "d" / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet numbers the classes of 'label' in another way"):
        load_data(tmp_path / "d", "train", transform=plain)


def test_words_as_labels_are_numbered_by_the_model_or_by_all_words_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", ["owl", "cat"], kind=STRING)
    write_parquet(tmp_path / "d", "validation", ["dog", "owl"], kind=STRING)
    for split, by_order, by_name in (("train", [2, 0], [0, 2]), ("validation", [1, 2], [1, 0])):
        for model, wanted in (
            (None, by_order),
            (answering(3), by_order),
            (answering(3, ["owl", "dog", "cat"]), by_name),
        ):
            data = load_data(tmp_path / "d", split, transform=plain, model=model)
            assert [label for _, label in values_of(data)] == wanted
    with pytest.raises(ValueError, match=r"has 3 classes .cat, dog, owl., the model answers 10"):
        load_data(tmp_path / "d", "train", transform=plain, model=answering(10))


def test_numbers_written_as_words_are_numbers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", ["10", "2"], kind=STRING)
    data = load_data(tmp_path / "d", "train", transform=plain, model=answering(12))
    assert [label for _, label in values_of(data)] == [10, 2]


def test_numbers_take_the_models_names_and_must_be_its_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [1, 0], kind=INT)
    data = load_data(tmp_path / "d", "train", transform=plain, model=answering(3, ["x", "y", "z"]))
    assert (data.class_names, [label for _, label in values_of(data)]) == (["x", "y", "z"], [1, 0])
    assert load_data(tmp_path / "d", "train", transform=plain, model=answering(3)).class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"holds label 1, a label must lie in \[0, 1\)"):
        load_data(tmp_path / "d", "train", transform=plain, model=answering(1))


def test_a_class_map_names_each_class_of_the_model_and_does_not_contradict_it(tmp_path: Path) -> None:
    folders(tmp_path, "train", "abc")
    (tmp_path / "map.txt").write_text("c\nb\na\n")
    options = {"transform": plain, "class_map": tmp_path / "map.txt"}
    assert labels_of(load_data(tmp_path, "train", model=answering(3), **options)) == {"a": 2, "b": 1, "c": 0}
    with pytest.raises(ValueError, match=r"map\.txt'.*names 3 classes, the model answers 4"):
        load_data(tmp_path, "train", model=answering(4), **options)
    with pytest.raises(ValueError, match=r"map\.txt'.*has 'c' as class 0, the model has it as class 2"):
        load_data(tmp_path, "train", model=answering(3, ["a", "b", "c"]), **options)


def test_a_label_column_of_another_name_is_asked_for_by_the_option(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [0, 1], "cls", kind=INT)
    with pytest.raises(ValueError, match=r"no column of labels: .*It has img, cls: .*--label-column"):
        load_data(tmp_path / "d", "train", transform=plain, model=answering(2))
    assert load_data(tmp_path / "d", "train", transform=plain).labels is None
    assert load_data(tmp_path / "d", "train", transform=plain, model=answering(0)).labels is None
    data = load_data(tmp_path / "d", "train", transform=plain, model=answering(2), label_column="cls")
    assert [label for _, label in values_of(data)] == [0, 1]


def test_digits_fit_a_model_of_ten_alone() -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert load_data("digits", "validation", transform=plain, model=answering(10, names)).class_names == list(
        "0123456789"
    )
    with pytest.raises(ValueError, match=r"'digits', 'train'.* has 10 classes .*the model answers 11"):
        load_data("digits", "train", transform=plain, model=answering(11))


def test_a_stream_numbers_labels_as_the_model_does_and_is_not_sorted(tmp_path: Path) -> None:
    letters = "abcdefghij"
    folders(tmp_path, "train", letters)
    model = answering(10, list(reversed(letters)))
    stream = stream_data(tmp_path, "train", transform=plain, model=model)
    seen = [(chr(int(image.mean())), int(label)) for image, label in stream.front(10, plain)]
    assert sorted(seen) == [(letter, 9 - number) for number, letter in enumerate(letters)]
    assert [letter for letter, _ in seen] != sorted(letters)
    with pytest.raises(ValueError, match="has 10 classes"):
        stream_data(tmp_path, "train", transform=plain, model=answering(3))


def test_a_limit_draws_in_random_order_so_that_a_first_batch_shows_many_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [i // 20 for i in range(60)])
    labels = [label for _, label in values_of(load_data(tmp_path / "d", "train", transform=plain, limit=60))]
    assert sorted(labels) == [i // 20 for i in range(60)]
    assert set(labels[:10]) == {0, 1, 2}


def test_photos_of_kinds_that_pillow_does_not_open_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a" / "phone.HEIC").write_bytes(b"x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    found = list_classes(tmp_path)
    assert [[Path(file).name for file in files] for files in found.values()] == [["1.png"], ["2.png"]]
    assert "1 images of kinds that pillow does not open are left out: phone.HEIC" in caplog.text
    assert "notes" not in caplog.text
