"""Whether a model is shown what its own image processor gives: each type of transformers' classifiers, odd settings.

    python benchmarks/processors.py            # both parts, minutes on one core; keeps and renders what it found
    python benchmarks/processors.py --render   # docs/pixels.md from benchmarks/results/processors.json

Part one: a folder with a preprocessor_config.json for each type and setting; `make_transform` beside what
`AutoImageProcessor.from_pretrained` of the folder gives, on pictures that no proof has seen. Differences are in levels
of 255. Part two: for each odd setting a small network, trained on scikit-learn's digits in colour as the processor
gives them; its predictions by `lfrns_hub.measure` beside those of transformers' pipeline on the same 200 pictures.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

import lfrns_hub as lfrns
from lfrns_hub.pictures import ImageData, Preparation, make_transform
from lfrns_hub.pictures.proof import fit_colours
from lfrns_hub.zoo import create_dense

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "processors.json", ROOT / "docs" / "pixels.md"
# Types that transformers maps to no processor, and what their published checkpoints come with.
PUBLISHED = {"dinov2_with_registers": "BitImageProcessor", "hgnet_v2": "ConvNextImageProcessor"}
# Of what makes no images of a picture only the default is shown.
NOT_IMAGES = ("imagegpt", "shieldgemma2", "siglip2")
INSIDE = "in processor_config.json"
SIDE = 40  # pixels of the odd settings' images
SQUARE = {"height": SIDE, "width": SIDE}
# Odd settings, as keys of preprocessor_config.json; a processor has those whose every key it takes. None removes a key.
ODD: dict[str, dict[str, Any]] = {
    "no normalisation": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_normalize": False, "do_rescale": False},
    "rescaled by 1/127.5": {"rescale_factor": 1 / 127.5},
    "other statistics": {"do_normalize": True, "image_mean": [0.1, 0.4, 0.7], "image_std": [0.9, 0.2, 0.5]},
    "nearest": {"resample": 0},
    "lanczos": {"resample": 1},
    "bilinear": {"resample": 2},
    "bicubic": {"resample": 3},
    "crop of less": {"do_center_crop": True, "crop_size": {"height": 27, "width": 31}},
    "crop of more": {"do_center_crop": True, "crop_size": {"height": 51, "width": 48}},
    "crop without a resize": {"do_resize": False, "do_center_crop": True, "crop_size": SQUARE},
    "oblong": {"size": {"height": 33, "width": 47}},
    "shortest edge, crop": {"size": {"shortest_edge": 45}, "do_center_crop": True, "crop_size": SQUARE},
    "longest edge too, crop": {
        "size": {"shortest_edge": 45, "longest_edge": 90},
        "do_center_crop": True,
        "crop_size": SQUARE,
    },
    "shortest edge, no crop": {"size": {"shortest_edge": 45}, "do_center_crop": False},
    "largest height and width": {"size": {"max_height": 45, "max_width": 60}},
    "padded": {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
    "crop_pct 0.7": {"crop_pct": 0.7},
    "channels the other way round": {"do_flip_channel_order": True},
    "channels as they are": {"do_flip_channel_order": False},
    "rescale offset": {"rescale_offset": True, "rescale_factor": 1 / 127.5},
    "include_top off": {"include_top": False},
    "labels reduced": {"do_reduce_labels": True},
    "not converted to RGB": {"do_convert_rgb": False},
    "no thumbnail, long axis": {"do_thumbnail": False, "do_align_long_axis": True},
    "a key nobody knows": {"sharpness": 3},
    "an integer size": {"size": SIDE},
    INSIDE: {},
    "an old type name": {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"},
}
ANY_CLASS = ("a key nobody knows", INSIDE)  # whose keys no processor has to take


def main() -> int:
    """Run both parts, keep and render them.

    Returns:
        Of the process: 1 where something differs.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="write the page from what was kept, measure nothing")
    options = parser.parse_args()
    if not options.render:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        quiet()
        with tempfile.TemporaryDirectory() as folder:
            pixels = compare_types(Path(folder))
            trained = compare_trained(Path(folder))
        content = {
            "command": "python benchmarks/processors.py",
            "commit": commit.stdout.strip(),
            "took": f"{time.process_time():.0f} s of CPU time",
            "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "transformers", "pillow")},
            "pixels": pixels,
            "trained": trained,
        }
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(render(content), encoding="utf-8")
    print("\n".join(summary(content)))
    return int(any(wrong(row) for row in content["pixels"]) or any(wrong_model(row) for row in content["trained"]))


