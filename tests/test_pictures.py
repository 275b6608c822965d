"""Pictures by name, the transforms a model asks for, and the checks before anything is slimmed."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from lfrns_hub import zoo
from lfrns_hub.measure import evaluate
from lfrns_hub.zoo import (
    check_images,
    example_input,
    guard_against_chance,
    load_data,
    make_transform,
    set_preprocessing,
)


def plain(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32))


def write_parquet(folder: Path, split: str, labels: list[int], column: str = "label", kind: object = None) -> None:
    """A split with the Hub's columns whose picture i is grey value i throughout."""
    folder.mkdir(exist_ok=True)
    pictures = [Image.fromarray(np.full((6, 6, 3), i, dtype=np.uint8)) for i in range(len(labels))]
    names = kind or datasets.ClassLabel(names=["cat", "dog", "owl"])
    features = datasets.Features({"img": datasets.Image(), column: names})
    encoded = []
    for picture in pictures:
        picture.save(buffer := io.BytesIO(), "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    datasets.Dataset.from_dict({"img": encoded, column: labels}, features=features).to_parquet(
        folder / f"{split}-00000-of-00001.parquet"
    )


@pytest.mark.parametrize("column", ["label", "fine_label"])
def test_parquet_of_the_hub_is_read_in_order(tmp_path: Path, column: str) -> None:
    write_parquet(tmp_path / "d", "train", [2, 0, 1], column)
    data = load_data(tmp_path / "d", "train", transform=plain)
    assert data.class_names == ["cat", "dog", "owl"]
    assert [data[i][1] for i in range(3)] == [2, 0, 1]
    assert [data[i][0].mean().item() for i in range(3)] == [0, 1, 2]


def test_test_files_stand_in_for_validation_and_limit_draws_by_seed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "test", [i % 3 for i in range(30)])
    draw = [load_data(tmp_path / "d", "validation", transform=plain, limit=10, seed=s) for s in (0, 0, 1)]
    values = [[int(d[i][0].mean()) for i in range(len(d))] for d in draw]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 10
    assert all(d[i][1] == v % 3 for d, vs in zip(draw, values, strict=True) for i, v in enumerate(vs))


def test_image_folder_is_read(tmp_path: Path) -> None:
    for i, name in enumerate(["b", "a"]):
        (tmp_path / "d" / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((5, 5, 3), 9 * i, dtype=np.uint8)).save(tmp_path / "d" / "train" / name / "x.png")
    data = load_data(tmp_path / "d", "train", transform=plain)
    assert data.class_names == ["a", "b"]
    assert {(int(data[i][0].mean()), data[i][1]) for i in range(2)} == {(9, 0), (0, 1)}


def values_of(data: zoo.ImageData) -> list[tuple[int, int]]:
    """The grey value and the label of every picture."""
    return [(int(data[i][0].mean()), data[i][1]) for i in range(len(data))]


