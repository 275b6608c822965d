"""Files that nobody meant to write: whatever they hold, they load, or end in one clear ValueError of ours.

Each kind of file is tried LFRNS_FUZZ_CASES times (CI: 40), under a limit of 1 GiB of further address space and 20
seconds a case. SECURITY.md has the long run: `LFRNS_FUZZ_CASES=600 pytest -s tests/test_fuzz.py`.
"""

import collections
import contextlib
import copy
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import GIBIBYTE, limited
from safetensors.torch import load_file
from test_checkpoint import cut_pair, slim_transformers
from transformers import ViTConfig

import lfrns_hub as lfrns
from lfrns_hub import checkpoint
from lfrns_hub.format.untrusted import refusing
from lfrns_hub.measure import Record
from lfrns_hub.pictures import make_transform
from lfrns_hub.units import SlimPlan

CASES = int(os.environ.get("LFRNS_FUZZ_CASES", "40"))
SECONDS = 20
LONGEST = 2000  # characters of a message
ENDS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)  # by kind: loaded, refused

fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=CASES == 40,  # CI tries the same cases every time
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 7, 64, 224, 1 << 15, 1 << 16, (1 << 20) - 1, 1 << 31, 10**9, 1 << 63, 10**30]
)
ODD_TEXTS = [
    "",
    "/etc/passwd",
    "../../x",
    "hf-hub:a/b",
    "http://127.0.0.1:9/x",
    "resnet50",
    "float64",
    "load",
    "a" * 10**5,
]
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8) | st.sampled_from(ODD_TEXTS) | st.integers()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=5),
    max_leaves=12,
)
# Keys that libraries read from a config though ours has none of them.
KEYS = [
    "attn_implementation", "auto_map", "backbone", "checkpoint_path", "configuration_files", "custom_load", "depth",
    "depths", "device", "dtype", "embed_dim", "features_only", "hidden_act", "id2label", "img_size", "in_chans",
    "model_type", "num_classes", "num_heads", "num_labels", "patch_size", "pretrained", "pretrained_cfg_overlay",
    "pruned_heads", "quantization_config", "sub_configs", "tie_word_embeddings", "vision_config", "width",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _limits() -> Iterator[None]:
    """At most 1 GiB of address space more than now; what was tried is printed at the end."""
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited():
        yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    for kind, ends in ENDS.items():
        print(f"{kind}: {dict(ends)}")
    total = sum(sum(ends.values()) for ends in ENDS.values())
    print(f"{total} cases, {time.monotonic() - start:.0f} seconds, {grown:.0f} MiB more memory at the peak")


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """End a case that hangs."""

    def ring(*_: Any) -> None:
        raise BaseException(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refuse_hidden(error: BaseException | None) -> None:
    """An allocation that failed is a finding, also where an error of ours was made of it."""
    while error is not None:
        assert not isinstance(error, MemoryError) and "allocat" not in str(error).lower(), repr(error)[:500]
        error = error.__cause__


def try_it(kind: str, call: Callable[[], Any]) -> None:
    """Make a call; it may succeed, or raise a ValueError of ours, neither long nor of several lines."""
    with _alarm():
        try:
            call()
        except ValueError as error:
            assert type(error) is ValueError
            refuse_hidden(error)
            message = str(error)
            assert len(message) <= LONGEST, message[:500]
            assert "\n" not in message
            assert message.startswith(("load(", "SlimPlan", "Record", "model ")), message[:300]
            ENDS[kind]["refused"] += 1
        else:
            ENDS[kind]["loaded"] += 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of timm and one of transformers, to be damaged, and both as they were."""
    root = tmp_path_factory.mktemp("fuzz")
    model = timm.create_model("test_vit", depth=1, img_size=32, num_classes=3)
    mlp = model.blocks[0].mlp
    cut_pair(mlp.fc1, mlp.fc2, list(range(0, mlp.fc1.out_features, 3)))
    fields = {"plan": {"blocks.0.mlp.fc1": [0, 3]}, "widths": {"blocks.0.mlp.fc1": [2, 6]}, "seed": 1}
    model.lfrns_provenance = fields
    for name, one in {"timm": model, "transformers": slim_transformers("vit")}.items():
        checkpoint.save(one, root / name)
        shutil.copytree(root / name, root / f"{name}.good")
    return {path.name: path for path in root.iterdir()}


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """List where in a JSON value something stands."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in parts for place in places(part, (*path, key))]


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """Change a JSON value in one to three places: replace, remove, add or double."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        spots = places(value)
        if not spots:
            break
        *way, last = draw(st.sampled_from(spots))
        holder = value
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "add", "add", "number"])):
            case "replace":
                holder[last] = draw(VALUES)
            case "number":
                holder[last] = draw(NUMBERS)
            case "remove":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(KEYS) | st.text(max_size=6))] = draw(VALUES)
            case "add":
                holder.append(draw(VALUES))
    return value


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Change bytes: flip some, cut the end, put some in, repeat a part."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "cut", "insert", "repeat"])):
            case "flip" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16) | st.sampled_from([b"[" * 9000, b"\0" * 64, b"9" * 5000]))
            case "repeat":
                data[at:at] = data[at : at + 64] * draw(st.integers(1, 50))
    return bytes(data)


def load_damaged(folders: dict[str, Path], which: str, name: str, content: bytes) -> None:
    """Load a checkpoint of which one file has other content."""
    path, good = folders[which] / name, folders[f"{which}.good"] / name
    path.write_bytes(content)
    try:
        try_it(f"{which}: {name}", lambda: lfrns.load(folders[which]))
    finally:
        shutil.copyfile(good, path)


@pytest.mark.parametrize("which", ["timm", "transformers"])
@fuzzed
@given(data=st.data())
def test_a_config_of_any_values(data: st.DataObject, which: str, folders: dict[str, Path]) -> None:
    good = json.loads((folders[f"{which}.good"] / "config.json").read_text())
    load_damaged(folders, which, "config.json", json.dumps(data.draw(damaged(good))).encode())


@pytest.mark.parametrize("which", ["timm", "transformers"])
@fuzzed
@given(data=st.data())
def test_a_header_of_any_values(data: st.DataObject, which: str, folders: dict[str, Path]) -> None:
    good = (folders[f"{which}.good"] / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.dumps(data.draw(damaged(json.loads(good[8 : 8 + length])))).encode()
    content = len(header).to_bytes(8, "little") + header + good[8 + length :]
    load_damaged(folders, which, "model.safetensors", content)


@pytest.mark.parametrize("which", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@fuzzed
@given(data=st.data())
def test_a_file_of_mutated_bytes(data: st.DataObject, which: str, name: str, folders: dict[str, Path]) -> None:
    good = (folders[f"{which}.good"] / name).read_bytes()
    load_damaged(folders, which, name, data.draw(mutated(good)))


@fuzzed
@given(data=st.data())
def test_a_plan_of_any_text(data: st.DataObject) -> None:
    good = {"keep": {"fc1": [0, 1, 5], "fc2": [2]}}
    text = data.draw(st.text() | VALUES.map(json.dumps) | damaged(good).map(json.dumps))
    try_it("plan", lambda: SlimPlan.from_json(text))


@fuzzed
@given(data=st.data())
def test_a_record_of_any_text(data: st.DataObject) -> None:
    good = {"dense": {"top1_pct": 80.0}, "slim": {"top1_pct": 79.0, "images": 5}, "setup": {"machine": {"cpu": "x"}}}
    text = data.draw(st.text() | VALUES.map(json.dumps) | damaged(good).map(json.dumps))
    try_it("record", lambda: Record.from_json(text))


@fuzzed
@given(data=st.data())
def test_settings_of_an_image_processor_of_any_values(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp() / "settings"
    folder.mkdir(exist_ok=True)
    good = {"size": {"shortest_edge": 20}, "do_center_crop": True, "image_mean": [0.5], "image_std": [1], "resample": 2}
    good |= {"crop_size": {"height": 16, "width": 16}, "image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(data.draw(damaged(good))))
    model = torch.nn.Module()
    model.config = ViTConfig(image_size=16)
    model.config._name_or_path = str(folder)
    try_it("preprocessor_config.json", lambda: make_transform(model, train=False))


def test_the_undamaged_files_load(folders: dict[str, Path]) -> None:
    for which in ("timm", "transformers"):
        model, state = lfrns.load(folders[which]), load_file(folders[which] / "model.safetensors")
        assert sum(t.numel() for t in model.state_dict().values()) == sum(t.numel() for t in state.values())


def test_what_is_counted_as_an_end_can_fail() -> None:
    def long() -> None:
        raise ValueError("load(" + "x" * LONGEST)

    for call in (long, lambda: [][1], lambda: int("x")):
        with pytest.raises((AssertionError, IndexError)):
            try_it("none", call)
    with pytest.raises((MemoryError, RuntimeError)):
        try_it("none", lambda: torch.ones(GIBIBYTE))

    def hidden() -> None:
        with refusing("load()"):
            torch.ones(GIBIBYTE)

    with pytest.raises(AssertionError, match="allocat"):
        try_it("none", hidden)
