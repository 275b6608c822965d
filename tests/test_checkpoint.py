"""Checkpoints: what is saved loads again, equal, by every door; what does not fit is refused, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lfrns_hub import checkpoint
from lfrns_hub.format.narrow import describe, narrow
from lfrns_hub.self_check import find_units
from lfrns_hub.surgery import cut
from lfrns_hub.trace import trace_model
from lfrns_hub.units import SlimPlan

TINY = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VITS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**TINY, intermediate_size=48, num_labels=5)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**TINY, intermediate_size=48, num_labels=5)),
    "deit_teacher": lambda: DeiTForImageClassificationWithTeacher(
        DeiTConfig(**TINY, intermediate_size=48, num_labels=5)
    ),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**TINY, mlp_ratio=2, num_labels=5)),
}


def select(module: nn.Module, name: str, keep: list[int], axis: int) -> None:
    """Keep some indices of one parameter or buffer."""
    old = getattr(module, name)
    if old is None:
        return
    new = old.detach().index_select(axis, torch.tensor(keep)).clone()
    setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def cut_pair(first: nn.Module, second: nn.Module, keep: list[int]) -> None:
    """Cut the outputs of one linear or convolution and the inputs of the next."""
    for name in ("weight", "bias"):
        select(first, name, keep, 0)
    select(second, "weight", keep, 1)
    if isinstance(first, nn.Linear):
        first.out_features = second.in_features = len(keep)
    else:
        first.out_channels = second.in_channels = len(keep)


def cut_norm(norm: nn.Module, keep: list[int]) -> None:
    """Cut a BatchNorm."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        select(norm, name, keep, 0)
    norm.num_features = len(keep)


def slim_timm_vit(name: str = "test_vit", **kwargs) -> nn.Module:
    """Make a timm ViT with fewer heads in its first block and fewer neurons in its second."""
    model = timm.create_model(name, num_classes=7, **kwargs)
    attention, mlp = model.blocks[0].attn, model.blocks[1].mlp
    kept = range(attention.head_dim, attention.num_heads * attention.head_dim)  # all heads but the first
    width = attention.num_heads * attention.head_dim
    select(attention.qkv, "weight", [part * width + i for part in range(3) for i in kept], 0)
    select(attention.qkv, "bias", [part * width + i for part in range(3) for i in kept], 0)
    select(attention.proj, "weight", list(kept), 1)
    attention.num_heads -= 1
    attention.attn_dim = len(kept)
    attention.qkv.out_features, attention.proj.in_features = 3 * len(kept), len(kept)
    cut_pair(mlp.fc1, mlp.fc2, list(range(0, mlp.fc1.out_features, 3)))
    return model


def slim_resnet(name: str = "test_resnet", **kwargs) -> nn.Module:
    """Make a timm ResNet with a narrower first convolution in each block, and norms that are not at their start."""
    model = timm.create_model(name, num_classes=7, **kwargs)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    for block in [module for module in model.modules() if hasattr(module, "conv2") and hasattr(module, "bn1")]:
        keep = list(range(0, block.conv1.out_channels, 2))
        cut_pair(block.conv1, block.conv2, keep)
        cut_norm(block.bn1, keep)
    model.lfrns_provenance = {"widths": {"layer1.0.conv1": [3, 6]}, "kinds": {"layer1.0.conv1": "channel"}, "seed": 3}
    return model


def slim_transformers(kind: str) -> nn.Module:
    """Make a transformers ViT with fewer heads in its first layer and fewer neurons in its second."""
    model = VITS[kind]()
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.2)
    groups = [group for group in trace_model(model, torch.randn(1, 3, 32, 32)).groups if not group.frozen_reason]
    heads = next(group for group in groups if group.kind == "head")
    neurons = [group for group in groups if group.kind == "neuron"][1]
    plan = SlimPlan({heads.name: list(range(1, heads.size)), neurons.name: list(range(0, neurons.size, 3))})
    return cut(model.eval(), [heads, neurons], plan)