def test_a_share_of_each_class_is_held_out_the_same_for_every_seed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [i // 20 for i in range(60)])
    train, test = (load_data(tmp_path / "d", s, transform=plain, val_split=0.1) for s in ("train", "validation"))
    assert sorted(values_of(train) + values_of(test)) == [(i, i // 20) for i in range(60)]
    assert [label for _, label in values_of(test)] == [0, 0, 1, 1, 2, 2]
    other = load_data(tmp_path / "d", "train", transform=plain, val_split=0.1, limit=20, seed=5)
    assert set(values_of(other)) <= set(values_of(train))
    with pytest.raises(ValueError, match=r"val_split=10\).*For 10 % pass 0\.1"):
        load_data(tmp_path / "d", "train", transform=plain, val_split=10)
    with pytest.raises(ValueError, match=r"val_split=0\.001\): holds out 0 of 60"):
        load_data(tmp_path / "d", "train", transform=plain, val_split=0.001)
    with pytest.raises(ValueError, match=r"'digits', val_split=0\.5"):
        load_data("digits", "train", transform=plain, val_split=0.5)


def test_a_folder_per_class_without_splits_is_divided_and_numbered_as_a_class_map_says(tmp_path: Path) -> None:
    for i, name in enumerate(["train_car", "apple"] * 4):  # "train" in a name is no split
        (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 5, 3), i, dtype=np.uint8)).save(tmp_path / "d" / name / f"{i}.png")
    (tmp_path / "map.txt").write_text("train_car\nother\n\napple\n")
    options = {"transform": plain, "val_split": 0.25, "class_map": tmp_path / "map.txt"}
    train, test = (load_data(tmp_path / "d", s, **options) for s in ("train", "validation"))
    assert (len(train), len(test)) == (6, 2)
    assert train.class_names == ["train_car", "other", "apple"]
    assert sorted(values_of(train) + values_of(test)) == [(i, 2 * (i % 2)) for i in range(8)]
    with pytest.raises(ValueError, match=r"found apple, train_car.*--val-split"):
        load_data(tmp_path / "d", "validation", transform=plain)
    (tmp_path / "map.txt").write_text("apple\n")
    with pytest.raises(ValueError, match=r"map\.txt'.*does not name 'train_car'"):
        load_data(tmp_path / "d", "train", **options)
    (tmp_path / "map.txt").write_text("apple\ntrain_car\napple")
    with pytest.raises(ValueError, match=r"map\.txt'.*twice"):
        load_data(tmp_path / "d", "train", **options)
    with pytest.raises(ValueError, match=r"no\.txt'.*no such file"):
        load_data(tmp_path / "d", "train", transform=plain, val_split=0.25, class_map="no.txt")


def test_preprocessing_set_on_a_model_is_what_its_transform_does_and_its_configuration_says() -> None:
    model = timm.create_model("cifar_resnet20")
    other = timm.create_model("cifar_resnet20")
    set_preprocessing(model, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=0.5, interpolation="nearest")
    picture = Image.fromarray(np.full((64, 64, 3), 255, dtype=np.uint8))
    picture.paste((0, 0, 0), (0, 0, 15, 64))  # the central half begins at 16
    assert torch.equal(make_transform(model, train=False)(picture), torch.full((3, 32, 32), 2.0))
    assert model.pretrained_cfg["mean"] == (0.5,) * 3
    assert other.pretrained_cfg["mean"] != (0.5,) * 3
    for wrong in ({"crop_pct": 87.5}, {"std": (0.2, 0.0, 0.2)}, {"interpolation": "cubic"}):
        (name, value), *_ = wrong.items()
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
            set_preprocessing(model, **wrong)
    vit = ViTForImageClassification(ViTConfig(image_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match=r"crop_pct=0\.9.*preprocessor_config"):
        set_preprocessing(vit, crop_pct=0.9)


def damage(folder: Path, *files: str) -> None:
    """Cut some pictures of a folder short, and make one no picture at all."""
    for name in files[:-1]:
        (folder / name).write_bytes((folder / name).read_bytes()[:45])
    (folder / files[-1]).write_text("no picture")


@pytest.fixture
def folder_with_damage(tmp_path: Path) -> Path:
    """Twelve pictures in two classes for each split, of grey value 10 times their number; 3, 4 and 9 are damaged."""
    for split in ("train", "validation"):
        for i in range(12):
            path = tmp_path / "d" / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((5, 5, 3), 10 * i, dtype=np.uint8)).save(path)
        damage(tmp_path / "d" / split, "b/03.png", "a/04.png", "b/09.png")
    return tmp_path / "d"


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_left_out_counted_and_named(folder_with_damage: Path, workers: int) -> None:
    data = load_data(folder_with_damage, "validation", transform=plain)
    seen = []
    for _ in range(2):  # the second time no worker finds one anew
        seen += [(int(x[0].mean()) // 10, int(y)) for x, y in DataLoader(data, None, num_workers=workers)]
    whole = {(i, i % 2) for i in range(12) if i not in (3, 4, 9)}
    assert {pair for pair in seen if pair[1] != -100} == whole
    assert [label for _, label in seen].count(-100) == 2 * 3
    assert sorted(data.unreadable) == ["03.png", "04.png", "09.png"]
    said = data.describe_unreadable()
    assert said.startswith("3 of 12 pictures of ")
    assert "could not be read and were left out: 04.png, 03.png, 09.png." in said


def test_in_training_the_next_picture_stands_in_with_its_own_label(folder_with_damage: Path) -> None:
    data = load_data(folder_with_damage, "train", transform=plain)
    pairs = values_of(data)  # 0, 2, 4, ... of class a come first
    assert len(pairs) == 12
    assert all(label == value // 10 % 2 for value, label in pairs)
    assert pairs[2] == pairs[3] == (60, 0)


def test_more_damaged_pictures_than_are_allowed_are_one_error(folder_with_damage: Path) -> None:
    data = load_data(folder_with_damage, "validation", transform=plain, max_unreadable=2)
    with pytest.raises(ValueError, match=r"d: 3 of 12 pictures cannot be read, at most 2 .*09\.png.*--max-unreadable"):
        values_of(data)
    for path in (folder_with_damage / "train").rglob("*.png"):
        path.write_text("no picture")
    with pytest.raises(ValueError, match=r"d: 12 of 12 pictures cannot be read"):
        values_of(load_data(folder_with_damage, "train", transform=plain))
    with pytest.raises(ValueError, match=r"max_unreadable=-1"):
        load_data(folder_with_damage, "train", transform=plain, max_unreadable=-1)


def test_accuracy_counts_a_damaged_picture_neither_right_nor_wrong(folder_with_damage: Path) -> None:
    data = load_data(folder_with_damage, "validation", transform=lambda picture: plain(picture).permute(2, 0, 1))

    class Parity(torch.nn.Module):
        """Right about every picture but number 6."""

        def __init__(self) -> None:
            super().__init__()
            self.num_classes, self.scale = 2, torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            number = (x[:, 0, 0, 0] / 10).long()
            wrong = (number == 6).long()
            return torch.nn.functional.one_hot((number + wrong) % 2, 2) * self.scale

    scores = evaluate(Parity(), DataLoader(data, 5, num_workers=1), teacher=Parity(), progress=False)
    assert (scores["images"], scores["images_skipped"]) == (9, 3)
    assert scores["top1_pct"] == pytest.approx(100 * 8 / 9)
    assert scores["class_counts"] == [5, 4]
    assert scores["agreement_pct"] == 100
    assert guard_against_chance(Parity(), DataLoader(data, 5), "d") == pytest.approx(100 * 8 / 9)


def test_pictures_in_parquet_open_no_file_and_no_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4), "white").save(secret)
    good, postscript, large = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "PNG")
    Image.new("RGB", (4, 4)).save(postscript, "EPS")
    Image.new("1", (9_000, 9_000)).save(large, "PNG")
    files = [
        {"bytes": good.getvalue(), "path": None},
        {"bytes": None, "path": str(secret)},
        {"bytes": None, "path": "http://127.0.0.1:9/x.png"},
        {"bytes": postscript.getvalue(), "path": None},
        {"bytes": large.getvalue(), "path": None},
    ]
    (tmp_path / "d").mkdir()
    table = datasets.Dataset.from_dict({"img": files, "label": [0] * 5})
    table.to_parquet(tmp_path / "d" / "train-0.parquet")
    data = load_data(tmp_path / "d", "train", transform=plain)
    assert all(data[i][0].max() == 0 for i in range(5))
    said = " ".join(record.getMessage() for record in caplog.records)
    assert len(data.unreadable) == 4
    for reason in ("secret.png lies outside", "x.png lies outside", "cannot identify", "9000 x 9000 pixels"):
        assert reason in said


def test_a_label_beyond_any_number_of_classes_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [0, 1 << 40], kind=datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"'label' holds label 1099511627776, a label must lie in \[0, 1048576\)"):
        load_data(tmp_path / "d", "train", transform=plain)


