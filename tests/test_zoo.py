"""Models by name: what fits loads, what does not says so with the value, nothing needs a network."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_checkpoint import VITS, slim_resnet, slim_transformers
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from lfrns_hub import checkpoint, zoo
from lfrns_hub.zoo import create_base, create_dense, create_skeleton, read_weights

SHARED = Path(__file__).parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub at a port that nobody listens on, and an empty cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    config = ViTConfig(image_size=16, patch_size=8, num_labels=4, **SMALL)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("form", ["plain", "state_dict", "ema", "model", "module"])
def test_weights_load_in_every_form_and_bring_their_classes(form: str, tmp_path: Path) -> None:
    base = timm.create_model("cifar_resnet20", num_classes=7)
    state = base.state_dict()
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    forms = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "ema": {"state_dict": other, "state_dict_ema": state},
        "model": {"model": state},
        "module": {f"module.{k}": v for k, v in state.items()},
    }
    torch.save(forms[form], tmp_path / "w.pth")
    model = create_dense("cifar_resnet20", weights=tmp_path / "w.pth")
    assert same_weights(model, base)
    assert zoo.num_classes_of(model) == 7
    assert not model.training


def test_safetensors_load_and_a_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    base = timm.create_model("cifar_resnet20")
    save_file(base.state_dict(), tmp_path / "w.safetensors")
    assert same_weights(create_dense("cifar_resnet20", weights=tmp_path / "w.safetensors"), base)
    model = create_dense("cifar_resnet20", num_classes=3, weights=tmp_path / "w.safetensors")
    assert model.linear.out_features == 3
    assert torch.equal(model.conv1.weight, base.conv1.weight)


class Notes(dict):
    """As Lightning keeps a run's options: a dict of a class that may not be here any more."""


@pytest.mark.parametrize("form", ["timm", "lightning", "parallel", "legacy", "index", "folder"])
def test_what_training_programs_write_opens(form: str, tmp_path: Path) -> None:
    base = timm.create_model("cifar_resnet20", num_classes=7)
    state, path = base.state_dict(), tmp_path / "last.ckpt"
    noted = argparse.Namespace(model="cifar_resnet20", output=tmp_path, lr=np.float64(0.1), seen={1, 2}, sizes=[32])
    if form == "timm":
        torch.save({"epoch": 3, "arch": "cifar_resnet20", "state_dict": state, "args": noted, "version": 2}, path)
    elif form == "lightning":
        prefixed = {f"model.{key}": value for key, value in state.items()}
        torch.save({"state_dict": prefixed, "hyper_parameters": Notes(lr=0.1), "callbacks": {}, "loops": noted}, path)
    elif form == "parallel":
        torch.save({"model": {f"module.model.{key}": value for key, value in state.items()}}, path)
    elif form == "legacy":
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    else:
        names = list(state)
        shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        for name, part in shards.items():
            save_file({key: state[key] for key in part}, tmp_path / name)
        index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps(index))
        path = path if form == "index" else tmp_path
    assert same_weights(create_dense("cifar_resnet20", weights=path), base)


def test_a_network_whose_own_names_begin_with_model_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrapped_net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
        "    def forward(self, x):\n        return self.model(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    state = {"model.1.weight": torch.ones(3, 12), "model.1.bias": torch.ones(3)}
    torch.save({"model": state, "model_ema": Notes(decay=0.9)}, tmp_path / "w.pth")
    assert float(create_dense("wrapped_net:Net", weights=tmp_path / "w.pth").model[1].weight.sum()) == 36


class Bomb:
    def __reduce__(self):
        return bytearray, (1 << 40,)


class BombOfTorch:
    def __reduce__(self):
        return torch.UntypedStorage, (1 << 40,)


@pytest.mark.parametrize("bomb", [Bomb, BombOfTorch])
@pytest.mark.parametrize("as_zip", [True, False])
def test_what_allocates_by_a_number_is_not_called(bomb: type, as_zip: bool, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2), "y": bomb()}, tmp_path / "bomb.pth", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match=r"it would call (bytearray|UntypedStorage)"):
        read_weights(tmp_path / "bomb.pth")