def answer(model: nn.Module, size: int, channels: int = 3) -> torch.Tensor:
    """Run fixed images through a model in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model.eval()(torch.randn(2, channels, size, size))
    return output if isinstance(output, torch.Tensor) else output.logits


TIMM_MODELS = {
    "resnet": (slim_resnet, 160),
    "vit": (slim_timm_vit, 160),
    "resnet18": (lambda: slim_resnet("resnet18"), 64),
    "cifar_resnet20": (lambda: slim_resnet("cifar_resnet20"), 32),
}


@pytest.mark.parametrize("kind", TIMM_MODELS)
def test_a_timm_model_comes_back_equal_by_every_door(kind, tmp_path):
    build, size = TIMM_MODELS[kind]
    model = build()
    folder = checkpoint.save(model, tmp_path / "slim")
    expected = answer(model, size)
    assert torch.equal(answer(checkpoint.load(folder), size), expected)
    assert torch.equal(answer(timm.create_model(f"local-dir:{folder}", pretrained=True), size), expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "lfrns_slim"
    assert "num_classes" not in config["model_args"]
    assert config["model_args"]["shapes"]
    assert all(
        list(model.get_parameter(n).shape) == s for n, s in config["model_args"]["shapes"].items() if "run" not in n
    )


@pytest.mark.parametrize("kind", VITS)
def test_a_transformers_vit_comes_back_equal_by_every_door(kind, tmp_path):
    model = slim_transformers(kind)
    folder = checkpoint.save(model, tmp_path / "slim", label_names=list("abcde"))
    expected = answer(model, 32)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(answer(loaded, 32), expected)
    assert torch.equal(answer(checkpoint.load(folder), 32), expected)
    assert torch.equal(answer(checkpoint.load(folder, model=VITS[kind]()), 32), expected)
    assert isinstance(loaded, type(model))
    assert loaded.config.model_type.startswith("lfrns_")
    assert loaded.config.id2label[4] == "e"


def test_what_was_loaded_can_be_saved_again(tmp_path):
    for kind, model in {"timm": slim_resnet(), "vit": slim_transformers("vit")}.items():
        first = checkpoint.load(checkpoint.save(model, tmp_path / f"{kind}1"))
        second = checkpoint.load(checkpoint.save(first, tmp_path / f"{kind}2"))
        size = 32 if kind == "vit" else 160
        assert torch.equal(answer(second, size), answer(model, size))


def test_a_buffer_that_no_file_holds_comes_back_narrower(tmp_path):
    model = timm.create_model("resnetblur18", num_classes=7).eval()
    groups = find_units(model, torch.zeros(1, 3, 64, 64))
    free = [group for group in groups if group.exact and not group.frozen_reason]
    slim = cut(model, groups, SlimPlan({g.name: list(range(g.size // 3, g.size)) for g in free}))
    assert len(slim.layer2[0].aa.filt) < len(model.layer2[0].aa.filt)
    loaded = checkpoint.load(checkpoint.save(slim, tmp_path / "slim"))
    assert torch.equal(loaded.layer2[0].aa.filt, slim.layer2[0].aa.filt)
    assert torch.equal(answer(loaded, 64), answer(slim, 64))


@pytest.mark.usefixtures("drawn")
def test_provenance_comes_back(tmp_path):
    model = slim_resnet()
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "slim"))
    assert loaded.lfrns_provenance == model.lfrns_provenance
    assert (tmp_path / "slim" / "widths.png").stat().st_size > 5_000


def test_timm_gives_a_new_head_new_input_channels_and_features(tmp_path):
    folder = checkpoint.save(slim_resnet(), tmp_path / "slim")
    assert answer(timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3), 64).shape == (2, 3)
    assert answer(timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1), 64, 1).shape == (2, 7)
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)(torch.randn(1, 3, 64, 64))
    assert len(maps) == 5


def test_timm_resizes_the_position_table(tmp_path):
    folder = checkpoint.save(slim_timm_vit(), tmp_path / "slim")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96)
    assert answer(model, 96).shape == (2, 7)
    assert torch.equal(model.head.weight, checkpoint.load(folder).head.weight)


def test_transformers_loads_timm_folders_too(tmp_path):
    model = slim_resnet()
    folder = checkpoint.save(model, tmp_path / "slim", label_names=list("abcdefg"))
    wrapped = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(answer(wrapped, 160), answer(model, 160))
    assert wrapped.config.id2label[2] == "c"


class Operations(TorchDispatchMode):
    """Notes which operations ran, on tensors without values too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_loading_a_timm_model_draws_no_weights(tmp_path):
    drawing = {"uniform_", "erfinv_", "clamp_", "normal_"}
    folder = checkpoint.save(slim_timm_vit(), tmp_path / "slim")
    with Operations() as loading:
        checkpoint.load(folder)
    with Operations() as building, torch.device("meta"):
        timm.create_model("test_vit")
    assert "empty" in loading.names and not loading.names & drawing
    assert building.names & drawing


