"""What a file may make us allocate: its own size, a few times over, and half a gigabyte; the rest is refused."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from memory import GIBIBYTE, limited
from PIL import Image
from random_checkpoints import write_zeros
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

import lfrns_hub as lfrns
from lfrns_hub.format import memory, untrusted
from lfrns_hub.format.memory import MemoryBudget, bounded, is_placeholder
from lfrns_hub.pictures import ImageData, decode_picture, input_size_of, load_data, make_transform
from lfrns_hub.pictures.preparation import OwnPreparation
from lfrns_hub.pictures.processor import check_settings
from lfrns_hub.pictures.stream import stream_data
from lfrns_hub.zoo import create_base, create_dense, read_weights

MEGABYTE = 10**6


@pytest.mark.parametrize(
    "call",
    [
        lambda device: torch.zeros(10**12, device=device),
        lambda device: torch.arange(10**12, device=device),
        lambda device: torch.arange(10**5, device=device)[:, None] - torch.arange(10**5, device=device),
        lambda device: torch.zeros(1, device=device).expand(10**12).contiguous(),
        lambda device: torch.cat([torch.zeros(10**5, device=device).expand(10**5, 10**5)] * 3),
        lambda device: torch.ones(2, device=device).repeat(10**11),
        lambda device: [torch.zeros(10**5, device=device) for _ in range(10**4)],
    ],
    ids=["zeros", "arange", "pairs", "contiguous", "cat", "repeat", "many"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_operation_that_would_exceed_the_budget_is_refused_before_it_runs(call: Any, device: str) -> None:
    with (
        limited(200 * MEGABYTE),
        pytest.raises(ValueError, match=r"asks for [\d,.]+ GB that .* at most 0\.01 GB"),
        MemoryBudget(10 * MEGABYTE),
    ):
        call(device)


def test_what_is_freed_counts_no_longer_and_a_view_counts_once() -> None:
    with MemoryBudget(3 * MEGABYTE) as budget:
        for _ in range(20):
            held = torch.zeros(MEGABYTE // 4)
        assert budget.live == MEGABYTE
        views = [held[start:] for start in range(20)]
        del held
        assert budget.live == MEGABYTE
        del views
        assert budget.live == 0


def test_parameters_of_a_dry_run_count_only_where_they_will_take_memory() -> None:
    with bounded(100), torch.device("meta"):
        layers = [nn.Linear(9000, 9000) for _ in range(3)]  # 0.3 GB each
    assert len(layers) == 3
    with pytest.raises(ValueError, match=r"asks for 0\.65 GB"), bounded(100, dense=True), torch.device("meta"):
        [nn.Linear(9000, 9000) for _ in range(3)]


def test_placeholders_take_no_memory_and_are_not_written_to() -> None:
    with limited(GIBIBYTE), bounded(100, placeholders=True):
        layers = [nn.Linear(9000, 9000) for _ in range(10)]
        nn.init.normal_(layers[0].weight)
        layers[0].weight.data.fill_(3)
    assert all(is_placeholder(layer.weight) and layer.weight.shape == (9000, 9000) for layer in layers)
    assert not layers[0].weight.any() and not layers[0].weight.is_meta


def test_a_constructor_is_stopped_when_it_makes_more_parts_than_a_file_holds() -> None:
    with bounded(100), torch.device("meta"):
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))
    with pytest.raises(ValueError, match="more than 264 parameters, the weights hold 100 tensors"), bounded(100):
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(200)))
    with pytest.raises(ValueError, match="more than 5,696 modules"), bounded(100):
        nn.Sequential(*(nn.Identity() for _ in range(6000)))
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(200)))  # and no longer afterwards


def test_a_constructor_that_computes_in_python_for_long_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(memory, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"more than 0\.2 seconds of computing"), bounded(100):
        while True:
            pass
    with bounded(100):
        time.sleep(1.5)  # what waits is left alone


def stranger(folder: Path, kind: str, **fields: Any) -> Path:
    """Write a checkpoint of transformers whose floating-point tensors hold one number each."""
    config = getattr(transformers, f"{kind}Config")(num_labels=2, **fields)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    state = model.state_dict()
    shapes = {n: [1] * t.ndim if t.is_floating_point() else list(t.shape) for n, t in state.items()}
    own = {"model_type": f"lfrns_{config.model_type}", "lfrns": {"shapes": shapes, "attrs": {}}}
    own |= {"slim": {"format_version": 1}, "architectures": [f"Lfrns{type(model).__name__}"]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | own))
    write_zeros({n: (s, state[n].dtype) for n, s in shapes.items()}, folder / "model.safetensors", "F32")
    return folder


def stranger_of_timm(folder: Path, base: str, **args: Any) -> Path:
    """Write a checkpoint of timm whose floating-point tensors hold one number each."""
    with torch.device("meta"):
        state = timm.create_model(base, **args).state_dict()
    shapes = {n: [1] * t.ndim if t.is_floating_point() else list(t.shape) for n, t in state.items()}
    config = {"architecture": "lfrns_slim", "model_args": {"base": base, "shapes": shapes, **args}}
    (folder / "config.json").write_text(json.dumps(config | {"slim": {"format_version": 1}, "pretrained_cfg": {}}))
    write_zeros({n: (s, state[n].dtype) for n, s in shapes.items()}, folder / "model.safetensors", "F32")
    return folder


SWIN = {"embed_dim": 4, "depths": [1], "num_heads": [1], "patch_size": 4}


@pytest.mark.parametrize(
    "write",
    [
        lambda at: stranger(at, "Swin", **SWIN, window_size=256, image_size=1028),
        lambda at: stranger(at, "Swinv2", **SWIN, window_size=128, image_size=516),
        lambda at: stranger(at, "ImageGPT", n_positions=1 << 17, n_embd=8, n_layer=1, n_head=1),
        lambda at: stranger_of_timm(at, "swin_tiny_patch4_window7_224", img_size=2048, window_size=256),
        lambda at: stranger_of_timm(at, "vit_relpos_small_patch16_224", img_size=4096),
    ],
    ids=["Swin", "Swin v2", "ImageGPT", "timm's Swin", "relative positions"],
)
def test_tables_that_no_file_holds_are_refused_before_they_are_made(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path)
    with limited():
        for call in (lfrns.load, create_base):
            with pytest.raises(ValueError, match=r"asks for [\d.,]+ GB that the weights do not hold"):
                call(folder)


def test_a_dense_base_of_billions_is_loaded_slim_and_not_built(tmp_path: Path) -> None:
    folder = stranger_of_timm(tmp_path, "vit_7b_patch16_dinov3", num_classes=3)
    with limited():
        assert sum(p.numel() for p in lfrns.load(folder).parameters()) < 10**5
        with pytest.raises(ValueError, match=r"create_base\(.*asks for .* name that \(lfrns: --dense\)"):
            create_base(folder)
    assert create_base(folder, device="meta").num_features == 4096  # which takes nothing


@pytest.mark.parametrize("weights", [True, False])
def test_a_dense_folder_is_refused_as_well(weights: bool, tmp_path: Path) -> None:
    folder = stranger(tmp_path, "Swin", **SWIN, window_size=256, image_size=1028)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "swin", "architectures": ["SwinForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    if not weights:
        (folder / "model.safetensors").unlink()
    with (
        limited(),
        pytest.raises(ValueError, match=r"create_dense\(.*asks for [\d.,]+ GB that the weights"),
    ):
        create_dense(str(folder), pretrained=weights)


def test_a_dense_folder_may_be_as_large_as_its_weights_and_any_size_without(tmp_path: Path) -> None:
    config = {"architecture": "vit_large_patch16_224", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert create_dense(str(tmp_path), pretrained=False).num_classes == 3
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10)
    with limited(), pytest.raises(ValueError, match=r"create_dense\(.*asks for 0\.[56]\d GB"):
        create_dense(str(tmp_path))


def test_loops_over_all_pairs_of_places_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "SECONDS", 1)
    folder = stranger(tmp_path, "Levit", architectures=["LevitForImageClassification"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 4096, "patch_size": 4}))
    with limited(), pytest.raises(ValueError, match="more than 1 seconds of computing"):
        lfrns.load(folder)


def test_as_many_names_of_classes_as_no_file_fills_are_refused(tmp_path: Path) -> None:
    folder = stranger(tmp_path, "ViT", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    names = {str(number): "x" for number in range(70_000)}
    for change in ({"num_labels": 1 << 20}, {"id2label": names}, {"vision_config": {"num_labels": 1 << 20}}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with limited(), pytest.raises(ValueError, match=r"sizes must lie from -65536 to 65536"):
            lfrns.load(folder)


def as_view() -> torch.Tensor:
    return torch.zeros(1).expand(10**9, 64)


@pytest.mark.parametrize(
    "tensor",
    [
        as_view(),
        torch.zeros(1).as_strided((10**6, 10**6), (0, 0)),
        torch.zeros(100).as_strided((90, 11), (1, 1)),
        torch.empty(10**9, 64, device="meta"),
        torch.empty(5, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (10**9, 64)),
    ],
    ids=["expanded", "strided", "overlapping", "meta", "small meta", "sparse"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_whose_views_are_larger_than_what_it_stores_is_refused(tensor, zipped: bool, tmp_path: Path) -> None:
    torch.save({"linear.weight": tensor}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with limited(), pytest.raises(ValueError, match=r"w\.pth.*(does not hold each element|holds no plain tensors)"):
        create_dense("cifar_resnet20", weights=tmp_path / "w.pth")


def test_a_pickle_of_tied_weights_and_parts_of_a_tensor_is_read(tmp_path: Path) -> None:
    tied = torch.randn(20, 30)
    torch.save({"a": tied, "b": tied, "c": tied[3:].T, "d": nn.Parameter(torch.randn(3))}, tmp_path / "w.pth")
    state = read_weights(tmp_path / "w.pth")
    assert torch.equal(state["a"], state["b"]) and state["c"].shape == (30, 17) and state["d"].shape == (3,)


@pytest.mark.parametrize("shape", [(10**9, 0), (10**7, 1)])
def test_a_head_of_another_width_builds_no_classes(shape: tuple[int, int], tmp_path: Path) -> None:
    state = timm.create_model("cifar_resnet20").state_dict()
    save_file(state | {"linear.weight": torch.zeros(shape, dtype=torch.uint8)}, tmp_path / "w.safetensors")
    with limited(), pytest.raises(ValueError, match="1 misshapen"):
        create_dense("cifar_resnet20", weights=tmp_path / "w.safetensors")


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of timm."""
    return lfrns.save(timm.create_model("cifar_resnet20", num_classes=3), tmp_path_factory.mktemp("slim") / "slim")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_pct", 1e-3), ("crop_pct", "0.9"), ("crop_pct", []), ("mean", []), ("mean", "abc"), ("mean", [[1]]),
        ("mean", [1e30] * 3), ("std", [0, 1, 1]), ("std", [True] * 3), ("input_size", [3]), ("input_size", "abc"),
        ("input_size", [3, 1.5, 2]), ("input_size", [3, 10**6, 10**6]), ("interpolation", 3), ("interpolation", []),
        ("crop_mode", "none"), ("first_conv", 3), ("classifier", [1]),
    ],
)  # fmt: skip
def test_settings_of_images_are_checked_before_a_model_has_them(
    key: str, value: Any, slim: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(slim, tmp_path / "slim"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with limited(), pytest.raises(ValueError, match=rf"pretrained_cfg(\[| has ){key}\b") as caught:
        lfrns.load(folder)
    assert "\n" not in str(caught.value)


def test_files_larger_than_the_memory_of_the_machine_are_refused(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(slim, tmp_path / "slim"))
    stored = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shutil.copyfile(stored, folder / "model-00002-of-00002.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(untrusted, "memory_of_machine", lambda: 1.5 * stored.stat().st_size)
        with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors to model-00002.* GB of memory\. Open it on"):
            lfrns.load(folder)
    stored.rename(folder / "model.safetensors")
    os.truncate(folder / "model.safetensors", 1 << 43)  # a hole
    with pytest.raises(ValueError, match=r"model\.safetensors has 8,796\.1 GB, this machine has [\d.]+ GB of memory"):
        lfrns.load(folder)


def test_a_file_that_the_free_memory_does_not_hold_is_one_sentence(slim: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(slim, tmp_path / "slim"))
    write_zeros({"weight": ([1 << 20, 300], torch.float32)}, folder / "model.safetensors", "F32")
    with limited(1 << 30), pytest.raises(ValueError, match=r"has 1\.3 GB, for which the free memory does not suffice"):
        lfrns.load(folder)


def test_half_precision_takes_no_more_than_its_file_and_a_copy(tmp_path: Path) -> None:
    model = timm.create_model("vit_base_patch16_224", num_classes=2).half()  # 172 MB
    lfrns.save(model, tmp_path / "slim")
    del model
    with limited(2 * 172 * 10**6 + (100 << 20)):
        assert next(lfrns.load(tmp_path / "slim").parameters()).dtype == torch.float16


def test_a_picture_of_more_numbers_than_any_model_takes_is_refused() -> None:
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 4096, 4096)}
    with pytest.raises(ValueError, match=r"input_size = .*4096.*: images of 50,331,648 numbers, at most 25,165,824"):
        check_settings(model.pretrained_cfg, "pretrained_cfg")


def test_a_share_that_enlarges_pictures_to_gigabytes_is_refused() -> None:
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 0.012}
    with limited(), pytest.raises(ValueError, match=r"crop_pct = 0\.012, for which pictures are enlarged to more than"):
        make_transform(model, train=False)


