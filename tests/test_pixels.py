"""A model is shown what its own processor, or timm's transform, makes of a picture; what is saved says the same."""

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from test_benchmarks import module  # noqa: F401  the fixture
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

import lfrns_hub as lfrns
from lfrns_hub.pictures import (
    ImageData,
    OwnPreparation,
    Preparation,
    decode_picture,
    load_data,
    load_processor,
    make_transform,
    set_preprocessing,
)
from lfrns_hub.pictures.proof import Geometry, prove
from lfrns_hub.zoo import create_dense

SIDE = 24
SQUARE = {"height": SIDE, "width": SIDE}
CROP = {"size": {"shortest_edge": 28}, "do_center_crop": True, "crop_size": SQUARE}


def noise(columns: int, rows: int, seed: int = 7) -> Image.Image:
    """A picture that shows every pixel moved and every channel changed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [noise(*size) for size in ((SIDE, SIDE), (67, 41), (30, 121), (11, 9), (301, 299), (400, 20))]


def model_with(folder: Path, settings: dict[str, Any], file: str = "preprocessor_config.json") -> nn.Module:
    """What `make_transform` needs of a model whose folder holds a processor's settings."""
    (folder / file).write_text(json.dumps(settings))
    model = nn.Module()
    model.config = ViTConfig(image_size=SIDE)
    model.config.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def vit(folder: Path | None = None, settings: dict[str, Any] | None = None) -> ViTForImageClassification:
    """A small ViT; with a folder, as it is loaded from there, with a processor's settings beside it."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, num_labels=5, **widths)).eval()
    if folder is None:
        return model
    model.save_pretrained(folder)
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return create_dense(str(folder))


def difference(transform: Any, folder: Path) -> float:
    """The largest difference from what transformers opens in a folder, as a share of the images' range."""
    own, worst = AutoImageProcessor.from_pretrained(folder), 0.0
    for picture in PICTURES:
        wanted = own(images=picture, return_tensors="pt")["pixel_values"][0].float()
        got = transform(picture)
        assert got.shape == wanted.shape and got.dtype == torch.float32
        worst = max(worst, float((got - wanted).abs().max() / (wanted.max() - wanted.min())))
    return worst


def of(kind: str, **settings: Any) -> dict[str, Any]:
    """A preprocessor_config.json; images are squares unless the settings say otherwise."""
    return {"image_processor_type": f"{kind}ImageProcessor", "size": SQUARE, **settings}


EDGE = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
FAST = {
    "no normalisation": of("ViT", do_normalize=False),
    "no rescaling": of("ViT", do_rescale=False),
    "another factor": of("ViT", rescale_factor=1 / 127.5),
    "bicubic": of("ViT", resample=3),
    "a size that its config does not say": of("Bit", **CROP),
    "a crop of other sides": of("DeiT", crop_size={"height": 20, "width": 15}),
    "blue first": of("MobileViT", **CROP),
    "padding": of("MobileViT", size={"shortest_edge": 20}, crop_size=SQUARE),
    "an offset": of("EfficientNet", rescale_offset=True, rescale_factor=1 / 127.5),
    "normalised twice": of("EfficientNet", include_top=True),
    "crop_pct": of("ConvNext", size={"shortest_edge": SIDE}, crop_pct=0.8),
    "a key nobody knows": of("ViT", sharpness=3),
    "an old name": {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE},
    "no name": {"size": SQUARE, "do_normalize": False},
}
OWN = {
    "LeViT": of("Levit", **EDGE),
    "Perceiver": of("Perceiver", crop_size={"height": 30, "width": 26}),
    "PP-LCNet": of("PPLCNet", resize_short=28, crop_size=SQUARE),
    "a longest edge": of("CLIP", **{**CROP, "size": {"shortest_edge": 28, "longest_edge": 90}}),
    "thumbnails": of("Donut", size={"height": 30, "width": 20}),
    "padding of the image": of("ViT", do_pad=True, pad_size={"height": 40, "width": 40}),
    "nearest, as torch has it": of("ViT", resample=0),
    "sizes that differ": of("TextNet", size={"shortest_edge": SIDE}, size_divisor=8),
}


@pytest.mark.parametrize("name", [*FAST, *OWN])
def test_the_transform_is_what_the_processor_in_the_folder_gives(name: str, tmp_path: Path) -> None:
    transform = make_transform(model_with(tmp_path, (FAST | OWN)[name]), train=False)
    assert difference(transform, tmp_path) < 1e-6
    assert isinstance(transform, Preparation if name in FAST else OwnPreparation)