def quiet() -> None:
    """Silence what transformers tells of settings that are odd on purpose."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def compare_types(folder: Path, types: Any = None, odd: Any = None) -> list[dict[str, Any]]:
    """Compare pixels for each type, by its default processor and by every odd setting that this takes.

    Args:
        folder: For the processors' folders.
        types: Names; None: all that transformers has.
        odd: Names of settings; None: all.
    """
    rows = []
    for name in types or MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        for setting, config in settings_of(name, ODD if odd is None else odd):
            rows.append({"type": name, "setting": setting, **compare_pixels(name, config, folder / name / setting)})
            shown = {key: rows[-1].get(key) for key in ("type", "setting", "way", "levels", "refused")}
            print(*(value for value in shown.values() if value is not None), file=sys.stderr)
    return rows


def settings_of(model_type: str, odd: Any) -> list[tuple[str, dict[str, Any]]]:
    """List a type's settings by name, as preprocessor_config.json (of timm's wrapper: config.json) has them."""
    if model_type == "timm_wrapper":
        cfg = {"input_size": [3, SIDE, SIDE], "mean": [0.1, 0.4, 0.7], "std": [0.9, 0.2, 0.5]}
        made = {"architecture": "test_resnet", "model_type": "timm_wrapper", "num_classes": 10}
        squash, border = {"crop_mode": "squash", "crop_pct": 0.8}, {"crop_mode": "border"}
        cfgs = {"default": cfg, "timm: squash": {**cfg, **squash}, "timm: border": {**cfg, **border}}
        return [(name, {**made, "pretrained_cfg": cfg}) for name, cfg in cfgs.items()]
    name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("torchvision") or PUBLISHED[model_type]
    kind = getattr(transformers, name)
    needed = {"clusters": [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]} if name.startswith("ImageGPT") else {}
    stock = json.loads(kind(**needed).to_json_string())
    small = {**stock, **{key: dict.fromkeys(stock[key], SIDE) for key in ("size", "crop_size") if key in stock}}
    takes = {*kind.valid_kwargs.__annotations__, "image_processor_type", "feature_extractor_type"}
    fits = [key for key in odd if key in ANY_CLASS or set(ODD[key]) <= takes]
    if name != "ViTImageProcessor":
        fits = [key for key in fits if key != "an old type name"]
    changed = {key: {k: v for k, v in {**small, **ODD[key]}.items() if v is not None} for key in fits}
    if INSIDE in changed:
        changed[INSIDE] = {"image_processor": small}
    return [("default", stock), *(() if model_type in NOT_IMAGES else changed.items())]


def compare_pixels(model_type: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare what `make_transform` gives with what the folder's processor gives, on pictures of many sizes.

    Returns:
        `way` (fast, own), `levels` that the two differ by at most, and by how many `pictures`; or why it is `refused`,
        and whether the processor itself makes no images either.
    """
    model = model_of(model_type, config, folder)
    try:
        own = AutoImageProcessor.from_pretrained(folder)
        images = [own(images=picture, return_tensors="pt") for picture in pictures()]
        answer = set(images[0])
        wanted = [image["pixel_values"][0].float() for image in images] if answer == {"pixel_values"} else None
        theirs = None if wanted and wanted[0].ndim == 3 else f"makes {', '.join(sorted(answer))}: no images"
    except Exception as error:  # every processor refuses its settings in its own way
        theirs = f"refuses too: {first_line(error)}"
    try:
        transform = make_transform(model, train=False)
        got = [transform(picture) for picture in pictures()]
    except ValueError as error:
        return {"refused": first_line(error), "theirs": theirs}
    if theirs is not None:
        return {"way": "own", "levels": None, "theirs": theirs}
    level = level_of(own)
    levels = max(
        float(((a - b).abs() / level).max()) if a.shape == b.shape else 255.0 for a, b in zip(got, wanted, strict=True)
    )
    way = "fast" if isinstance(transform, Preparation) else "own"
    return {"processor": type(own).__name__, "way": way, "levels": round(levels, 4), "pictures": len(got)}


