"""What a slim model is for other code: what forwards leave on it, other methods, transformers' doors, quantisers."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import byobnet, fastvit, ghostnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import AutoModel, AutoModelForImageClassification

import lfrns_hub as lfrns
from lfrns_hub.format.narrow import model_copy
from lfrns_hub.surgery import cut, masked
from lfrns_hub.trace.forward import watch_forward
from lfrns_hub.units import SlimPlan, UnitGroup

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
       "image_size": 16, "patch_size": 8, "num_labels": 10}  # fmt: skip


class Net(nn.Module):
    """Two convolutions with a gain for each channel between them; subclasses keep something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 10)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.kept = {}

    def of(self, x: Tensor) -> Tensor:
        """Return the gain."""
        return self.gain.exp()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(F.relu(self.b(x * self.of(x).view(1, -1, 1, 1))).mean((2, 3)))


class ByDevice(Net):
    def of(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.gain.exp()
        return self.kept[str(x.device)]


class Late(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = None

    def of(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.gain.exp()
        return self.kept


class NotThere(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.kept

    def of(self, x: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = self.gain.exp()
        return self.kept


class ForASize(Net):
    """As detectors do: the shape of the last images says whether what was kept still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.shape = torch.empty(0), None

    def of(self, x: Tensor) -> Tensor:
        if self.shape != x.shape[2:]:
            self.kept, self.shape = self.gain.exp(), x.shape[2:]
        return self.kept


class Map(Net):
    def of(self, x: Tensor) -> Tensor:
        self.kept = [x * 1]
        return self.gain


class Constant(Net):
    """What forward only reads is no cache, a dict of tensors or not."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"by": torch.tensor(2.0)}

    def of(self, x: Tensor) -> Tensor:
        return self.gain * float(self.kept["by"])


class Memory(Net):
    """Remembers its first images for ever: emptied, it would answer something else."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = None

    def of(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = x.mean((0, 2, 3))
        return self.gain * self.kept


def halved(groups: list[UnitGroup]) -> SlimPlan:
    """Keep half of each free group, none of them the first."""
    free = [g for g in groups if g.exact and not g.frozen_reason]
    return SlimPlan({g.name: list(range(g.size - max(1, g.size // 2), g.size)) for g in free})


def error_of(model: nn.Module, images: Tensor) -> float:
    """Halve what find_units calls free: the error of the narrow copy over the largest output of the masked model."""
    groups = lfrns.find_units(model, images[:1])
    plan = halved(groups)
    assert plan.keep
    with torch.no_grad():
        got = cut(model, groups, plan)(images)
        with masked(model, groups, plan):
            want = model(images)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("warm", ["new", "used", "used with gradients"])
@pytest.mark.parametrize("net", [ByDevice, Late, NotThere, ForASize, Map])
def test_a_narrow_copy_computes_anew_what_a_forward_left(net, warm):
    model = net().eval()
    if warm != "new":
        with torch.set_grad_enabled(warm == "used with gradients"):
            model(IMAGES)
    groups = lfrns.find_units(model, IMAGES[:1])
    assert {g.name for g in groups if not g.frozen_reason} == {"a", "b"}
    assert "kept" in {cache.attribute for cache in groups[0].caches}
    assert hasattr(model, "kept") == (warm != "new" or net is not NotThere)  # the caller's stays as it is
    assert error_of(model, IMAGES) < 1e-5


@pytest.mark.parametrize("net", [Constant, Memory])
def test_what_a_forward_would_not_fill_again_is_kept(net):
    model = net().eval()
    with torch.no_grad():
        model(IMAGES)
    assert watch_forward(model, IMAGES[:1]).caches == ()


def test_the_self_check_calls_no_stale_bias_of_attention_a_fault_of_the_heads():
    small = {"embed_dim": (16, 24, 32), "num_heads": (2, 3, 4), "depth": (1, 1, 1), "key_dim": 4, "mlp_ratio": 1}
    model = timm.create_model("levit_128s", num_classes=10, img_size=32, **small).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(images)
    heads = {g.name for g in lfrns.find_units(model, images) if g.kind == "head" and not g.frozen_reason}
    report = lfrns.check(model, images)
    assert heads and heads <= set(report.checked)
    assert error_of(model, images) < 1e-4


class Counting(Net):
    """Writes numbers that are no widths: a shape, a counter, the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.seen, self.sides = None, 0, (0, 0)

    def of(self, x: Tensor) -> Tensor:
        self.shape, self.seen, self.sides = x.shape, self.seen + 1, tuple(x.shape[2:])
        return self.gain


@pytest.mark.parametrize("base", [None, Counting])
def test_numbers_that_a_forward_writes_are_no_widths(base, tmp_path):
    model = Counting().eval()
    slim = lfrns.slim(model, [IMAGES], macs=0.6, fcr_steps=0, progress=False).model
    folder = lfrns.save(slim, tmp_path / "slim", base=base)
    used = Counting().eval()
    used(IMAGES[:1])
    for other in (Counting(), used):
        loaded = lfrns.load(folder, model=other)
        assert torch.equal(loaded(IMAGES), slim(IMAGES))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["attrs"].setdefault("a", {})["out_channels"] = 1 << 30  # of a layer, where no forward writes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a\.out_channels = 1073741824.*from 0 to the base's own 16"):
        lfrns.load(folder, model=Counting())


BLOCKS = {
    "mobileone": lambda: byobnet.MobileOneBlock(16, 16, 3, group_size=1),
    "repvgg": lambda: byobnet.RepVggBlock(16, 16, 3, group_size=4),
    "repvgg, depthwise": lambda: byobnet.RepVggBlock(16, 16, 3, group_size=1),
    "fastvit's mobileone": lambda: fastvit.MobileOneBlock(16, 16, 3, group_size=1),
    "fastvit, wider, with a gate": lambda: fastvit.MobileOneBlock(16, 24, 3, use_se=True, group_size=0),
    "fastvit's mixer": lambda: fastvit.RepMixer(16),
    "fastvit's large kernel": lambda: fastvit.ReparamLargeKernelConv(16, 32, 7, 2, group_size=1, small_kernel=3),
    "ghostnet": lambda: ghostnet.GhostModuleV3(16, 32),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_branches_are_fused_after_slimming_as_before(kind):
    block = BLOCKS[kind]()
    width = block(torch.zeros(2, 16, 8, 8)).shape[1]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), block, nn.Conv2d(width, 8, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()  # fmt: skip
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    groups = lfrns.find_units(model, IMAGES[:1])
    plan = halved(groups)
    slim = cut(model, groups, plan)
    assert any(part.tensor.startswith("3.") for g in groups if g.name in plan.keep for part in g.slices)
    with torch.no_grad():
        want = slim(IMAGES)
        for name in ("reparameterize", "switch_to_deploy"):
            if hasattr(slim[3], name):
                getattr(slim[3], name)()
                break
        got = slim(IMAGES)
    assert not [module for module in slim[3].modules() if isinstance(module, nn.BatchNorm2d)]
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max()).__ceil__()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """A slim ViT of transformers."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).eval()
    return lfrns.slim(model, [IMAGES], macs=0.7, fcr_steps=0, progress=False).model


def facts(folder: Path) -> dict:
    """What a folder says of its model's making."""
    return json.loads((Path(folder) / "config.json").read_text())["slim"]


def test_what_is_known_of_a_models_making_goes_by_way_of_transformers(vit, tmp_path):
    first = lfrns.save(vit, tmp_path / "first")
    again = AutoModelForImageClassification.from_pretrained(first)
    assert again.lfrns_provenance == vit.lfrns_provenance
    assert facts(lfrns.save(again, tmp_path / "second")).keys() == facts(first).keys()
    again.lfrns_provenance = {**again.lfrns_provenance, "seed": 7}  # as what is done with a model later may add
    again.save_pretrained(tmp_path / "third")
    assert facts(tmp_path / "third")["seed"] == 7
    assert AutoModel.from_pretrained(first).lfrns_provenance == vit.lfrns_provenance
    twice = lfrns.slim(again, [IMAGES], macs=0.9, fcr_steps=0, progress=False).model
    assert len(twice.lfrns_provenance["rounds"]) == 2


def test_a_base_that_was_saved_alone_takes_a_new_head(vit, tmp_path):
    first, body = lfrns.save(vit, tmp_path / "first"), tmp_path / "body"
    AutoModel.from_pretrained(first).save_pretrained(body)
    model = AutoModelForImageClassification.from_pretrained(body, num_labels=4).eval()
    assert model.classifier.weight.shape == (4, 32) and 0 < model.classifier.weight.std().item() < 1
    assert torch.equal(model.vit(IMAGES)[0], vit.vit(IMAGES)[0])
    assert torch.equal(lfrns.load(body)(IMAGES)[0], vit.vit(IMAGES)[0])
    assert torch.equal(lfrns.load(lfrns.save(AutoModel.from_pretrained(body), tmp_path / "b"))(IMAGES)[0],
                       vit.vit(IMAGES)[0])  # fmt: skip
    model.save_pretrained(tmp_path / "four")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "four").eval()
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)
    other = AutoModelForImageClassification.from_pretrained(first, num_labels=4, ignore_mismatched_sizes=True)
    assert other.classifier.weight.shape == (4, 32)


def test_a_base_is_slimmed_once_more_and_every_door_opens_it(vit, tmp_path):
    """Its config states the widths it has now, and of the head those that the classifier had."""
    lfrns.save(vit, tmp_path / "whole")
    body = lfrns.slim(
        AutoModel.from_pretrained(tmp_path / "whole"), [IMAGES], macs=0.7, fcr_steps=2, progress=False
    ).model
    said = body(IMAGES)[0]
    lfrns.save(body, tmp_path / "ours")
    body.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert torch.equal(lfrns.load(folder)(IMAGES)[0], said)
        assert torch.equal(AutoModel.from_pretrained(folder).eval()(IMAGES)[0], said)
        assert AutoModelForImageClassification.from_pretrained(folder, num_labels=4)(IMAGES).logits.shape == (4, 4)


def test_adapters_of_peft_are_to_be_merged_first(vit, tmp_path):
    adapted = copy.deepcopy(vit)
    kind = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    adapted.classifier = kind(adapted.classifier.in_features, adapted.classifier.out_features)
    for call in (lambda: lfrns.save(adapted, tmp_path / "a"), lambda: lfrns.slim(adapted, [IMAGES], macs=0.9)):
        with pytest.raises(ValueError, match=r"adapters of peft\. Merge them first"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_classifier_that_lost_its_head_is_still_damaged(vit, tmp_path):
    folder = lfrns.save(vit, tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.weight is missing"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_wrapped_timm_model_is_saved_by_every_door(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=10)
    dense = transformers.TimmWrapperForImageClassification(config).eval()
    images = torch.randn(4, 3, 160, 160)
    slim = lfrns.slim(dense, [images], macs=0.7, fcr_steps=0, progress=False).model
    slim.save_pretrained(tmp_path / "theirs")
    lfrns.save(slim, tmp_path / "ours", label_names=list("abcdefghij"))
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        opened = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(opened(images).logits, slim(images).logits)
        assert torch.equal(lfrns.load(folder)(images).logits, slim(images).logits)
        assert torch.equal(
            timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), slim(images).logits
        )
        assert facts(folder)["plan"] == slim.lfrns_provenance["plan"] == opened.lfrns_provenance["plan"]
    assert opened.config.id2label[2] == "c"
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "body")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "body", num_labels=4)(images).logits.shape == (
        4,
        4,
    )
    lfrns.save(dense, tmp_path / "dense")
    assert torch.equal(lfrns.load(tmp_path / "dense")(images).logits, dense(images).logits)


def test_feature_maps_of_timm_say_what_is_saved_instead(tmp_path):
    features = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(ValueError, match=r"save\(Feature\w+.*Save the slim model itself"):
        lfrns.save(features, tmp_path / "slim", base="test_resnet")


class Int8(nn.Linear):
    """A linear layer as bitsandbytes has it: integers, and what they are multiplied by."""

    def __init__(self) -> None:
        super().__init__(16, 10)
        self.weight = nn.Parameter(torch.ones(10, 16, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() * 0.1, self.bias)


@pytest.mark.parametrize("kind", ["dynamic", "observed", "int8"])
def test_a_quantised_model_is_refused_in_one_sentence(kind, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    if kind == "dynamic":
        model = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})
    elif kind == "observed":
        model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
        model = torch.ao.quantization.prepare(model.eval())
    else:
        model[4] = Int8()
    name = "0.activation_post_process" if kind == "observed" else "4"
    sentence = rf"\(Sequential\): {name} \(\w+\) is quantised or prepared for it\. Give the model in floating point"
    for call in (
        lambda: lfrns.slim(model, [IMAGES], macs=0.5),
        lambda: lfrns.find_units(model, IMAGES),
        lambda: lfrns.save(model, tmp_path / "slim"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, r"by WeightNorm.*remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, r"by SpectralNorm.*remove_parametrizations"),
    "old weight_norm": (weight_norm, r"by WeightNorm.*remove_weight_norm"),
    "old spectral_norm": (spectral_norm, r"by SpectralNorm.*remove_spectral_norm"),
    "mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), r"from a mask.*prune\.remove"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_layer_whose_weight_is_computed_is_told_of_and_the_others_are_cut(kind, tmp_path):
    compute, reason = COMPUTED[kind]
    model = nn.Sequential(compute(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                          nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          compute(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 10)).eval()  # fmt: skip
    groups = {g.name: g for g in lfrns.find_units(model, IMAGES[:1])}
    for name in ("0", "8"):
        assert groups[name].size == 16
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(groups[name].frozen_reason)
    assert groups["2"].frozen_reason is None
    slim = lfrns.slim(model, [IMAGES], macs=0.7, fcr_steps=0, progress=False).model
    loaded = lfrns.load(lfrns.save(slim, tmp_path / "slim"), model=model_copy(model))
    assert torch.equal(loaded(IMAGES), slim(IMAGES))


def test_a_computed_tensor_on_a_module_is_copied_as_its_values():
    model = Net()
    model.kept = {"map": [model.a(IMAGES)]}
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    copied = model_copy(model)
    assert torch.equal(copied.kept["map"][0], model.kept["map"][0]) and copied.kept["map"][0].is_leaf