def test_digits_ship_with_scikit_learn_and_are_held_out() -> None:
    train = load_data("digits", "train", transform=plain)
    test = load_data("digits", "validation", transform=plain)
    assert (len(train), len(test)) == (1437, 360)
    assert test.class_names == list("0123456789")
    seen = {train[i][0].numpy().tobytes() for i in range(len(train))}
    assert not any(test[i][0].numpy().tobytes() in seen for i in range(len(test)))


def test_data_that_is_not_there_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"'train'.*found notes\.txt.*train-\*\.parquet"):
        load_data(tmp_path, "train", transform=plain)
    with pytest.raises(ValueError, match=r"'no_such_folder'.*no such folder"):
        load_data("no_such_folder", "train", transform=plain)
    with pytest.raises(ValueError, match=r"split='trian'.*train, validation, test"):
        load_data("digits", "trian", transform=plain)
    with pytest.raises(ValueError, match=r"limit=0"):
        load_data("digits", "train", transform=plain, limit=0)


def test_columns_and_labels_that_do_not_serve_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", "train", [0, 1, 2])
    with pytest.raises(ValueError, match=r"no column 'klass'.*img, label"):
        load_data(tmp_path / "d", "train", transform=plain, label_column="klass")
    write_parquet(tmp_path / "e", "train", [0, -1], kind=datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"'label'.*-1"):
        load_data(tmp_path / "e", "train", transform=plain)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "train-0.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"cannot be read as pictures"):
        load_data(tmp_path / "f", "train", transform=plain)