def model_of(model_type: str, config: dict[str, Any], folder: Path) -> nn.Module:
    """Write a folder with a processor's settings, and make what `make_transform` needs of a model that came from it."""
    folder.mkdir(parents=True)
    model = nn.Module()
    wrapper = model_type == "timm_wrapper"
    name = "processor_config.json" if "image_processor" in config else "preprocessor_config.json"
    (folder / ("config.json" if wrapper else name)).write_text(json.dumps(config))
    model.config = AutoConfig.from_pretrained(folder) if wrapper else AutoConfig.for_model(model_type)
    model.config.num_channels, model.config._name_or_path = 3, str(folder)
    return model


def level_of(processor: Any) -> Tensor:
    """Return how far apart two neighbouring levels of 255 are in a processor's images, [C, 1, 1]."""

    def prepare(picture: Image.Image) -> Tensor:
        return processor(images=picture, return_tensors="pt")["pixel_values"][0].float()

    colours = fit_colours(prepare, "RGB")
    if colours is None:
        return torch.tensor(1e-6)
    return torch.tensor(colours.std)[:, None, None].abs().reciprocal() / 255


def pictures() -> list[Image.Image]:
    """Draw pictures that no proof has seen: noise, and edges over a ramp, in ten sizes."""
    draw = np.random.default_rng(2024)
    drawn = []
    for columns, rows in ((SIDE, SIDE), (224, 224), (51, 43), (13, 11), (400, 301), (299, 403), (90, 17), (700, 35)):
        ramp = np.linspace(20, 235, columns)[None, :, None] * np.linspace(0.3, 1, rows)[:, None, None]
        edges = 255 * (draw.random((rows, columns, 3)) < 0.02)
        drawn.append(Image.fromarray(np.clip(ramp * [1, 0.7, 0.4] + edges, 0, 255).astype(np.uint8)))
        drawn.append(Image.fromarray(draw.integers(0, 256, (rows, columns, 3), dtype=np.uint8)))
    return drawn


def compare_trained(folder: Path, settings: Any = None) -> list[dict[str, Any]]:
    """Train a small network for each odd setting; compare its predictions with those of transformers' pipeline.

    Args:
        folder: For the models.
        settings: Names of TRAINED; None: all.
    """
    rows = []
    for name in settings or TRAINED:
        rows.append({"setting": name, **compare_model(*TRAINED[name], folder / f"trained {name}")})
        print(*rows[-1].values(), file=sys.stderr)
    return rows


# Of each odd setting the processor's class and keys. "config": the side that config.json names, where not the images'.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, no normalisation": ("ViTImageProcessor", {"size": SQUARE, **ODD["no normalisation"]}),
    "ViT, no rescaling": ("ViTImageProcessor", {"size": SQUARE, **ODD["no rescaling"]}),
    "ViT, rescaled by 1/127.5": ("ViTImageProcessor", {"size": SQUARE, **ODD["rescaled by 1/127.5"]}),
    "ViT, nearest": ("ViTImageProcessor", {"size": SQUARE, **ODD["nearest"]}),
    "ViT, lanczos": ("ViTImageProcessor", {"size": SQUARE, **ODD["lanczos"]}),
    "ViT, oblong": ("ViTImageProcessor", ODD["oblong"]),
    "ViT, padded": ("ViTImageProcessor", {"size": SQUARE, **ODD["padded"]}),
    "DINOv2, crops less than its config says": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 44}, "crop_size": SQUARE},
    ),
    "CLIP, no resize": ("CLIPImageProcessor", ODD["crop without a resize"]),
    "CLIP, longest edge": ("CLIPImageProcessor", ODD["longest edge too, crop"]),
    "DeiT, crop of less": ("DeiTImageProcessor", {"size": SQUARE, **ODD["crop of less"]}),
    "LeViT": ("LevitImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}),
    "MobileViT, blue first": ("MobileViTImageProcessor", {"size": {"shortest_edge": 44}, "crop_size": SQUARE}),
    "EfficientNet, include_top": ("EfficientNetImageProcessor", {"size": SQUARE}),
    "EfficientNet, offset": ("EfficientNetImageProcessor", {"size": SQUARE, **ODD["rescale offset"]}),
    "ConvNeXt, crop_pct": ("ConvNextImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_pct": 0.8}),
    "PoolFormer, crop_pct": (
        "PoolFormerImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, "crop_pct": 0.8},
    ),
    "Perceiver": ("PerceiverImageProcessor", {"size": SQUARE, "crop_size": {"height": 44, "width": 44}}),
    "SegFormer, labels reduced": ("SegformerImageProcessor", {"size": SQUARE, "do_reduce_labels": True}),
    "BEiT, other statistics": ("BeitImageProcessor", {"size": SQUARE, **ODD["other statistics"]}),
    "SigLIP, a key nobody knows": ("SiglipImageProcessor", {"size": SQUARE, "sharpness": 3}),
    "PP-LCNet": ("PPLCNetImageProcessor", {"resize_short": 44, "crop_size": SQUARE}),
    "Donut": ("DonutImageProcessor", {"size": {"height": 48, "width": 40}, "do_align_long_axis": True}),
    "TextNet, sizes differ": ("TextNetImageProcessor", {"size": {"shortest_edge": SIDE}, "size_divisor": 8}),
}
IMAGES, EPOCHS, TRAINING_IMAGES = 200, 8, 600


