"""Ways in: kinds of model x libraries x (folder, Hub, its cache offline), with our package and without it."""

import ast
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import LFS_SUFFIXES, Hub, serve
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_checkpoint import cut_pair, edit_weights, slim_resnet, slim_timm_vit, slim_transformers
from timm.layers import set_fused_attn, use_fused_attn
from timm.models import save_for_hf
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
)
from ways_in import distance, logits, ways

from lfrns_hub import checkpoint
from lfrns_hub.checkpoint.remote_code import MODELING_FILE
from lfrns_hub.format.compat import vit_processor

TESTS = Path(__file__).parent
EQUAL = 1e-5
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
Saved = dict[str, tuple[Path, Path]]  # folder and answers of each kind


def slim_swin() -> nn.Module:
    """Make a transformers Swin with fewer neurons; its window's index table is a buffer that no file holds."""
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4,
                        num_labels=5)  # fmt: skip
    return narrower_mlps(SwinForImageClassification(config))


def slim_convnext() -> nn.Module:
    """Make a transformers ConvNeXt with fewer neurons."""
    config = ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[16, 24], image_size=32, num_labels=5)
    return narrower_mlps(ConvNextForImageClassification(config))


def narrower_mlps(model: nn.Module) -> nn.Module:
    """Cut two thirds of the neurons between every two linears of which the second undoes the first."""
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.2)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for first, second in itertools.pairwise(linears):
        if first.out_features == second.in_features == 4 * first.in_features == 4 * second.out_features:
            cut_pair(first, second, list(range(0, first.out_features, 3)))
    return model


KINDS = {
    "timm_resnet": (slim_resnet, 64),
    "timm_vit": (lambda: slim_timm_vit(img_size=64), 64),
    "timm_cifar": (lambda: slim_resnet("cifar_resnet20"), 32),
    "vit": (lambda: slim_transformers("vit"), 32),
    "deit": (lambda: slim_transformers("deit"), 32),
    "dinov2": (lambda: slim_transformers("dinov2"), 32),
    "swin": (slim_swin, 32),
    "convnext": (slim_convnext, 32),
}
ATTENTION_KINDS = ["vit", "deit", "dinov2", "swin"]
TIMM_KINDS = [kind for kind in KINDS if kind.startswith("timm")]


def library(kind: str) -> str:
    """Say which library builds a kind."""
    return "timm" if kind.startswith("timm") else "transformers"


