"""Checkpoints at random, honest and hostile, each opened in a child that may map little more than it did.

A fifth are honest: every network of the coverage tables in turn, with weights of all kinds, whole or narrowed. The
others ask for what their weights do not hold: sizes, windows and positions of any number, bases of any size, settings
of images. Weights are sparse files of zeros: a file's size counts, its values do not.
"""

import contextlib
import gc
import inspect
import json
import os
import random
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from memory import GIBIBYTE
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

import lfrns_hub as lfrns
from lfrns_hub.checkpoint.narrow_classes import TYPE_PREFIX
from lfrns_hub.checkpoint.transformers import narrow_classes
from lfrns_hub.coverage.cases import Case, list_cases
from lfrns_hub.format.memory import NoDraws
from lfrns_hub.pictures import make_transform
from lfrns_hub.zoo import create_base

SHARD = 25
SECONDS = 60  # of the processor; five times as many by the clock, beside other programs
CUT_SHORT = range(2 * GIBIBYTE, 64 * GIBIBYTE)  # sizes of files that are cut: machines of tests hold no two of them
FOUND = Path("out") / "checkpoints"
HONEST = 5  # one of so many
LOOKED = 8  # one of so many is shown a picture although its settings are the usual ones
SETTINGS_STATED = ", settings of images"
FAMILIES = [case for case in list_cases(variants=False) if case.kind in ("timm", "transformers")]
NUMBERS = (0, 1, 2, 3, 7, 16, 33, 64, 127, 224, 256, 513, 1000, 1024, 2048, 4096, 8191, 65_536, 1 << 20, 1 << 31, -1)
SIZES = ("img_size", "patch_size", "window_size", "depths", "embed_dim", "num_heads", "in_chans", "block_size")
POSITIONS = (
    "image_size",
    "patch_size",
    "window_size",
    "n_positions",
    "num_labels",
    "num_latents",
    "max_position_embeddings",
)
SETTINGS = {
    "crop_pct": (1e-3, 0.01, 0.02, 0.5, 1, 2, "x", None, float("nan")),
    "mean": ([], [0.5], [0.5] * 3, "abc", 0.5, [1e9] * 3, ["a"] * 3, {}, [0.5] * 10**4),
    "std": ([], [0.0] * 3, [0.5] * 3, [1e-30] * 3, "abc", [[]]),
    "input_size": ([3, 4096, 4096], [3, 10**6, 10**6], [4096, 4096, 4096], [3], "abc", [3, 0, 1], [3, 33, 4096]),
    "interpolation": ("bicubic", "nearest", "none", 3, []),
    "crop_mode": ("squash", "border", "x", 5),
    "first_conv": ("x" * 1000, [], 5, [[]], "norm"),
    "classifier": ("x", [], 5, {}),
}
STATED = (*SETTINGS, "fixed_input_size")
PROCESSOR = {
    "size": ({"shortest_edge": 4096}, {"height": 4096, "width": 4096}, 10**6, {"longest_edge": 4096}, "x", {}, [4096]),
    "crop_size": ({"height": 4096, "width": 4096}, 4096, [], {"height": -1, "width": 5}),
    "crop_pct": (1e-3, 0.01, "x"),
    "do_resize": (False, True),
    "do_center_crop": (True, "x"),
    "image_mean": ([], [0.5] * 3, "abc", [0.5] * 10**4),
    "resample": (0, 2, 9, "x"),
    "rescale_factor": (1, 1e30, "x"),
    "size_divisor": (4096, 10**9, 0),
}
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
OTHERS = {torch.int64: ("I64", 8), torch.int32: ("I32", 4), torch.bool: ("BOOL", 1), torch.uint8: ("U8", 1)}