def compare_model(processor: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, save with its processor, open as a user would, and predict by `lfrns_hub.measure` and by a pipeline.

    Returns:
        `classes` predicted, predictions that `agree` of `images`, both accuracies.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    own = getattr(transformers, processor)(**config)
    own.save_pretrained(folder)
    (train, train_labels), (test, labels) = digits()
    own = AutoImageProcessor.from_pretrained(folder)
    train_images = [own(images=picture, return_tensors="pt")["pixel_values"][0].float() for picture in train]
    widths = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    made = ResNetConfig(num_labels=10, image_size=64, **widths)
    model = ResNetForImageClassification(made)
    fit(model, train_images, torch.tensor(train_labels))
    model.save_pretrained(folder)

    dense = create_dense(str(folder))
    transform = make_transform(dense, train=False)
    data = ImageData(test, labels, class_names=list("0123456789"), transform=transform, training=False)
    loader = DataLoader(data, batch_size=1)
    with torch.no_grad():
        ours = torch.cat([dense(images).logits.argmax(1) for images, _ in loader]).tolist()
    record = lfrns.measure(dense, loader, dense=dense, progress=False)
    ask = pipeline("image-classification", model=str(folder), image_processor=str(folder), device="cpu")
    theirs = [ask.model.config.label2id[answer[0]["label"]] for answer in ask(test, top_k=1)]
    right = sum(answer == label for answer, label in zip(theirs, labels, strict=True))
    return {
        "processor": type(own).__name__,
        "way": "fast" if isinstance(transform, Preparation) else "own",
        "classes": len(set(theirs)),
        "agree": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "images": len(test),
        "top1_pct": record.dense["top1_pct"],
        "pipeline_pct": 100 * right / len(test),
    }


def fit(model: nn.Module, images: list[Tensor], labels: Tensor) -> None:
    """Train for a few epochs, in batches of images of one size."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape), []).append(index)
    model.train()
    for _ in range(EPOCHS):
        for same in by_size.values():
            for batch in torch.tensor(same)[torch.randperm(len(same))].split(50):
                if len(batch) < 2:
                    continue
                optimizer.zero_grad()
                logits = model(torch.stack([images[index] for index in batch.tolist()])).logits
                nn.functional.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
    model.eval()


@functools.cache
def digits() -> tuple[tuple[list[Image.Image], list[int]], tuple[list[Image.Image], list[int]]]:
    """Draw scikit-learn's digits larger, in two colours, in four shapes; to train on, and 200 to test on."""
    from sklearn.datasets import load_digits

    given, draw = load_digits(), np.random.default_rng(0)
    order = draw.permutation(len(given.target))[: TRAINING_IMAGES + IMAGES]
    shapes = ((48, 48), (56, 48), (48, 60), (75, 50))
    made = []
    for number, index in enumerate(order):
        ink, paper = draw.integers(120, 256, 3), draw.integers(0, 100, 3)
        share = given.images[index][..., None] / 16
        picture = Image.fromarray((paper + share * (ink - paper)).round().astype(np.uint8))
        made.append(picture.resize(shapes[number % 4], Image.Resampling.BICUBIC))
    labels = [int(given.target[index]) for index in order]
    return (made[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]), (made[TRAINING_IMAGES:], labels[TRAINING_IMAGES:])


def first_line(error: Exception) -> str:
    """Return an error's first line, without the folder, which is another one every time."""
    return (str(error) or type(error).__name__).splitlines()[0].split(": its ", 1)[-1][:160]


def wrong(row: dict[str, Any]) -> bool:
    """Return whether a row's pixels are others than the processor's, or refused where the processor makes images."""
    return row["theirs"] is None if "refused" in row else row["levels"] is None or row["levels"] > 1.01


def wrong_model(row: dict[str, Any]) -> bool:
    """Return whether a trained model predicts otherwise than its pipeline, or too little to tell."""
    return row["agree"] < row["images"] or row["classes"] < 5 or abs(row["top1_pct"] - row["pipeline_pct"]) > 1e-6


def summary(content: dict[str, Any]) -> list[str]:
    """Say in a few lines what was found."""
    rows, models = content["pixels"], content["trained"]
    made = [row for row in rows if "refused" not in row]
    fast = sum(row["way"] == "fast" for row in made)
    types = len({row["type"] for row in made})
    bad = [f"{row['type']}, {row['setting']}" for row in rows if wrong(row)]
    worst = max((row["levels"] for row in made if row["levels"] is not None), default=0.0)
    lines = [
        f"{len(made)} settings of {types} types: {fast} on the fast path, {len(made) - fast} by the processor itself; "
        f"largest difference {worst:.2f} of 255.",
        f"{len(rows) - len(made)} settings refused: those that the processor refuses too, or that make no images.",
        f"{len(models)} trained models: {sum(not wrong_model(row) for row in models)} predict all {IMAGES} images like "
        f"their pipeline, in at least {min((row['classes'] for row in models), default=0)} classes, with equal "
        "accuracy in the record.",
    ]
    return [*lines, *(f"WRONG: {one}" for one in [*bad, *(row["setting"] for row in models if wrong_model(row))])]


def render(content: dict[str, Any]) -> str:
    """Lay what was found out as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# Pixels",
        "",
        f"Written by `{content['command']}` from benchmarks/results/processors.json ({content['took']}; "
        f"commit {content['commit']}; {versions}).",
        "The transform that a model gets is compared with `AutoImageProcessor.from_pretrained` of its folder, in",
        'levels of 255; "fast" where our own resize, crop and normalisation were proved equal, "own" where the',
        "processor itself runs. Then predictions of small networks, each trained under an odd setting, are compared",
        "with those of `pipeline`.",
        "",
        *summary(content),
        "",
        "| setting | types | fast | own | refused | largest difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in content["pixels"]):
        rows = [row for row in content["pixels"] if row["setting"] == setting]
        ways = [row.get("way", "refused") for row in rows]
        worst = max((row["levels"] for row in rows if row.get("levels") is not None), default=None)
        counts = " | ".join(str(ways.count(way)) for way in ("fast", "own", "refused"))
        lines.append(f"| {setting} | {len(rows)} | {counts} | {'' if worst is None else f'{worst:.2f}'} |")
    lines += ["", "## By type", "", "| type | processor | default | odd settings | largest difference | refused |"]
    lines.append("|---|---|---|---|---:|---|")
    for name in dict.fromkeys(row["type"] for row in content["pixels"]):
        rows = [row for row in content["pixels"] if row["type"] == name]
        made = [row for row in rows if "refused" not in row]
        ways = [row["way"] for row in made if row is not rows[0]]
        worst = f"{max(row['levels'] for row in made):.2f}" if made else ""
        odd = f"{ways.count('fast')} fast, {ways.count('own')} own" if made else ""
        refused = "; ".join(f"{row['setting']}: {row['theirs']}" for row in rows if "refused" in row)
        refused = refused if made else rows[0]["theirs"]
        kind = made[0]["processor"] if made else ""
        lines.append(f"| {name} | {kind} | {rows[0].get('way', '')} | {odd} | {worst} | {refused} |")
    lines += ["", "## Trained models", "", "| setting | way | classes predicted | agree | record, % | pipeline, % |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in content["trained"]:
        agree = f"{row['classes']} | {row['agree']} of {row['images']}"
        lines.append(
            f"| {row['setting']} | {row['way']} | {agree} | {row['top1_pct']:.1f} | {row['pipeline_pct']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
