"""Models of any input and output, in any dtype, wrapper and mode, go through the same calls."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import lfrns_hub as lfrns
from lfrns_hub.measure import evaluate
from lfrns_hub.model_io.answers import FEATURES_READ, read_answer
from lfrns_hub.model_io.batches import find_logits, flatten_output, read_logits, read_tensors
from lfrns_hub.model_io.model import as_input


class Small(nn.Module):
    """Two convolutions and a head, small enough for a test of one idea."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 12, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Any:
        maps = self.second(self.norm(self.first(images)).relu()).relu()
        return self.head(self.dropout(maps.mean((2, 3))))


@dataclasses.dataclass
class Detections:
    """What torch.export does not know."""

    levels: list[Tensor]
    score: Tensor
    note: str = ""


class Detector(nn.Module):
    """A backbone with two heads that answers in the given form, anchors among it that have no row an image."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem, self.body = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.box, self.kind = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 6, 1)
        self.register_buffer("anchors", torch.rand(7, 4))

    def forward(self, images: Tensor) -> Any:
        maps = self.body(self.stem(images).relu()).relu()
        levels = [self.box(maps), self.kind(maps)]
        if self.form == "dict":
            return {"boxes": levels[0], "nested": [levels[1], None], "anchors": self.anchors}
        if self.form == "dataclass":
            return Detections(levels, maps.mean((2, 3)))
        return tuple(levels)


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )  # fmt: skip


def torchvision_resnet() -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.layer3 = model.layer4 = nn.Identity()  # 512 channels take half a minute
    model.fc = nn.Linear(128, 5)
    return model


def torchvision_segmentation() -> nn.Module:
    segmentation = pytest.importorskip("torchvision.models.segmentation.fcn")
    backbone = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = backbone

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return dict(zip(("aux", "out"), self.maps(images), strict=True))

    auxiliary, last = backbone.feature_info.channels()
    return segmentation.FCN(Named(), segmentation.FCNHead(last, 4), segmentation.FCNHead(auxiliary, 4))


def third_party_vit() -> nn.Module:
    vit = pytest.importorskip("vit_pytorch")
    return vit.ViT(
        image_size=16, patch_size=8, num_classes=5, dim=32, depth=2, heads=4, dim_head=8, mlp_dim=64, dropout=0.1
    )


def transformers_backbone() -> nn.Module:
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetBackbone(config)


# What builds a model, its images [N, C, H, W], and whether it answers with logits.
MODELS = {
    "one channel": (lambda: timm.create_model("test_resnet", in_chans=1, num_classes=5), (1, 32, 32), True),
    "five channels, other size": (
        lambda: timm.create_model("test_vit", in_chans=5, img_size=48, num_classes=5),
        (5, 48, 48),
        True,
    ),
    "not square": (Small, (3, 16, 24), True),
    "no classes": (lambda: timm.create_model("test_vit", num_classes=0, img_size=32), (3, 32, 32), False),
    "features only": (lambda: timm.create_model("test_resnet", features_only=True), (3, 32, 32), False),
    "sequential": (sequential, (3, 12, 12), True),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(2, 12, 3), nn.ReLU(), nn.Conv1d(12, 4, 3), nn.Flatten(), nn.Linear(112, 5)),
        (2, 32),
        True,
    ),
    "detector, tuple": (lambda: Detector("tuple"), (3, 32, 32), False),
    "detector, dict": (lambda: Detector("dict"), (3, 32, 32), False),
    "detector, dataclass": (lambda: Detector("dataclass"), (3, 32, 32), False),
    "torchvision resnet": (torchvision_resnet, (3, 32, 32), True),
    "torchvision segmentation": (torchvision_segmentation, (3, 32, 32), False),
    "vit-pytorch": (third_party_vit, (3, 16, 16), True),
    "transformers backbone": (transformers_backbone, (3, 32, 32), False),
    "bfloat16": (lambda: Small().bfloat16(), (3, 16, 16), True),
    "float16": (lambda: third_party_vit().half(), (3, 16, 16), True),
    "float64": (lambda: Small().double(), (3, 16, 16), True),
}


def slimmed(model: nn.Module, images: Tensor, **options: Any) -> Any:
    options = {"macs": 0.8, "fcr_steps": 2, "widths": "uniform", "progress": False} | options
    return lfrns.slim(model, [images, images.flip(0)], **options)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", MODELS)
def test_any_model_goes_through_every_call(name: str, tmp_path: Path) -> None:
    build, shape, classifies = MODELS[name]
    model, images = build(), torch.randn(4, *shape)
    before = copy.deepcopy(model)

    assert any(group.frozen_reason is None for group in lfrns.find_units(model, images))
    report = lfrns.check(model, images)
    assert report.checked and report.largest_error <= 1e-8
    result = slimmed(model, images, distance="correlation")  # the fastest: what is cut matters little here
    assert result.report.macs_fraction <= 0.8
    assert_same_weights(model, before)
    assert {n: p.dtype for n, p in result.model.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}

    batch = (images, torch.arange(4)) if classifies else images
    record = lfrns.measure(result.model, [batch], dense=model, progress=False)
    assert record.slim["macs_g"] < record.dense["macs_g"] and record.slim["images"] == 4
    if classifies:
        assert record.slim["agreement_pct"] is not None and "explained_pct" not in record.slim
    else:
        assert record.slim["top1_pct"] is None and 0 < record.slim["explained_pct"] <= 100

    lfrns.save(result.model, tmp_path / "slim", base=before, record=record)
    loaded = lfrns.load(tmp_path / "slim", model=copy.deepcopy(before))
    assert_same_weights(loaded, result.model)
    seen = as_input(images, loaded)
    with torch.no_grad():
        assert torch.equal(flatten_output(loaded(seen)), flatten_output(result.model(seen)))


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 0}, {"in_chans": 1, "num_classes": 5}, {"num_classes": 0, "global_pool": ""}],
    ids=str,
)
def test_a_timm_model_of_other_options_loads_again_by_itself(options: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", **options)
    images = torch.randn(4, options.get("in_chans", 3), 32, 32)
    result = slimmed(model, images, fcr_steps=0)
    base_args = {"global_pool": ""} if "global_pool" in options else None
    lfrns.save(result.model, tmp_path / "slim", base_args=base_args)
    loaded = lfrns.load(tmp_path / "slim")
    assert torch.equal(loaded(images), result.model(images))


def test_wrappers_come_off_and_the_plan_is_that_of_the_plain_module(tmp_path: Path) -> None:
    model, images = Small(), torch.randn(4, 3, 16, 16)
    plain = slimmed(model, images)
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        assert [g.name for g in lfrns.find_units(wrapped, images)] == [g.name for g in lfrns.find_units(model, images)]
        assert lfrns.check(wrapped, images).checked
        result = slimmed(wrapped, images)
        assert type(result.model) is Small and result.plan.keep == plain.plan.keep
        record = lfrns.measure(wrapped, [(images, torch.arange(4))], dense=model, progress=False)
        assert record.slim["agreement_pct"] == 100.0 and record.slim["params_m"] == record.dense["params_m"]
    lfrns.save(torch.compile(plain.model), tmp_path / "slim", base=model)
    assert_same_weights(lfrns.load(tmp_path / "slim", model=Small()), plain.model)


def test_distributed_data_parallel_comes_off(free_port: str) -> None:
    model, images = Small(), torch.randn(4, 3, 16, 16)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        result = slimmed(nn.parallel.DistributedDataParallel(model), images)
    finally:
        torch.distributed.destroy_process_group()
    assert type(result.model) is Small and result.report.macs_fraction <= 0.8


def test_modes_gradients_and_frozen_parameters_stay_as_they_were() -> None:
    model, images = Small().train(), torch.randn(4, 3, 16, 16)
    model.norm.eval()
    model.first.requires_grad_(False)
    model(images).sum().backward()
    result = slimmed(model, images)
    assert model.training and model.dropout.training and not model.norm.training
    assert model.head.weight.grad is not None
    assert not result.model.training and result.model.dropout.p == 0.5
    assert {n for n, p in result.model.named_parameters() if not p.requires_grad} == {"first.weight", "first.bias"}
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_tied_weights_stay_tied() -> None:
    class Tied(Small):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(12, 12), nn.Linear(12, 12)
            self.right.weight = self.left.weight

        def forward(self, images: Tensor) -> Tensor:
            maps = self.second(self.norm(self.first(images)).relu()).relu().mean((2, 3))
            return self.head(self.right(self.left(maps).relu()))

    result = slimmed(Tied(), torch.randn(4, 3, 16, 16))
    assert result.model.right.weight is result.model.left.weight


def test_half_precision_keeps_the_dtype_of_each_tensor_and_the_values_that_stay() -> None:
    model = Small().bfloat16()
    model.norm.float()
    result = slimmed(model, torch.randn(4, 3, 16, 16), groups=["first"], fold=False, macs=0.9)
    kept = result.plan.keep["first"]
    assert result.model.norm.weight.dtype == result.model.norm.running_mean.dtype == torch.float32
    assert result.model.first.weight.dtype == torch.bfloat16
    assert torch.equal(result.model.first.weight, model.first.weight[kept])


def test_labels_train_classifiers_and_are_left_alone_elsewhere() -> None:
    images = torch.randn(4, 3, 32, 32)
    boxes = [{"boxes": torch.zeros(0, 4)}] * 4
    result = lfrns.slim(Detector("tuple"), [(images, boxes)], macs=0.9, fcr_steps=1, progress=False)
    assert result.report.macs_fraction <= 0.9
    with pytest.raises(ValueError, match="labels from 0 to 7 for a model with 5 classes"):
        lfrns.slim(Small(), [(images, torch.tensor([0, 1, 2, 7]))], macs=0.8, fcr_steps=1, progress=False)


def test_outputs_are_read_in_order_and_flattened() -> None:
    rows, maps, anchors = torch.ones(2, 3), torch.full((2, 1, 2, 2), 2.0), torch.full((5,), 3.0)
    output = {"a": rows, "b": [maps, None, torch.ones(2, dtype=torch.int64)], "c": Detections([anchors], rows)}
    assert [id(t) for t in read_tensors(output)] == [id(t) for t in (rows, maps, anchors, rows)]
    assert flatten_output(output).tolist() == [[1.0] * 3 + [2.0] * 4 + [3.0] * 5 + [1.0] * 3] * 2
    assert read_logits((rows, rows + 1)) is rows and read_logits({"logits": rows, "maps": maps}) is rows
    assert find_logits((rows, maps)) is None and find_logits({"logits": maps}) is None
    with pytest.raises(ValueError, match="answers with str without a floating-point tensor"):
        read_logits("cat")


def test_the_distance_of_features_is_by_hand() -> None:
    model = nn.Identity()
    small, large = torch.tensor([[0.0, 2.0]]), torch.tensor([[[0.0, 200.0]]])  # variances 1 and 10,000
    dense, moved = (
        read_answer(model, [small, large]),
        read_answer(model, [small + torch.tensor([1.0, 0.0]), large * 1.5]),
    )
    # Mean squared errors 0.5 and 5,000: half of the variance in both, whatever their scale.
    assert dense.outputs.word == "features"
    assert float(moved.divergence(dense)) == pytest.approx(0.25)


def test_the_distance_of_logits_is_the_kullback_leibler_divergence() -> None:
    dense = read_answer(nn.Identity(), torch.tensor([[0.0, 0.0]]))
    moved = read_answer(nn.Identity(), torch.tensor([[0.0, torch.log(torch.tensor(3.0))]]))  # one to three
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert dense.outputs.word == "classes" and float(moved.divergence(dense)) == pytest.approx(float(expected))


def test_the_drawn_loss_has_the_curvature_of_the_distance() -> None:
    features = torch.tensor([[0.0, 4.0]], requires_grad=True)  # variance 4, two features: curvature 1 / 8 each
    generator, total = torch.Generator().manual_seed(0), torch.zeros(1, 2)
    for _ in range(4000):
        loss = read_answer(nn.Identity(), [features, features.detach().unsqueeze(-1)]).drawn_loss(generator)
        total += torch.autograd.grad(loss, features)[0].square()
    # Two tensors: the mean over them halves it.
    assert (total / 4000).tolist()[0] == pytest.approx([1 / 16] * 2, rel=0.1)


def test_large_feature_maps_are_read_by_a_fixed_choice() -> None:
    maps = torch.randn(2, 8, 32, 32)
    first, again = (read_answer(nn.Identity(), maps).parts[0] for _ in range(2))
    assert first.shape == (2, FEATURES_READ) and torch.equal(first, again)


def test_what_a_model_says_of_its_classes_decides() -> None:
    model = nn.Identity()
    assert read_answer(model, torch.zeros(2, 3)).outputs.word == "classes"
    assert read_answer(model, torch.zeros(2, 1)).outputs.word == "quantities"
    model.num_classes = 0
    assert read_answer(model, torch.zeros(2, 3)).outputs.word == "features"


class Nested(Small):
    """A part of it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.compile(self.head)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: "resnet50", TypeError, r"find_units\(str\): a torch.nn.Module is needed"),
        (Nested, ValueError, r"find_units\(Nested\): head in it is compiled. Put head._orig_mod"),
        (lambda: nn.LazyLinear(4), ValueError, r"find_units\(LazyLinear\): weight has no shape yet"),
        (lambda: torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4)), ValueError, "its code is compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_that_cannot_be_traced_says_what_to_do(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lfrns.find_units(build(), torch.zeros(1, 3, 16, 16))