def write_checkpoint(number: int, folder: Path) -> str:
    """Write the checkpoint of a number into an empty folder, and return what it is."""
    draw = random.Random(number)
    honest = number % HONEST == 0
    case = FAMILIES[number // HONEST % len(FAMILIES)] if honest else draw.choice(FAMILIES)
    write = write_timm if case.kind == "timm" else write_transformers
    settings = write(case, draw, folder, honest)
    return f"{'honest' if honest else 'hostile'} {case.kind} {case.model}{SETTINGS_STATED if settings else ''}"


def write_timm(case: Case, draw: random.Random, folder: Path, honest: bool) -> bool:
    """Write a checkpoint in timm's layout, and return whether it has settings of images of its own."""
    classes, cfg = draw.choice((2, 10, 1000)), {}
    large = not honest and draw.random() < 0.2
    base, args = (draw.choice(timm.list_models()), {}) if large else (case.model, {"num_classes": classes, **case.args})

    def build(**given: Any) -> torch.nn.Module:
        with torch.device("meta"), NoDraws():
            return timm.create_model(base, **args, **given)

    model, asked = build(), {}
    if not honest:
        takes = inspect.signature(type(model).__init__).parameters.values()
        keys = {one.name: one.default for one in takes if isinstance(one.default, (int, float, tuple, list))}
        keys |= {name: None for name in SIZES if draw.random() < 0.1}
        chosen = draw.choices(sorted(keys.keys() - args.keys()) or ["img_size"], k=draw.randint(0, 3))
        asked = {key: _number(draw, keys.get(key)) for key in chosen}
        if draw.random() < 0.3:
            cfg = {key: draw.choice(SETTINGS[key]) for key in draw.sample(list(SETTINGS), 1)}
    model = _within(lambda: build(**asked)) or model
    shapes, state = _narrowed(draw, honest, model.state_dict(), classes)
    stated = {**args, **asked, "base": base, "shapes": shapes, "attrs": {}}
    config = {"architecture": "lfrns_slim", "model_args": stated, "num_classes": classes}
    stated_cfg = {key: model.pretrained_cfg[key] for key in STATED if key in model.pretrained_cfg}
    config |= {"pretrained_cfg": {"num_classes": classes, **stated_cfg, **cfg}, "slim": {"format_version": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    write_zeros(state, folder / "model.safetensors", draw.choice(list(DTYPES)))
    return bool(cfg)


def write_transformers(case: Case, draw: random.Random, folder: Path, honest: bool) -> bool:
    """Write a checkpoint in transformers' layout, perhaps with settings of images: whether with them."""
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[case.model]
    known = {"architectures": [names if isinstance(names, str) else names[0]], "num_labels": draw.choice((2, 10, 1000))}
    fields = AutoConfig.for_model(case.model, **known, **case.args).to_dict()
    del fields["model_type"]
    asked: list[tuple[dict[str, Any], str]] = []
    for _ in range(0 if honest else draw.randint(1, 3)):
        stated = draw.random() < 0.7
        asked.append(draw.choice(_places(fields)) if stated else (fields, draw.choice(POSITIONS)))

    def build() -> tuple[str, dict[str, torch.Tensor], bool]:
        config = CONFIG_MAPPING[TYPE_PREFIX + case.model].from_dict(fields)
        with torch.device("meta"), NoDraws():
            model = AutoModelForImageClassification.from_config(config)
        own = model.state_dict(keep_vars=True)
        on_disk = revert_weight_conversion(model, own)
        return type(model).__name__, on_disk, on_disk.keys() == own.keys()

    built = build()
    for holder, key in asked:
        holder[key] = _number(draw, holder.get(key))
    name, own, plain = _within(build) or built
    shapes, state = _narrowed(draw, honest, own, known["num_labels"]) if plain else ({}, _kinds(own))
    fields |= {"model_type": TYPE_PREFIX + case.model, "architectures": [name], "slim": {"format_version": 1}}
    (folder / "config.json").write_text(json.dumps(fields | {"lfrns": {"shapes": shapes, "attrs": {}}}))
    write_zeros(state, folder / "model.safetensors", draw.choice(list(DTYPES)))
    stated = not honest and draw.random() < 0.5
    if stated:
        kinds = ("ViTImageProcessor", "ConvNextImageProcessor", "BitImageProcessor", "CLIPImageProcessor")
        settings: dict[str, Any] = {"image_processor_type": draw.choice(kinds)}
        for key in draw.sample(list(PROCESSOR), 3):
            settings[key] = draw.choice(PROCESSOR[key])
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return stated


def write_zeros(shapes: dict[str, tuple[list[int], torch.dtype]], path: Path, floats: str) -> None:
    """Write a safetensors file whose values are a hole, cut short where it is larger than a test should read."""
    header, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        kind, size = (floats, DTYPES[floats]) if dtype.is_floating_point else OTHERS[dtype]
        start, end = end, end + size * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (end // 64 if end in CUT_SHORT else end))


def _narrowed(
    draw: random.Random, honest: bool, state: dict[str, torch.Tensor], classes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choose smaller shapes of tensors, but for a head's: what differs, and all shapes with their kinds of numbers."""
    share = draw.choice((1, 0.5, 0.25)) if honest else draw.choice((0, 0, 1))
    less = {}
    for name, (shape, dtype) in _kinds(state).items():
        whole = not dtype.is_floating_point or shape[:1] == [classes]
        less[name] = (shape if whole else [max(1, round(share * side)) for side in shape], dtype)
    return {name: shape for name, (shape, _) in less.items() if shape != list(state[name].shape)}, less


def _kinds(state: dict[str, torch.Tensor]) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return the shapes and the kinds of numbers of a state."""
    return {name: (list(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def _number(draw: random.Random, like: Any = None) -> Any:
    """Draw a value of a size, mostly of the kind that stands there: a number, or as many as there are."""
    if draw.random() < 0.1:
        return draw.choice((None, [], "x", -0.5, [7] * 9))
    if isinstance(like, (list, tuple)) and like and all(type(part) is int for part in like):
        return [draw.choice((part, draw.choice(NUMBERS))) for part in like]
    return draw.choice(NUMBERS)


def _places(fields: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """List where a configuration has a number, or some."""
    found = [(fields, key) for key, value in fields.items() if type(value) in (int, list)]
    return found + [place for value in fields.values() if isinstance(value, dict) for place in _places(value)]


def _within(build: Callable[[], Any]) -> Any:
    """Build, for some seconds at most; None where that fails."""

    def ring(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(2)
    try:
        return build()
    except Exception:
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_child(function: Callable[[], str], more: int) -> str:
    """Run a function in a forked child that may map so many bytes more than it does: its answer, or how it ended."""
    read, write = os.pipe()
    gc.freeze()  # the child would copy all that it looks through
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(5 * SECONDS)
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))
            answer = function()
        except BaseException as error:
            answer = f"raised {type(error).__name__}: {error}"
        with contextlib.suppress(BaseException):
            os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return answer or f"ended by signal {status & 127}"


def use(call: Callable[[], Any]) -> str:
    """Make a call: "fine", what it refused, or "over" where memory did not suffice, also behind an error of ours."""
    try:
        call()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocat" in str(cause).lower():
                return f"over: {cause!r}"[:500]
            cause = cause.__cause__ or cause.__context__
        return (
            f"refused: {error}"[:500] if type(error) is ValueError else f"raised {type(error).__name__}: {error}"[:500]
        )
    return "fine"


def open_folder(folder: Path, pictures: bool = True) -> str:
    """Load a checkpoint, prepare a picture as it says if asked to, and build its dense model: what came of each."""

    models: list[torch.nn.Module] = []

    def look() -> None:
        for model in models if pictures else ():
            make_transform(model, train=False)(Image.new("RGB", (300, 200)))

    ends = [use(lambda: models.append(lfrns.load(folder))), use(look)]
    models.clear()  # the limit is that of one call
    return json.dumps([*ends, use(lambda: create_base(folder))])


def warm_up() -> None:
    """Import what children would import anew each time."""
    import torchvision.transforms.v2  # noqa: F401

    for case in FAMILIES:
        if case.kind == "transformers":
            narrow_classes(case.model)
    make_transform(timm.create_model("test_resnet"), train=False)


def try_checkpoint(number: int) -> dict[str, Any]:
    """Write and open the checkpoint of a number: what it is, the size of its files, what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="lfrns-checkpoint-"))
    try:
        kind = in_child(lambda: write_checkpoint(number, folder), 8 * GIBIBYTE)
        if not (folder / "model.safetensors").is_file():
            return {"number": number, "kind": kind, "size": 0, "ends": None}
        size = sum(path.stat().st_size for path in folder.iterdir())
        pictures = kind.endswith(SETTINGS_STATED) or number % LOOKED == 0
        answer = in_child(lambda: open_folder(folder, pictures), 2 * size + GIBIBYTE)
        ends = json.loads(answer) if answer.startswith("[") else [answer] * 3
        return {"number": number, "kind": kind, "size": size, "ends": ends}
    finally:
        shutil.rmtree(folder)


def faults(one: dict[str, Any]) -> list[str]:
    """List what should not be: memory that does not suffice, another error than ours, an honest one that is refused."""
    if one["ends"] is None:
        return [f"not written: {one['kind']}"]
    honest = one["kind"].startswith("honest")
    bad = [end for end in one["ends"] if end != "fine" and not end.startswith("refused: ")]
    return bad + ([end for end in one["ends"][::2] if end != "fine"] if honest else [])


def summary(folder: Path = FOUND) -> str:
    """What the shards found."""
    tried = [one for path in sorted(folder.glob("*.json")) for one in json.loads(path.read_text())]
    ends = Counter(
        (one["kind"].split()[0], *(end.partition(":")[0] for end in one["ends"] or ["none"])) for one in tried
    )
    lines = [f"{len(tried)} checkpoints"] + [f"{count:6} {' '.join(end)}" for end, count in ends.most_common()]
    return "\n".join([*lines, *(f"{one['number']} {one['kind']}: {bad}" for one in tried for bad in faults(one))])


if __name__ == "__main__":
    print(summary())