def test_names_in_weights_are_one_line_without_codes(tmp_path: Path) -> None:
    save_file({"w\x1b[2J\nValueError: fake": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="1 unexpected") as refused:
        create_dense("cifar_resnet20", weights=tmp_path / "w.safetensors")
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_a_whole_model_and_an_index_of_elsewhere_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole\.pth.*no (state_dict|plain tensors).*Save model\.state_dict"):
        read_weights(tmp_path / "whole.pth")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match=r"the index names.*elsewhere.*no file next to it"):
        read_weights(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"sub.*no model\.safetensors and no index"):
        read_weights(tmp_path / "sub")


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.pth.*no such file"):
        read_weights(tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.pth.*no plain tensors"):
        read_weights(tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"none\.pth.*no state_dict"):
        read_weights(tmp_path / "none.pth")


class Loud:
    """Pickled code, which reading weights must not run."""

    def __reduce__(self) -> tuple:
        return (print, ("this ran",))


def test_pickled_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"state_dict": Loud()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth.*no plain tensors"):
        read_weights(tmp_path / "bad.pth")
    assert "this ran" not in capsys.readouterr().out


def test_unknown_names_come_with_near_matches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'cifar_resnet21'.*cifar_resnet20"):
        create_dense("cifar_resnet21")
    with pytest.raises(ValueError, match=r"'resnet50\.a1_in2k'.*resnet50\.a1_in1k"):
        create_dense("resnet50.a1_in2k")
    with pytest.raises(ValueError, match=r"no config\.json"):
        create_dense(str(tmp_path))
    with pytest.raises(ValueError, match=r"'no_such_module:build'.*cannot import"):
        create_dense("no_such_module:build")
    with pytest.raises(ValueError, match=r"pretrained=True.*no weights"):
        create_dense("cifar_resnet20", pretrained=True)


@pytest.mark.parametrize("name", ["nobody/nothing-vit", "hf-hub:nobody/nothing", "test_vit"])
def test_without_a_network_one_message_names_two_options(name: str, no_network: None) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"could not reach http://127\.0\.0\.1:9.*--model.*--data-dir") as caught:
        create_dense(name)
    assert name.removeprefix("hf-hub:") in str(caught.value)
    assert time.monotonic() - start < 10


def test_transformers_folder_loads_with_its_own_or_another_head(vit_folder: Path) -> None:
    saved = ViTForImageClassification.from_pretrained(vit_folder)
    model = create_dense(str(vit_folder))
    assert same_weights(model, saved.eval())
    other = create_dense(str(vit_folder), num_classes=6)
    assert zoo.num_classes_of(other) == other.classifier.out_features == 6
    assert torch.equal(other.vit.embeddings.cls_token, saved.vit.embeddings.cls_token)
    weights = create_dense(str(vit_folder), weights=vit_folder / "model.safetensors")
    assert same_weights(weights, saved)


def test_a_backbone_has_no_classes_until_it_is_given_some(tmp_path: Path) -> None:
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)).save_pretrained(tmp_path / "backbone")
    assert zoo.num_classes_of(create_dense(str(tmp_path / "backbone"))) == 0
    assert zoo.num_classes_of(create_dense(str(tmp_path / "backbone"), num_classes=5)) == 5


def test_transformers_weights_with_a_hole_are_refused(vit_folder: Path) -> None:
    state = read_weights(vit_folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "cls_token" not in k}, vit_folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"vit.*cls_token"):
        create_dense(str(vit_folder))