def test_a_model_on_the_meta_device_has_units_and_no_weights() -> None:
    with torch.device("meta"):
        model = Small()
    images = torch.zeros(1, 3, 16, 16)
    assert [g.size for g in lfrns.find_units(model, images)] == [16, 12, 5]
    for call in (lambda: lfrns.check(model, images), lambda: slimmed(model, images)):
        with pytest.raises(ValueError, match=r"\(Small\): first.weight is on the meta device"):
            call()


@pytest.mark.parametrize(("example", "given"), [([1], "list"), (torch.zeros(3), r"\[3\]")])
def test_an_example_that_is_no_batch_of_images_is_refused(example: Any, given: str) -> None:
    with pytest.raises(ValueError, match=rf"find_units\(example_input={given}\): images"):
        lfrns.find_units(Small(), example)


def test_accuracy_of_features_is_refused_and_a_stale_input_size_is_named() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"evaluate\(ResNet\): it answers with features"):
        evaluate(model, [torch.zeros(2, 3, 32, 32)], progress=False)
    changed = Small()
    changed.pretrained_cfg = {"input_size": (4, 16, 16)}
    with pytest.raises(ValueError, match=r"measure\(Small\): it does not run on \[4, 16, 16\].*example_input"):
        lfrns.measure(changed, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_stays_there(dtype: torch.dtype) -> None:
    model, images = Small().to("cuda", dtype), torch.randn(4, 3, 16, 16)
    result = slimmed(model, images, widths="global")
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    assert lfrns.check(model, images).checked
    assert lfrns.measure(result.model, [(images, torch.arange(4))], dense=model, progress=False).slim["images"] == 4