@pytest.mark.parametrize("size", [(4096, 4096, 4096), (3, 0, 5), ("a", 1, 2), (3, 5), 7])
def test_a_size_of_images_that_is_none_is_refused(size: Any) -> None:
    model = nn.Module()
    model.pretrained_cfg = {"input_size": size}
    with pytest.raises(ValueError, match=r"states (no size of images|images of 4096|images of 3 x 0)"):
        input_size_of(model)


def large_pictures(folder: Path, count: int) -> list[Path]:
    """Write pictures of 12 megapixels, which take 36 MB each and little on disk."""
    paths = [folder / f"{number}.png" for number in range(count)]
    Image.new("RGB", (4000, 3000), (90, 20, 200)).save(paths[0])
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)
    return paths


def large_data(folder: Path, count: int) -> Path:
    """Write a folder of large pictures in two classes."""
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (folder / "data" / split / name).mkdir(parents=True)
    for number, path in enumerate(large_pictures(folder, count)):
        path.rename(folder / "data" / "train" / "ab"[number % 2] / path.name)
    return folder / "data"


def test_the_front_of_a_stream_keeps_no_decoded_pictures(tmp_path: Path) -> None:
    transform = make_transform(timm.create_model("test_resnet"), train=False)
    stream = stream_data(large_data(tmp_path, 12), "train", transform=transform)
    with limited(350 * MEGABYTE):  # decoded, all at once, they are 576
        images, labels = next(iter(DataLoader(stream.front(12, transform), batch_size=12)))
    assert images.shape == (12, 3, 160, 160) and labels.sum() == 6