def test_data_of_the_hub_without_a_network_names_two_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 for the data nobody/x.*--model.*--data-dir"):
        load_data("nobody/x", "train", transform=plain)


def test_eval_transform_of_a_32_pixel_model_only_normalises() -> None:
    model = timm.create_model("cifar_resnet20")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(make_transform(model, train=False)(Image.fromarray(pixels)), expected)


def test_train_transform_follows_the_seed_and_takes_any_picture() -> None:
    model = timm.create_model("cifar_resnet20", in_chans=1)
    transform = make_transform(model, train=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(transform(picture))
    assert outputs[0].shape == (1, 32, 32)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_transformers_processor_beside_the_weights_is_followed(tmp_path: Path) -> None:
    small = {"num_channels": 3, "hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2}
    ConvNextForImageClassification(ConvNextConfig(image_size=16, **small)).save_pretrained(tmp_path)
    settings = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    settings |= {"image_processor_type": "BitImageProcessor", "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    transform = make_transform(zoo.create_dense(str(tmp_path)), train=False)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels[2:18, 2:18] / np.float32(255)).permute(2, 0, 1)
    torch.testing.assert_close(transform(Image.fromarray(pixels)), expected)


def test_input_size_is_the_layers_not_the_published_one() -> None:
    model = timm.create_model("test_vit", img_size=64, in_chans=1)
    assert example_input(model).shape == (1, 1, 64, 64)
    assert torch.equal(example_input(model), example_input(model))


def small_vit() -> torch.nn.Module:
    config = ViTConfig(image_size=16, patch_size=8, num_labels=4, hidden_size=8, num_hidden_layers=1)
    config.num_attention_heads, config.intermediate_size = 2, 16
    return ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("shape", "said"), [((2, 1, 16, 16), "1 channels"), ((2, 3, 24, 24), "24, 24"), ((2, 3, 16), "16")]
)
def test_images_that_do_not_fit_are_refused_with_their_shape(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=rf"{said}.*\[N, 3, 16, 16\]"):
        check_images(small_vit(), [(torch.zeros(shape), torch.zeros(2, dtype=torch.long))])


def test_images_that_fit_pass_and_the_mode_is_kept() -> None:
    model = small_vit().train()
    check_images(model, [torch.zeros(2, 3, 16, 16)])
    convnet = timm.create_model("cifar_resnet20").train()
    check_images(convnet, [torch.zeros(2, 3, 40, 40)])
    assert all(module.training for module in (*model.modules(), *convnet.modules()))
    with pytest.raises(ValueError, match="empty"):
        check_images(model, [])
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        check_images(model, [torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])


class Oracle(torch.nn.Module):
    """Reads the class that stands in a picture's first pixel, shifted by `shift`."""

    def __init__(self, num_classes: int, shift: int) -> None:
        super().__init__()
        self.num_classes, self.shift = num_classes, shift
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        named = (x[:, 0, 0, 0].long() + self.shift) % self.num_classes
        return torch.nn.functional.one_hot(named, self.num_classes) * self.scale


def labelled(classes: int, count: int = 200) -> DataLoader:
    labels = torch.arange(count) % classes
    return DataLoader(TensorDataset(labels.float()[:, None, None, None].expand(-1, 3, 4, 4), labels), 50)


def test_a_model_at_chance_is_refused() -> None:
    assert guard_against_chance(Oracle(40, 0), labelled(40), "DIR") == 100
    with pytest.raises(
        ValueError, match=r"scores 0\.0 % on DIR, chance 2\.5 % \(200 images\): class order or preprocessing differs"
    ):
        guard_against_chance(Oracle(40, 1), labelled(40), "DIR")
    with pytest.raises(ValueError, match=r"its weights are random.*--weights FILE"):
        guard_against_chance(Oracle(40, 1), labelled(40), "DIR", untrained=True)


def test_labels_beyond_the_head_and_empty_loaders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 classes.*label 6"):
        guard_against_chance(Oracle(4, 0), labelled(7), "DIR")
    with pytest.raises(ValueError, match=r"'DIR'.*empty"):
        guard_against_chance(Oracle(4, 0), [], "DIR")
    assert guard_against_chance(Oracle(4, 0), [torch.zeros(2, 3, 4, 4)], "DIR") is None


def test_a_picture_is_prepared_alone_as_in_a_batch_and_where_it_stands_sets_the_augmentation(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader, Subset

    from lfrns_hub.runs.seeded import seeded_loader

    for name, size in (("cifar_resnet20", 32), ("test_resnet", 160)):
        transform = make_transform(timm.create_model(name), train=True)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), dtype=np.uint8)
        data = zoo.ImageData(
            [Image.fromarray(p) for p in pixels], list(range(6)), class_names=list("abcdef"), transform=transform
        )
        torch.manual_seed(3)
        together = [image for image, _ in data.__getitems__([4, 1, 4])]
        torch.manual_seed(3)
        alone = [transform(Image.fromarray(pixels[i])) for i in (4, 1, 4)]
        assert together[0].shape == (3, size, size) and not torch.equal(together[0], together[2])
        assert all(map(torch.equal, together, alone))

        def images(batch: int, workers: int, data: zoo.ImageData = data) -> torch.Tensor:
            plain = DataLoader(Subset(data, [5, 3, 1, 0]), batch, shuffle=True, num_workers=workers)
            return torch.cat([images for images, _ in seeded_loader(plain, 1, 1)])

        assert torch.equal(images(4, 0), images(2, 0)) and torch.equal(images(4, 0), images(4, 2))


def test_training_crops_and_mirrors_as_torchvision_does_it() -> None:
    from torchvision import transforms as T

    model = timm.create_model("cifar_resnet20")
    transform = make_transform(model, train=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels = transform.fix(picture)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        _, drawn = transform.draw(pixels)
        top, left, height, width, mirrored = drawn
        expected = T.Pad(4)(picture).crop((left, top, left + width, top + height))
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else expected
        expected = T.Normalize(transform.mean, transform.std)(T.ToTensor()(expected))
        torch.testing.assert_close(transform.finish([pixels], [drawn])[0], expected)
        seen.add((top, left, mirrored))
    assert len(seen) > 15 and {mirrored for *_, mirrored in seen} == {True, False}
    assert {top for top, *_ in seen} <= set(range(9))


def test_a_training_crop_of_a_larger_picture_is_near_to_what_pillow_makes_of_it() -> None:
    from torchvision import transforms as T

    transform = make_transform(timm.create_model("test_resnet"), train=True)
    smooth = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((300, 200), Image.Resampling.BICUBIC)
    pixels, (top, left, height, width, _) = transform.draw(transform.fix(picture))
    got = transform.finish([pixels], [(top, left, height, width, False)])[0]
    crop = picture.crop((left, top, left + width, top + height)).resize((160, 160), Image.Resampling.BILINEAR)
    expected = T.Normalize(transform.mean, transform.std)(T.ToTensor()(crop))
    assert transform.interpolation == "bilinear" and (got - expected).abs().max() < 2.5 / 255 / min(transform.std)