def save_with_answers(kind: str, root: Path, seed: int = 0) -> tuple[Path, Path]:
    """Save a slim model, and beside its folder images and its logits of them."""
    torch.manual_seed(seed)
    build, size = KINDS[kind]
    model = build()
    processor = vit_processor()(size={"height": size, "width": size}) if library(kind) == "transformers" else None
    folder = checkpoint.save(model, root / kind, processor=processor)
    images = torch.randn(2, 3, size, size)
    save_file({"images": images, "logits": logits(model, images)}, root / f"{kind}.safetensors")
    return folder, root / f"{kind}.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A folder of every kind, and the answers."""
    root = tmp_path_factory.mktemp("ways")
    return {kind: save_with_answers(kind, root) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_into_a_folder_gives_the_same_logits(kind: str, saved: Saved) -> None:
    folder, answers = saved[kind]
    found = {n: distance(call(), load_file(answers)) for n, call in ways(str(folder), None, library(kind), True)}
    assert len(found) == (4 if library(kind) == "timm" else 3)
    assert max(found.values()) <= EQUAL, found


def run_ways(jobs: list[dict[str, Any]], path: Path, *, package: bool, **env: str) -> dict[str, float]:
    """Run ways_in.py in a fresh process."""
    path.write_text(json.dumps({"package": package, "jobs": jobs}))
    done = subprocess.run(
        [sys.executable, str(TESTS / "ways_in.py"), str(path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def job(source: Any, answers: Path, kind: str, revision: str | None = None) -> dict[str, Any]:
    """Describe one checkpoint for ways_in.py."""
    return {"source": str(source), "revision": revision, "answers": str(answers), "library": library(kind)}


def commit(hub: Hub, repo: str, folder: Path, branch: str) -> None:
    """Put a folder into a repository of the local Hub as a commit on a branch."""
    if hub.store.read(repo) is None:
        hub.store.create(repo, private=False)
    state = hub.store.read(repo)
    files = {path.name: hub.store.add_file(path.read_bytes(), path.suffix in LFS_SUFFIXES) for path in folder.iterdir()}
    state["refs"][branch] = hub.store.add_commit(state, files, branch)
    hub.store.write(repo, state)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Of every kind another model, for a branch of its repository."""
    root = tmp_path_factory.mktemp("others")
    return {kind: save_with_answers(kind, root, seed=1) for kind in KINDS}


@pytest.fixture(scope="module")
def filled_hub(saved: Saved, others: Saved, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that has every kind as tester/<kind>, and the other model of it on the branch "other"."""
    with serve(tmp_path_factory.mktemp("hub")) as hub:
        for kind in KINDS:
            commit(hub, f"tester/{kind}", saved[kind][0], "main")
            commit(hub, f"tester/{kind}", others[kind][0], "other")
        yield hub


@pytest.mark.hub
@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_and_then_its_cache_give_the_same_logits(
    kind: str, filled_hub: Hub, saved: Saved, others: Saved, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # All three libraries ask huggingface_hub, which reads these at every call.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = {}
    for source, endpoint in (("hub", filled_hub.endpoint), ("cache", "http://127.0.0.1:9")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", source == "cache")
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for revision, (_, answers) in ((None, saved[kind]), ("other", others[kind])):
            for name, call in ways(f"tester/{kind}", revision, library(kind), True):
                found[source, revision, name] = distance(call(), load_file(answers))
    assert len(found) == 4 * (4 if library(kind) == "timm" else 3)
    assert max(found.values()) <= EQUAL, found


@pytest.mark.hub
def test_the_hub_its_cache_and_folders_open_where_the_package_cannot_be_imported(
    filled_hub: Hub, saved: Saved, others: Saved, tmp_path: Path
) -> None:
    sources = ((None, saved), ("other", others))
    jobs = [job(f"tester/{kind}", made[kind][1], kind, revision) for kind in KINDS for revision, made in sources]
    folders = [job(folder, answers, kind) for kind, (folder, answers) in saved.items()]
    env = {**filled_hub.env, "HF_HOME": str(tmp_path / "home")}
    online = run_ways(jobs, tmp_path / "jobs.json", package=False, **env)
    offline = run_ways([*jobs, *folders], tmp_path / "jobs.json", package=False, **{**env, **OFFLINE})
    assert online.keys() < offline.keys() and (len(online), len(offline)) == (4 * len(KINDS), 6 * len(KINDS))
    assert max(*online.values(), *offline.values()) <= EQUAL, (online, offline)


STRICT = """
import sys
sys.modules["lfrns_hub"] = None
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    try:
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def test_loading_without_the_package_is_strict_and_bounded(tmp_path: Path) -> None:
    folders = []
    for kind in ("timm_resnet", "vit"):
        for damage in ("missing", "unexpected", "shape", "hostile"):
            folder, _ = save_with_answers(kind, tmp_path / damage)
            name = min(load_file(folder / "model.safetensors"))
            changes = {
                "missing": lambda t, name=name: t.pop(name),
                "unexpected": lambda t: t.update(stranger=torch.zeros(1)),
                "shape": lambda t, name=name: t.update({name: torch.zeros(1, 1)}),
            }
            if damage in changes:
                edit_weights(folder, changes[damage])
            else:
                config = json.loads((folder / "config.json").read_text())
                sizes = (config["model_args"] if kind == "timm_resnet" else config["lfrns"])["shapes"]
                name = next(iter(sizes))
                sizes[name] = [10**9 for _ in sizes[name]]
                (folder / "config.json").write_text(json.dumps(config))
            folders.append(str(folder))
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", STRICT, *folders], capture_output=True, text=True, timeout=600, env=env, cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr[-3000:]
    for line, folder in zip(lines, folders, strict=True):
        expected = {"missing": "is missing", "unexpected": "stranger is unexpected", "shape": "mismatch",
                    "hostile": "1000000000"}[Path(folder).parent.name]  # fmt: skip
        assert expected in line, (folder, line)


@pytest.mark.parametrize("kind", ["timm_resnet", "timm_cifar", "vit"])
def test_the_modeling_file_defines_each_name_once_and_imports_nothing_of_ours(kind: str, saved: Saved) -> None:
    tree = ast.parse((saved[kind][0] / MODELING_FILE).read_text())
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))
    assert "narrow" in names and ("cifar_resnet20" in names) == (kind == "timm_cifar")
    imported = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [line for line in imported if "lfrns_hub" in line]
    assert ("timm" in str(imported)) == kind.startswith("timm")


def test_a_folder_without_the_package_asks_for_trust_and_runs_nothing(saved: Saved, tmp_path: Path) -> None:
    code = STRICT.replace("trust_remote_code=True", "trust_remote_code=False")
    folders = [str(saved[kind][0]) for kind in ("timm_resnet", "vit")]
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=600, env=env, cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("trust_remote_code=True" in line for line in lines), done.stdout + done.stderr
    assert not list(tmp_path.rglob(MODELING_FILE))


def test_load_never_runs_the_code_of_a_folder(tmp_path: Path) -> None:
    folder, answers = save_with_answers("vit", tmp_path)
    (folder / MODELING_FILE).write_text("raise SystemExit('run')\n")
    assert distance(checkpoint.load(folder), load_file(answers)) <= EQUAL
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lfrns_nothing"}))
    with pytest.raises(ValueError, match=r"'lfrns_nothing' is none of transformers"):
        checkpoint.load(folder)


@pytest.mark.parametrize("kind", TIMM_KINDS)
def test_timm_gives_a_new_head_other_channels_features_and_an_exportable_model(kind: str, saved: Saved) -> None:
    folder, answers = saved[kind]
    images, expected = load_file(answers).values()
    name = f"local-dir:{folder}"
    assert logits(timm.create_model(name, pretrained=True, num_classes=3), images).shape == (2, 3)
    assert timm.create_model(name, pretrained=True, num_classes=0).eval()(images).ndim == 2
    grey = timm.create_model(name, pretrained=True, in_chans=1)
    assert logits(grey, images[:, :1]).shape == expected.shape
    exportable = timm.create_model(name, pretrained=True, exportable=True)
    torch.testing.assert_close(logits(exportable, images), expected, atol=EQUAL, rtol=0)
    if kind != "timm_cifar":  # those say nothing of their feature maps
        backbone = timm.create_model(name, pretrained=True, features_only=True).eval()
        channels = [feature.shape[1] for feature in backbone(images)]
        assert channels == backbone.feature_info.channels()


@pytest.mark.parametrize("kind", ["timm_resnet", "vit", "swin", "convnext"])
def test_auto_model_gives_the_model_without_its_head(kind: str, saved: Saved) -> None:
    folder, answers = saved[kind]
    whole = AutoModelForImageClassification.from_pretrained(folder).eval()
    base = AutoModel.from_pretrained(folder).eval()
    images = load_file(answers)["images"]
    with torch.no_grad():
        found = base(images).last_hidden_state
        if kind == "timm_resnet":
            expected = whole.timm_model.forward_features(images)
        else:
            expected = whole.base_model(images).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_fine_tunes_with_another_number_of_classes(kind: str, saved: Saved) -> None:
    folder, answers = saved[kind]
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    images = load_file(answers)["images"]
    model.train()(pixel_values=images, labels=torch.tensor([0, 2])).loss.backward()
    # DINOv2's mask token is for its pretraining: no classifier reads it, the stock one neither.
    trained = {name: p for name, p in model.named_parameters() if not name.endswith("mask_token")}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_and_sdpa_attention_of_transformers(attention: str, kind: str, saved: Saved) -> None:
    folder, answers = saved[kind]
    if attention == "sdpa" and not type(checkpoint.load(folder))._supports_sdpa:
        pytest.skip("this release of transformers has no such attention for it")
    model = AutoModelForImageClassification.from_pretrained(folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert distance(model, load_file(answers)) <= EQUAL


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "sdpa"])
def test_eager_and_sdpa_attention_of_timm(fused: bool, saved: Saved) -> None:
    folder, answers = saved["timm_vit"]
    before = use_fused_attn()
    try:
        set_fused_attn(fused)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    finally:
        set_fused_attn(before)
    assert {block.attn.fused_attn for block in model.blocks} == {fused}
    assert distance(model, load_file(answers)) <= EQUAL


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_asked_for_at_loading_or_kept_from_saving(kind: str, saved: Saved, tmp_path: Path) -> None:
    folder, answers = saved[kind]
    images, expected = load_file(answers).values()
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    checkpoint.save(checkpoint.load(folder).bfloat16(), tmp_path / "half")
    for model in (half, checkpoint.load(tmp_path / "half")):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        found = logits(model, images.bfloat16()).float()
        assert (found - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("kind", ["timm_vit", "timm_cifar"])
def test_what_timms_saver_writes_is_for_timm_and_us_as_of_any_timm_model(
    kind: str, saved: Saved, tmp_path: Path
) -> None:
    # It writes num_classes into model_args, which transformers' wrapper then passes twice: see docs/quickstart.md.
    for name, model in (
        ("stock", timm.create_model("test_vit", num_classes=5)),
        ("slim", checkpoint.load(saved[kind][0])),
    ):
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        with pytest.raises(TypeError, match="num_classes"):
            AutoModelForImageClassification.from_pretrained(tmp_path / name)
    again = checkpoint.save(checkpoint.load(tmp_path / "slim"), tmp_path / "again")
    model = AutoModelForImageClassification.from_pretrained(again)
    assert distance(model, load_file(saved[kind][1])) <= EQUAL


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_again_loads_again(kind: str, saved: Saved, tmp_path: Path):
    folder, answers = saved[kind]
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING_FILE).read_text() == (folder / MODELING_FILE).read_text()
    calls = ways(str(tmp_path / "again"), None, library(kind), True)
    found = {name: distance(call(), load_file(answers)) for name, call in calls}
    assert max(found.values()) <= EQUAL, found


@pytest.mark.parametrize("kind", TIMM_KINDS)
@pytest.mark.parametrize("loader", ["timm", "lfrns"])
def test_what_timm_saves_again_loads_again(kind: str, loader: str, saved: Saved, tmp_path: Path) -> None:
    folder, answers = saved[kind]
    first = timm.create_model(f"local-dir:{folder}", pretrained=True) if loader == "timm" else checkpoint.load(folder)
    save_for_hf(first, str(tmp_path), safe_serialization=True)
    again = [timm.create_model(f"local-dir:{tmp_path}", pretrained=True), checkpoint.load(tmp_path)]
    assert [distance(model, load_file(answers)) <= EQUAL for model in again] == [True, True]
    if loader == "lfrns" and kind != "timm_vit":
        assert again[0].lfrns_provenance == again[1].lfrns_provenance == first.lfrns_provenance != {}


class Pictures(torch.utils.data.Dataset):
    """Four noise pictures as the Trainer wants them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": torch.randn(3, 32, 32), "labels": index % 3}


@pytest.mark.parametrize("kind", ["vit", "timm_cifar"])
def test_a_checkpoint_of_the_trainer_loads_again(
    kind: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # else the Trainer leaves a model that answers in bfloat16
    model = AutoModelForImageClassification.from_pretrained(saved[kind][0])
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True,
                             per_device_train_batch_size=2, disable_tqdm=True)  # fmt: skip
    Trainer(model, args, train_dataset=Pictures()).train()
    images = torch.randn(2, 3, 32, 32)
    expected = logits(model, images)
    folder = tmp_path / "checkpoint-1"
    for again in (AutoModelForImageClassification.from_pretrained(folder), checkpoint.load(folder)):
        torch.testing.assert_close(logits(again, images), expected, atol=EQUAL, rtol=0)
    assert (folder / MODELING_FILE).is_file()
    Trainer(again if kind == "vit" else model, args, train_dataset=Pictures()).train(resume_from_checkpoint=str(folder))