@pytest.mark.parametrize("own", [False, True])
def test_large_pictures_of_a_batch_are_decoded_and_resized_one_by_one(own: bool, tmp_path: Path, monkeypatch) -> None:
    transform = make_transform(timm.create_model("test_resnet"), train=True)
    if own:
        plain = make_transform(timm.create_model("test_resnet"), train=False)
        transform = OwnPreparation(plain, "RGB", (160, 160), training=True, flip=True)
    monkeypatch.setattr("lfrns_hub.pictures.image_data.MAX_CACHE_BYTES", 0)
    data = load_data(large_data(tmp_path, 12), "train", transform=transform)
    with limited(350 * MEGABYTE):  # all at once they are 432
        images, labels = next(iter(DataLoader(data, batch_size=12)))
    assert images.shape == (12, 3, 160, 160) and not data.unreadable and labels.sum() == 6


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_shortage_of_memory_is_no_damaged_picture(error: Exception, tmp_path: Path) -> None:
    class Short:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Image.Image:
            raise error

        def name(self, index: int) -> str:
            return "holiday.png"

    data = ImageData(Short(), [0] * 5, class_names=["a"], transform=torch.as_tensor, name="photos")
    with pytest.raises(MemoryError, match=r"photos: holiday\.png: the memory does not suffice. Use smaller batches"):
        data[0]
    assert not data.unreadable


def test_a_picture_so_long_that_resized_it_fills_the_memory_is_left_out() -> None:
    model = timm.create_model("test_resnet")
    pictures = [Image.new("RGB", (200_000, 20)), Image.new("RGB", (200, 100), (9, 9, 9))]
    data = ImageData(pictures, [0, 1], class_names=["a", "b"], transform=make_transform(model, train=False))
    with limited():
        assert data[0][0].shape == (3, 160, 160)
    assert data.unreadable == ["picture 0"]


def test_16_bits_are_scaled_within_the_memory_of_a_picture(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 6000 * 4000, dtype=np.uint16).reshape(4000, 6000)
    Image.fromarray(levels).save(tmp_path / "x.png", compress_level=1)
    with limited(400 * MEGABYTE):
        got = np.asarray(decode_picture({"bytes": None, "path": str(tmp_path / "x.png")}, str(tmp_path)))
    assert got.dtype == np.uint8 and np.array_equal(got, (levels * (255 / 65535)).round().astype(np.uint8))