def test_arguments_of_the_base_are_kept(tmp_path):
    model = slim_timm_vit(img_size=64, in_chans=1)
    folder = checkpoint.save(model, tmp_path / "slim")
    assert torch.equal(answer(checkpoint.load(folder), 64, 1), answer(model, 64, 1))


def test_half_precision_comes_back_as_such(tmp_path):
    loaded = checkpoint.load(checkpoint.save(slim_resnet().bfloat16(), tmp_path / "slim"))
    assert next(loaded.parameters()).dtype == torch.bfloat16


class MyNet(nn.Module):
    """A class that neither timm nor transformers knows."""

    def __init__(self, hidden: int = 8):
        super().__init__()
        self.hidden = hidden
        self.first, self.second = nn.Conv2d(3, hidden, 3), nn.Conv2d(hidden, 4, 1)
        self.register_buffer("scale", torch.full((hidden, 1, 1), 2.0), persistent=False)

    def forward(self, images):
        return self.second(self.first(images)).mean((2, 3))


@pytest.mark.parametrize("base", [None, "instance", "function"])
def test_ones_own_class_is_narrowed_by_what_was_saved(base, tmp_path):
    model = MyNet()
    cut_pair(model.first, model.second, [1, 5, 6])
    model.hidden = 3
    base = {"instance": MyNet(), "function": MyNet}.get(base)
    folder = checkpoint.save(model, tmp_path / "slim", base=base)
    loaded = checkpoint.load(folder, model=MyNet())
    assert torch.equal(answer(loaded, 8), answer(model, 8))
    assert loaded.hidden == loaded.first.out_channels == loaded.second.in_channels == 3
    with pytest.raises(ValueError, match=r"holds a MyNet.*model=MyNet\(\)"):
        checkpoint.load(folder)