def test_timm_folder_loads(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    base = timm.create_model("cifar_resnet20", num_classes=4)
    save_for_hf(base, tmp_path / "net")
    assert json.loads((tmp_path / "net" / "config.json").read_text())["architecture"] == "cifar_resnet20"
    assert same_weights(create_dense(f"local-dir:{tmp_path / 'net'}"), base)
    assert same_weights(create_dense(str(tmp_path / "net")), base)


def test_a_function_of_the_user_builds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef build(num_classes=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
        "def fixed():\n    return build()\ndef wrong():\n    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = create_dense("my_nets:build", num_classes=6)
    assert model[1].out_features == 6
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert same_weights(create_dense("my_nets:build", weights=tmp_path / "w.safetensors"), model)
    with pytest.raises(ValueError, match=r"num_classes=6.*3 classes"):
        create_dense("my_nets:fixed", num_classes=6)
    with pytest.raises(ValueError, match=r"my_nets:wrong.*int"):
        create_dense("my_nets:wrong")
    sys.modules.pop("my_nets")


@pytest.mark.parametrize(
    "name", ["resnet18", "hf-hub:timm/resnet18.a1_in1k", "google/vit-base-patch16-224-in21k", "vit"]
)
def test_skeletons_need_no_network_and_no_memory(name: str, no_network: None) -> None:
    model = create_skeleton(name, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert zoo.example_input(model).shape == (1, 3, 224, 224)


def test_a_skeleton_of_a_folder_has_its_shapes(vit_folder: Path) -> None:
    model = create_skeleton(str(vit_folder))
    assert model.classifier.out_features == 4
    assert zoo.example_input(model, batch=2).shape == (2, 3, 16, 16)


@needs_shared
def test_the_given_weights_reach_their_accuracy() -> None:
    model = create_dense("cifar_resnet20", weights=SHARED / "weights" / "resnet20_cifar10.safetensors")
    transform = zoo.make_transform(model, train=False)
    data = zoo.load_data(SHARED / "data" / "cifar10", "validation", transform=transform, limit=200)
    # 87.2 % on all 5,000; three standard errors of 200 images are 7 points.
    assert zoo.guard_against_chance(model, DataLoader(data, 100), "cifar10") == pytest.approx(87.2, abs=7)


@pytest.mark.parametrize("channels", [3, 12])
def test_channels_are_the_images_even_where_the_first_layer_sees_blocks_of_pixels(channels: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("tresnet_m", in_chans=channels)
    assert zoo.input_size_of(model) == (channels, 224, 224)


@needs_shared
def test_the_given_vit_loads_as_it_lies_there(tmp_path: Path) -> None:
    shutil.copytree(SHARED / "weights" / "vit_cifar10", tmp_path / "vit")
    model = create_dense(str(tmp_path / "vit"))
    assert zoo.num_classes_of(model) == 10
    assert zoo.input_size_of(model) == (3, 32, 32)


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_the_dense_network_of_a_checkpoint_is_built_from_its_folder(tmp_path: Path) -> None:
    checkpoint.save(slim_resnet(), tmp_path / "timm")
    dense = create_base(tmp_path / "timm", device="meta")
    assert shapes_of(dense) == shapes_of(timm.create_model("test_resnet", num_classes=7))
    checkpoint.save(slim_transformers("vit"), tmp_path / "transformers")
    assert shapes_of(create_base(tmp_path / "transformers")) == shapes_of(VITS["vit"]())


def test_a_checkpoint_keeps_the_preprocessing_that_was_asked_for(tmp_path: Path) -> None:
    model = slim_resnet()
    zoo.set_preprocessing(model, mean=(0.1, 0.2, 0.3), crop_pct=0.5)
    checkpoint.save(model, tmp_path / "timm")
    again = checkpoint.load(tmp_path / "timm").pretrained_cfg
    assert [list(again["mean"]), again["crop_pct"]] == [[0.1, 0.2, 0.3], 0.5]


def test_a_folder_that_does_not_say_its_dense_network_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere'.*no config\.json"):
        create_base("nowhere")
    checkpoint.save(torch.nn.Linear(3, 2), tmp_path / "own")
    with pytest.raises(ValueError, match=r"own'.*--dense"):
        create_base(tmp_path / "own")