def test_a_processor_inside_of_a_processor_config_is_found(tmp_path: Path) -> None:
    model = model_with(tmp_path, {"image_processor": FAST["blue first"]}, "processor_config.json")
    assert difference(make_transform(model, train=False), tmp_path) < 1e-6


def test_a_processor_of_one_channel_and_one_of_three_for_a_model_of_one(tmp_path: Path) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "image_mean": [0.2, 0.3, 0.4]}
    model = model_with(tmp_path, settings | {"image_std": [0.5, 0.5, 0.2]})
    model.config.num_channels = 1
    white = make_transform(model, train=False)(Image.new("RGB", (30, 30), "white"))
    torch.testing.assert_close(white, torch.full((1, SIDE, SIDE), (1 - 0.3) / 0.4))
    assert load_processor(model).image_mean == (0.3,) or load_processor(model).image_mean == [pytest.approx(0.3)]
    model.config.num_channels = 5
    with pytest.raises(ValueError, match=r"takes 5 channels, a picture has 1 or 3"):
        make_transform(model, train=False)


def test_a_fast_way_that_is_wrong_on_some_shape_is_not_taken() -> None:
    """A crop that rounds its margins otherwise, pillow in place of tensors, a limit that only wide pictures meet."""
    processor = transformers.CLIPImageProcessor(**CROP)
    wide = transformers.CLIPImageProcessor(**{**CROP, "size": {"shortest_edge": 28, "longest_edge": 400}})

    def prepare(picture: Image.Image, own: Any = processor) -> torch.Tensor:
        return own(images=picture, return_tensors="pt")["pixel_values"][0]

    def way(geometry: Geometry, own: Any = processor) -> type:
        return type(prove(lambda picture: prepare(picture, own), [geometry], mode="RGB", what="it"))

    right = Geometry(28, "bicubic", as_tensor=True, floored=True)
    assert way(right) is Preparation
    for wrong in (
        Geometry(28, "bicubic", as_tensor=True, floored=False),
        Geometry(28, "bicubic", as_tensor=False, floored=True),
        Geometry(28, "bilinear", as_tensor=True, floored=True),
        Geometry(29, "bicubic", as_tensor=True, floored=True),
        Geometry((28, 28), "bicubic", as_tensor=True, floored=True),
    ):
        assert way(wrong) is OwnPreparation
    assert way(right, wide) is OwnPreparation


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "prepares no picture.*crop_size"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, r"pixel_values \[1, 256, 768\].*where images"),
        ({"image_processor_type": "NobodysProcessor"}, "cannot be opened"),
        ({"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}, "code that a folder brings"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 10**9, "width": 9}}, "1000000000"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [0, 1, 1]}, r"image_std = \[0, 1, 1\]"),
    ],
)
def test_a_processor_that_prepares_no_images_is_refused_in_a_sentence(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make_transform(model_with(tmp_path, settings), train=False)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_processor_is_told_of_and_what_it_was_shown_is_what_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = vit(tmp_path / "dense")
    transform = make_transform(model, train=False)
    assert "came without an image processor" in caplog.text
    torch.testing.assert_close(transform(Image.new("RGB", (9, 9), "white")), torch.ones(3, SIDE, SIDE))
    folder = lfrns.save(model, tmp_path / "slim", processor=load_processor(model))
    assert difference(transform, folder) < 1e-6
    assert not (lfrns.save(model, tmp_path / "unasked") / "preprocessor_config.json").exists()


@pytest.mark.parametrize("name", ["no normalisation", "blue first", "a key nobody knows", "no name", "LeViT"])
def test_a_checkpoint_carries_the_processor_by_which_it_was_shown_pictures(name: str, tmp_path: Path) -> None:
    settings = (FAST | OWN)[name]
    model = vit(tmp_path / "dense", settings)
    transform = make_transform(model, train=False)
    folder = lfrns.save(model, tmp_path / "slim")
    shutil.rmtree(tmp_path / "dense")
    written = json.loads((folder / "preprocessor_config.json").read_text())
    for key in settings.keys() - {"feature_extractor_type", "size"}:
        assert written[key] == settings[key]
    assert difference(transform, folder) < 1e-6
    again = lfrns.load(folder)
    assert difference(make_transform(again, train=False), folder) < 1e-6
    assert lfrns.save(again, tmp_path / "again") and difference(transform, tmp_path / "again") < 1e-6


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("no normalisation", {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}),
        ("blue first", {"interpolation": "bilinear"}),
        ("bicubic", {"crop_pct": 0.8}),
        ("crop_pct", {"crop_pct": 0.7, "std": (0.5, 0.6, 0.7)}),
        ("a size that its config does not say", {"crop_pct": 0.5}),
    ],
)
def test_options_are_stated_in_the_processors_own_terms_and_saved(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    model = vit(tmp_path / "dense", FAST[name])
    before = make_transform(model, train=False)
    set_preprocessing(model, **given)
    after = make_transform(model, train=False)
    assert before.size == after.size
    for key in given.keys() & {"mean", "std", "interpolation"}:
        stated = getattr(after, key)
        assert stated == given[key] if isinstance(stated, str) else stated == pytest.approx(given[key])
    if "crop_pct" in given:
        assert after.resize == int(SIDE / given["crop_pct"])
    folder = lfrns.save(model, tmp_path / "slim")
    assert difference(after, folder) < 1e-6 < difference(before, folder)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("LeViT", {"crop_pct": 0.9}),
        ("blue first", {"mean": (0.5, 0.5, 0.5)}),
        ("normalised twice", {"std": (0.2, 0.2, 0.2)}),
        ("bicubic", {"interpolation": "hamming"}),
    ],
)
def test_options_that_a_processor_cannot_state_are_refused(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = vit(tmp_path, (FAST | OWN)[name])
    key = next(iter(given))
    with pytest.raises(ValueError, match=rf"{key}=.*{type(load_processor(model)).__name__} has no settings.*Leave"):
        set_preprocessing(model, **given)


@pytest.mark.parametrize("name", ["LeViT", "blue first"])
def test_training_crops_and_mirrors_before_the_processor_by_the_seed_in_workers_too(name: str, tmp_path: Path) -> None:
    settings = (FAST | OWN)[name]
    large = {**settings, "size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}}
    for folder, keys, side in (("small", settings, SIDE), ("large", large, 40)):
        (tmp_path / folder).mkdir()
        transform = make_transform(model_with(tmp_path / folder, keys), train=True)
        pictures = [noise(60, 50, seed) for seed in range(6)]
        data = ImageData(pictures, list(range(6)), class_names=list("abcdef"), transform=transform)
        first, second = DataLoader(data, 3), DataLoader(data, 3, num_workers=1)
        assert next(iter(first))[0].shape == next(iter(second))[0].shape == (3, 3, side, side)
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(transform(pictures[0]))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        white = transform(Image.new("RGB", (60, 60), (255, 255, 255)))[:, side // 2, side // 2]
        fixed = make_transform(model_with(tmp_path / folder, keys), train=False)
        torch.testing.assert_close(white, fixed(Image.new("RGB", (60, 60), (255, 255, 255)))[:, side // 2, side // 2])


def test_images_of_several_sizes_go_one_by_one_or_are_refused(tmp_path: Path) -> None:
    transform = make_transform(model_with(tmp_path, OWN["sizes that differ"]), train=False)
    data = ImageData([noise(40, 30), noise(90, 30)], [0, 1], class_names=["a", "b"], transform=transform)
    assert len({images.shape for images, _ in DataLoader(data, 1)}) == 2
    with pytest.raises(ValueError, match=r"\(3, 24, .*a batch has one size.*batches of one"):
        list(DataLoader(data, 2))


TEST_SIZE = {"fixed_input_size": True, "test_input_size": (3, 64, 64)}


@pytest.mark.parametrize(
    ("cfg", "way"),
    [
        ({}, Preparation),
        ({"crop_pct": 0.9, "interpolation": "bilinear"}, Preparation),
        ({"crop_mode": "squash", "crop_pct": 0.8}, Preparation),
        ({"crop_mode": "border", "crop_pct": 1.0}, OwnPreparation),
        ({"input_size": (3, 32, 48)}, OwnPreparation),
        ({"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **TEST_SIZE}, Preparation),
    ],
)
def test_a_timm_model_is_shown_what_timms_transform_gives(cfg: dict[str, Any], way: type) -> None:
    model = timm.create_model("cifar_resnet20")
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    own = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    transform = make_transform(model, train=False)
    assert isinstance(transform, way)
    for picture in PICTURES:
        torch.testing.assert_close(transform(picture), own(picture))
    assert make_transform(model, train=True)(PICTURES[1]).shape == own(PICTURES[1]).shape


@pytest.mark.parametrize("options", [{"img_size": 64}, {"in_chans": 1}, {"img_size": 96, "in_chans": 1}])
def test_a_timm_checkpoint_states_the_size_and_the_channels_it_was_shown(
    options: dict[str, int], tmp_path: Path
) -> None:
    model = timm.create_model("test_vit", **options)
    shown, folder = make_transform(model, train=False), lfrns.save(model, tmp_path / "slim")
    grey = noise(130, 110).convert("L")
    picture = grey if "in_chans" in options else noise(130, 110)
    own = AutoImageProcessor.from_pretrained(folder).val_transforms
    torch.testing.assert_close(own(picture), shown(picture))
    torch.testing.assert_close(make_transform(lfrns.load(folder), train=False)(picture), shown(picture))


def test_a_class_of_ones_own_comes_back_with_the_preprocessing_that_was_stated(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    model = build()
    set_preprocessing(model, mean=(0.5, 0.4, 0.3), crop_pct=0.6, interpolation="bilinear")
    lfrns.save(model, tmp_path / "slim", base=build)
    again = lfrns.load(tmp_path / "slim", model=build())
    torch.testing.assert_close(
        make_transform(again, train=False)(PICTURES[1]), make_transform(model, False)(PICTURES[1])
    )
    again.pretrained_cfg["crop_pct"] = 1e-6
    with pytest.raises(ValueError, match=r"pretrained_cfg has crop_pct = 1e-06, which prepares no picture"):
        make_transform(again, train=False)


def test_weights_in_the_users_own_vit_come_with_their_processor(tmp_path: Path) -> None:
    model = vit(tmp_path / "dense", FAST["bicubic"])
    set_preprocessing(model, mean=(0.1, 0.2, 0.3))
    folder = lfrns.save(model, tmp_path / "slim")
    again = lfrns.load(folder, model=create_dense(str(tmp_path / "dense")))
    assert difference(make_transform(again, train=False), folder) < 1e-6


def saved(picture: Image.Image, kind: str, **options: Any) -> dict[str, Any]:
    """A picture as a file's bytes."""
    picture.save(buffer := io.BytesIO(), kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    deep = decode_picture(saved(Image.fromarray(RAMP.astype(np.uint16)), kind), ".")
    assert deep.mode == "L"
    np.testing.assert_allclose(np.asarray(deep, dtype=float), RAMP.astype(np.uint16) / 257, atol=0.51)
    show = make_transform(timm.create_model("cifar_resnet20"), train=False)
    flat = show(Image.fromarray((RAMP / 257).round().astype(np.uint8)))
    assert (show(Image.fromarray(RAMP.astype(np.uint16))) - flat).abs().max() < 0.02


def test_twelve_bits_in_a_tiff_are_scaled_by_what_the_file_says() -> None:
    values = (RAMP / 16).astype(np.uint16).reshape(-1, 2)  # two values of 12 bits lie in three bytes
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], -1)
    tags = {256: 32, 257: 32, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 32, 279: packed.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + packed.size)
    file = head + packed.astype(np.uint8).tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)
    picture = decode_picture({"bytes": file, "path": None}, ".")
    np.testing.assert_allclose(np.asarray(picture, dtype=float), RAMP / 257, atol=0.6)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [(RAMP.astype(np.int32), "'I' holds 32-bit integers"), (np.full((9, 9), np.nan, np.float32), "'F' holds floats")],
)
def test_numbers_of_no_stated_range_are_refused(pixels: np.ndarray, said: str) -> None:
    picture = Image.fromarray(pixels)
    for read in (
        lambda: make_transform(timm.create_model("cifar_resnet20"), train=False)(picture),
        lambda: decode_picture(saved(picture, "TIFF"), "."),
    ):
        with pytest.raises(ValueError, match=rf"{said}.*Save it with 8 or 16 bits"):
            read()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_a_picture_of_any_mode_is_shown_as_the_pipeline_shows_it(mode: str, tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    picture = noise(50, 40).convert("RGBA" if mode == "PA" else mode) if mode != "PA" else noise(50, 40).convert("PA")
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(np.asarray(noise(50, 40, 1))[..., 0]))
    model = model_with(tmp_path, {**FAST["bicubic"], "do_convert_rgb": True})
    own = AutoImageProcessor.from_pretrained(tmp_path)
    wanted = own(images=load_image(picture), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(make_transform(model, train=False)(picture), wanted)


def test_a_picture_is_turned_as_its_exif_says_wherever_it_comes_from() -> None:
    picture, exif = noise(32, 32), Image.Exif()
    exif[0x0112] = 6
    file = saved(picture, "PNG", exif=exif)
    show = make_transform(timm.create_model("cifar_resnet20"), train=False)
    turned = show(picture.transpose(Image.Transpose.ROTATE_270))
    torch.testing.assert_close(show(decode_picture(file, ".")), turned)
    torch.testing.assert_close(show(Image.open(io.BytesIO(file["bytes"]))), turned)


def test_arrays_in_a_column_are_pictures_from_0_to_255_or_refused(tmp_path: Path) -> None:
    import datasets

    def load(kind: str, *shape: int, value: int = 200) -> ImageData:
        """Data whose pictures are arrays of 200."""
        kinds = {2: datasets.Array2D, 3: datasets.Array3D}
        features = {"image": kinds[len(shape)](shape, kind), "label": datasets.Value("int64")}
        rows = {"image": [np.full(shape, value, kind)] * 3, "label": [0, 1, 0]}
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        made.to_parquet(tmp_path / "train-00000-of-00001.parquet")
        return load_data(tmp_path, "train", transform=lambda picture: torch.from_numpy(np.array(picture)))

    datasets.disable_progress_bar()
    for kind, shape in (("uint8", (4, 5, 3)), ("uint8", (4, 5)), ("int64", (4, 5)), ("int64", (4, 5, 3))):
        image, label = load(kind, *shape)[1]
        assert image.unique().tolist() == [200] and image.shape[:2] == (4, 5) and label == 1
    for kind in ("float32", "uint16"):
        with pytest.raises(ValueError, match=rf"'image' holds arrays of {kind}.*white. Store them as uint8"):
            load(kind, 4, 5)
    for shape, number in (((3, 4, 5), 200), ((4, 5, 3), 256)):
        with pytest.raises(ValueError, match=r"3 of 3 pictures cannot be read.*(is no picture|from 256 to 256)"):
            load("int64", *shape, value=number)[0]


def test_a_trained_model_predicts_as_its_pipeline_and_so_says_the_record(
    module: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processors = module("processors")
    monkeypatch.setattr(processors, "IMAGES", 60)
    monkeypatch.setattr(processors, "TRAINING_IMAGES", 240)
    rows = processors.compare_trained(tmp_path, ["LeViT"])
    assert [row["way"] for row in rows] == ["own"]
    assert not [row for row in rows if processors.wrong_model(row)] and all(row["images"] == 60 for row in rows)


def test_types_and_odd_settings_are_compared_and_laid_out(
    module: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processors = module("processors")
    odd = ("no normalisation", "crop of less", processors.INSIDE)
    rows = processors.compare_types(tmp_path, ["poolformer", "siglip2", "timm_wrapper"], odd)
    assert len(rows) == 8 and not [row for row in rows if processors.wrong(row)]
    assert [row["type"] for row in rows if "refused" in row] == ["siglip2"]
    assert processors.wrong({**rows[0], "levels": 1.5}) and processors.wrong({"refused": "it", "theirs": None})
    content = {"command": "it", "commit": "it", "took": "1 s", "versions": {}, "pixels": rows, "trained": []}
    assert "| siglip2 |" in processors.render(content)
    # The comparison itself can fail: a transform that is a few levels darker is seen.
    real = processors.make_transform
    monkeypatch.setattr(
        processors, "make_transform", lambda *given, **more: lambda p: real(*given, **more)(p) - 4 / 255
    )
    off = processors.compare_types(tmp_path / "off", ["vit"], odd[:1])
    assert [processors.wrong(row) for row in off] == [True, True] and off[1]["levels"] == pytest.approx(4, abs=0.01)


def test_the_page_of_pixels_is_what_the_results_say(module: Any) -> None:  # noqa: F811
    processors = module("processors")
    content = json.loads(processors.RESULTS.read_text())
    assert processors.PAGE.read_text() == processors.render(content)
    assert not [row for row in content["pixels"] if processors.wrong(row)]
    assert not [row for row in content["trained"] if processors.wrong_model(row)]


def test_a_long_picture_goes_through_a_processor_of_large_images(tmp_path: Path) -> None:
    """Donut brings the shorter side to 1,920 pixels first: 74 million of them, which it makes small again."""
    processor = transformers.DonutImageProcessor(size={"height": 2560, "width": 1920})
    prepare = lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    own = OwnPreparation(prepare, "RGB", (2560, 1920), training=False, flip=False)
    assert own(Image.new("RGB", (700, 35))).shape == (3, 2560, 1920)
    with pytest.raises(ValueError, match=r"3000 x 30 pixels, which is 368,640,000 where its shorter side has 1920"):
        own(Image.new("RGB", (3000, 30)))