def test_a_folder_that_is_not_empty_is_left_alone_unless_asked(tmp_path):
    folder = tmp_path / "slim"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"slim.*not empty"):
        checkpoint.save(slim_resnet(), folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    checkpoint.save(slim_resnet(), folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    checkpoint.load(folder)


def test_nothing_is_written_of_a_model_that_would_not_load(tmp_path):
    model = slim_resnet()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra.*base"):
        checkpoint.save(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_outside_the_file_that_would_be_lost_is_noticed(tmp_path):
    model = MyNet()
    model.scale.fill_(3.0)
    with pytest.raises(ValueError, match="scale does not come back"):
        checkpoint.save(model, tmp_path / "slim", base=MyNet)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    return {
        "timm": checkpoint.save(slim_resnet(), root / "timm"),
        "vit": checkpoint.save(slim_transformers("vit"), root / "vit"),
    }


def edit_weights(folder: Path, change) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["timm", "vit"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_loading_is_strict(kind, damage, saved, tmp_path):
    folder = Path(shutil.copytree(saved[kind], tmp_path / "slim"))
    name = min(load_file(folder / "model.safetensors"))
    changes = {
        "missing": lambda t: t.pop(name),
        "unexpected": lambda t: t.update(stranger=torch.zeros(1)),
        "shape": lambda t: t.update({name: torch.zeros(1, 1)}),
    }
    edit_weights(folder, changes[damage])
    expected = {"missing": f"{name} is missing", "unexpected": "stranger is unexpected", "shape": f"{name} has shape"}
    with pytest.raises(ValueError, match=expected[damage]):
        checkpoint.load(folder)


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_sizes_beyond_the_base_are_refused(kind, saved, tmp_path):
    folder = Path(shutil.copytree(saved[kind], tmp_path / "slim"))
    config = json.loads((folder / "config.json").read_text())
    sizes = config["model_args"] if kind == "timm" else config["lfrns"]
    name = next(iter(sizes["shapes"]))
    sizes["shapes"][name] = [10**9 for _ in sizes["shapes"][name]]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"1000000000.*must lie from 1 to the base's own"):
        checkpoint.load(folder)


def test_pickled_weights_are_not_read(saved, tmp_path):
    folder = Path(shutil.copytree(saved["timm"], tmp_path / "slim"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        checkpoint.load(folder)


def test_folders_of_others_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        checkpoint.load(tmp_path)
    folder = Path(shutil.copytree(saved["timm"], tmp_path / "slim"))
    config = json.loads((folder / "config.json").read_text())
    config["slim"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 99"):
        checkpoint.load(folder)


def test_label_names_must_be_as_many_as_classes(tmp_path):
    with pytest.raises(ValueError, match=r"label_names of 2.*7 classes"):
        checkpoint.save(slim_resnet(), tmp_path / "slim", label_names=["a", "b"])


def test_a_config_without_sizes_builds_the_dense_model_with_values():
    config = AutoConfig.for_model("lfrns_vit", **TINY)
    model = AutoModelForImageClassification.from_config(config)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_narrow_changes_nothing_when_one_size_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"1\.weight.*\[5, 4\]"):
        narrow(model, {"0.weight": [2, 4], "1.weight": [5, 4]}, {})
    with pytest.raises(ValueError, match=r"0\.out_features = 9"):
        narrow(model, {"0.weight": [2, 4]}, {"0": {"out_features": 9}})
    with pytest.raises(ValueError, match=r"0\.colour = 1"):
        narrow(model, {}, {"0": {"colour": 1}})
    assert model[0].weight.shape == (4, 4)


def test_describe_and_narrow_undo_each_other():
    model, base = slim_timm_vit(), timm.create_model("test_vit", num_classes=7)
    shapes, attrs = describe(model, base)
    assert attrs["blocks.0.attn"]["num_heads"] == model.blocks[0].attn.num_heads
    assert describe(narrow(base, shapes, attrs), model) == ({}, {})


class Scaled(nn.Module):
    """A network with a buffer that no file holds, of another value for each unit."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3)
        self.register_buffer("scale", torch.linspace(0.5, 2, 16)[None, :, None, None], persistent=False)

    def forward(self, x):
        return self.second((self.first(x) * self.scale).relu()).mean((2, 3))


@pytest.mark.parametrize("base", [None, Scaled])
def test_what_a_cut_left_of_a_computed_buffer_is_stored(base, tmp_path):
    model, images = Scaled().eval(), torch.randn(2, 3, 12, 12)
    groups = find_units(model, images)
    slim = cut(model, groups, SlimPlan({"first": [1, 4, 9, 15]}))
    loaded = checkpoint.load(checkpoint.save(slim, tmp_path / "slim", base=base), model=Scaled())
    assert torch.equal(loaded.scale, model.scale[:, [1, 4, 9, 15]])
    assert torch.equal(loaded(images), slim(images))
    assert "scale" in slim.state_dict() and "scale" not in model.state_dict()


class Caching(nn.Module):
    """A network whose forward keeps a grid of the last images' size, which no file holds."""

    def __init__(self, size=9):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3)
        self.register_buffer("grid", torch.zeros(size, size), persistent=False)

    def forward(self, x):
        self.grid = torch.linspace(0, 1, x.shape[-1] ** 2).view(x.shape[-1], x.shape[-1])
        return self.second((self.first(x + self.grid)).relu()).mean((2, 3))


@pytest.mark.parametrize("size", [6, 12])
@pytest.mark.parametrize("base", [None, Caching])
def test_a_buffer_that_the_forward_made_of_the_last_images_is_no_width(base, size, tmp_path):
    model, images = Caching().eval(), torch.randn(2, 3, size, size)
    groups = find_units(model, torch.zeros(1, 3, 9, 9))
    slim = cut(model, groups, SlimPlan({"first": [1, 4, 9, 15]}))
    expected = slim(images)
    loaded = checkpoint.load(checkpoint.save(slim, tmp_path / "slim", base=base), model=Caching())
    assert torch.equal(loaded(images), expected)


FORKED = """
import os, signal, sys, timm, torch
import lfrns_hub as lfrns
torch.set_num_threads(2)
torch.zeros(1 << 20).clone()  # now OpenMP has threads, which a fork does not copy
if os.fork() == 0:
    signal.alarm(60)
    lfrns.load(lfrns.save(timm.create_model("cifar_resnet20", num_classes=3), sys.argv[1]))
    os._exit(0 if torch.get_num_threads() == 2 else 3)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_saves_and_loads_though_torch_had_threads(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORKED, tmp_path / "slim"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
