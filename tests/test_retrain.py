import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lfrns_hub.measure import evaluate
from lfrns_hub.model_io.answers import read_answer
from lfrns_hub.retrain import make_accelerator, retrain
from lfrns_hub.retrain.choices import choose_optimizer, make_optimizer, rate_at
from lfrns_hub.retrain.damage import rate_for, share_changed
from lfrns_hub.retrain.loss import mixed_loss


def make_model(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, classes))


def make_images(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose brightest colour is their class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.randn(count, 3, 6, 6, generator=generator)
    images[torch.arange(count), labels] += 1
    return images, labels


def make_loader(count: int = 24, batch_size: int = 8, shuffle: bool = True) -> DataLoader:
    return DataLoader(TensorDataset(*make_images(count)), batch_size=batch_size, shuffle=shuffle)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_learns_in_place_and_comes_back_as_it_was(precision):
    model = make_model().eval()
    model[1].train()
    before = state_of(model)
    options = {"learning_rate": 0.05, "mixed_precision": precision, "progress": False}
    returned = retrain(model, make_loader(), epochs=8, **options)
    assert returned is model and not same(before, state_of(model))
    assert evaluate(model, make_loader(), progress=False)["top1_pct"] > 90
    assert not model.training and model[1].training
    assert "forward" not in vars(model) and set(state_of(model)) == set(before)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    copy.deepcopy(model)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    states = []
    for seed in (5, 5, 6):
        model = make_model()
        retrain(model, make_loader(), epochs=2, seed=seed, progress=False)
        states.append(state_of(model))
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_same_accelerator_serves_twice_with_the_same_result():
    accelerator = make_accelerator(seed=2)
    states = []
    for _ in range(2):
        model = make_model()
        retrain(model, make_loader(), epochs=1, seed=2, accelerator=accelerator, progress=False)
        states.append(state_of(model))
    assert same(*states)


def test_two_batches_accumulated_equal_one_of_both():
    models = [nn.Sequential(nn.Flatten(), nn.Linear(108, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    common = {"epochs": 2, "optimizer": "sgd", "mixed_precision": "no", "progress": False}
    retrain(models[0], make_loader(batch_size=12, shuffle=False), **common)
    retrain(models[1], make_loader(batch_size=6, shuffle=False), gradient_accumulation_steps=2, **common)
    torch.testing.assert_close(models[0][1].weight, models[1][1].weight, rtol=1e-5, atol=1e-6)


def test_the_rate_rises_as_a_line_and_falls_as_a_cosine():
    rates = [rate_at(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert rates[6] == pytest.approx(0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0


def peak_rate(model: nn.Module, **options) -> float:
    rates = []
    options = {"epochs": 2, "warmup_fraction": 0.5, "progress": False} | options
    retrain(model, make_loader(), tracker=lambda values, _: rates.append(values.get("learning_rate", 0)), **options)
    return max(rates)


def test_the_default_rate_is_the_lower_the_less_differs_from_the_teacher():
    shares = [rate_for(share / 100, "sgd") for share in range(101)]
    assert shares == sorted(shares) and shares[0] == 0.02 and shares[-1] == 5.0
    teacher = retrain(make_model(), make_loader(), epochs=8, learning_rate=0.05, progress=False).eval()
    assert peak_rate(copy.deepcopy(teacher), teacher=teacher) == pytest.approx(0.01 * 0.02)
    assert peak_rate(make_model(), teacher=teacher) == pytest.approx(0.01 * 5)
    assert peak_rate(make_model(), teacher=teacher, optimizer="adamw") == pytest.approx(1e-4)
    assert peak_rate(make_model()) == pytest.approx(0.01)  # nothing to differ from
    assert peak_rate(make_model(), teacher=teacher, learning_rate=0.003) == pytest.approx(0.003)


def test_what_differs_from_the_teacher_is_counted_on_images_from_all_over_and_leaves_no_trace():
    model, teacher = make_model(), retrain(make_model(), make_loader(), epochs=8, learning_rate=0.05, progress=False)
    images, labels = make_images(2000)
    images = images[labels.argsort()]  # sorted by class, as class folders are
    accelerator, before = make_accelerator(), torch.get_rng_state()
    loader = DataLoader(TensorDataset(images), batch_size=20)
    found = share_changed(model, teacher, loader, accelerator, 0)
    with torch.no_grad():
        everywhere = (model.eval()(images).argmax(1) != teacher.eval()(images).argmax(1)).double().mean()
    assert found == pytest.approx(float(everywhere), abs=0.06) and 0.2 < found < 0.95
    assert torch.equal(torch.get_rng_state(), before)
    assert share_changed(model.train(), teacher, loader, accelerator, 0) == found and model.training
    whole = DataLoader([(part,) for part in images.split(20)], batch_size=None)  # of batches, not of images
    with torch.no_grad():
        first = (model.eval()(images[:520]).argmax(1) != teacher(images[:520]).argmax(1)).double().mean()
    assert share_changed(model, teacher, whole, accelerator, 0) == pytest.approx(float(first))
    heads = nn.Sequential(nn.Flatten(), nn.Linear(108, 1))
    quantities = DataLoader(TensorDataset(images[:40], torch.randn(40, 1)), batch_size=20)
    assert share_changed(heads, copy.deepcopy(heads), quantities, accelerator, 0) is None


def test_the_tracker_sees_every_step_and_every_epoch():
    seen: list[tuple[int, set[str]]] = []
    retrain(
        make_model(),
        make_loader(),
        epochs=2,
        eval_loader=make_loader(6),
        progress=False,
        tracker=lambda values, step: seen.append((step, set(values))),
    )
    step, epoch = {"loss", "learning_rate"}, {"eval_top1_pct", "eval_loss"}
    assert seen == [(1, step), (2, step), (3, step), (3, epoch), (4, step), (5, step), (6, step), (6, epoch)]


def test_no_epochs_change_nothing():
    model = make_model()
    before = state_of(model)
    retrain(model, make_loader(), epochs=0)
    assert same(before, state_of(model))


def test_distillation_is_the_divergence_of_softened_logits():
    logits, taught = torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    student, target = (logits / 2).softmax(1), (taught / 2).softmax(1)
    of = [read_answer(nn.Identity(), part) for part in (logits, taught)]
    soft = 4 * (target * (target / student).log()).sum(1).mean()
    hard = F.cross_entropy(logits, labels)
    torch.testing.assert_close(mixed_loss(of[0], {"": None}, of[1], 0.0, 0.5, 2.0), soft)
    torch.testing.assert_close(mixed_loss(of[0], {"": labels}, of[1], 0.0, 0.25, 2.0), 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(mixed_loss(of[0], {"": labels}, None, 0.0, 0.5, 2.0), hard)


def test_a_teacher_needs_no_labels_and_is_left_alone():
    teacher = retrain(make_model(), make_loader(), epochs=8, learning_rate=0.05, progress=False).train()
    before = state_of(teacher)
    images, labels = make_images()
    torch.manual_seed(3)
    student = make_model()
    student[4].reset_parameters()
    bare = DataLoader([{"pixel_values": image} for image in images], batch_size=8, shuffle=True)
    retrain(student, bare, teacher=teacher, epochs=8, learning_rate=0.05, progress=False)
    scores = evaluate(student, [(images, labels)], teacher=teacher, progress=False)
    assert scores["agreement_pct"] > 90
    assert same(before, state_of(teacher)) and teacher.training


@pytest.mark.parametrize(
    ("amx", "launched", "expected"), [(True, None, "bf16"), (False, None, "no"), (True, "no", "no")]
)
def test_bf16_is_taken_on_cpus_with_amx_unless_the_launcher_says_otherwise(monkeypatch, amx, launched, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    AcceleratorState._reset_state(True)
    try:
        assert make_accelerator(cpu=True).mixed_precision == expected
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not amx)
        assert make_accelerator(cpu=True).mixed_precision == expected  # as the one before
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("launched", [False, True])
def test_float16_on_a_cpu_is_refused_in_one_sentence(monkeypatch, launched):
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r'mixed_precision="fp16": .* needs a GPU.* Pass "no" or "bf16"'):
        make_accelerator(cpu=True, mixed_precision=None if launched else "fp16")


def test_convolutions_train_in_channels_last_and_everything_comes_back_as_it_came():
    model, teacher = make_model(), make_model()
    kept = make_model().to(memory_format=torch.channels_last)
    retrain(model, make_loader(), teacher=teacher, epochs=1, progress=False)
    retrain(kept, make_loader(), epochs=1, progress=False)
    layouts = [model[0].weight.is_contiguous(), teacher[0].weight.is_contiguous(), kept[0].weight.is_contiguous()]
    assert layouts == [True, True, False]
    during: list[list[int]] = []
    model[0].register_forward_pre_hook(
        lambda module, inputs: during.append([t.stride(1) for t in (module.weight, inputs[0])])
    )
    retrain(model, make_loader(8), epochs=1, progress=False)
    assert during and all(strides == [1, 1] for strides in during)


def test_the_optimizer_is_fused_where_all_weights_can_be():
    model = make_model()
    assert all(make_optimizer(model, rule, 0.1, 0.1).defaults["fused"] for rule in ("sgd", "adamw"))
    assert not make_optimizer(model.to("meta"), "sgd", 0.1, 0.1).defaults["fused"]


def test_what_a_model_names_by_a_pattern_does_not_decay():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.head = nn.ModuleDict({"proj": nn.Linear(2, 2)}), nn.Linear(2, 2)

        def no_weight_decay(self):
            return {"pos_embed.*"}

    model = Embedded()
    decayed, spared = make_optimizer(model, "sgd", 0.1, 0.1).param_groups
    assert [id(one) for one in decayed["params"]] == [id(model.head.weight)]
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0


def test_auto_takes_sgd_for_batchnorm_networks_and_adamw_for_transformers():
    timm = pytest.importorskip("timm")
    chosen = {name: choose_optimizer(timm.create_model(name)) for name in ("test_resnet", "test_vit", "test_convnext")}
    assert chosen == {"test_resnet": "sgd", "test_vit": "adamw", "test_convnext": "adamw"}


def test_norms_biases_and_tokens_do_not_decay():
    model = pytest.importorskip("timm").create_model("test_vit", img_size=32, num_classes=3)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    model.fc_norm = model.norm
    images = torch.zeros(4, 3, 32, 32)
    loader = DataLoader(TensorDataset(images, torch.zeros(4, dtype=torch.int64)), batch_size=4)
    retrain(model, loader, epochs=1, learning_rate=1e-9, weight_decay=1e6, warmup_fraction=0, progress=False)
    moved = {name for name, value in model.named_parameters() if (value - 1).abs().max() > 1e-4}
    assert "blocks.0.attn.qkv.weight" in moved
    assert not moved & {"pos_embed", "cls_token", "norm.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": -1}, r"epochs=-1"),
        ({"optimizer": "lion"}, r'optimizer="lion"'),
        ({"learning_rate": 0.0}, r"learning_rate=0.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1"),
        ({"warmup_fraction": 1}, r"warmup_fraction=1"),
        ({"label_smoothing": -0.5}, r"label_smoothing=-0.5"),
        ({"distill_weight": 1.5}, r"distill_weight=1.5"),
        ({"temperature": 0}, r"temperature=0"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps=0"),
        ({"teacher": make_model(4)}, r"it has 4 classes, the model has 3"),
    ],
)
def test_a_value_out_of_range_is_refused(arguments, message):
    model = make_model()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        retrain(model, make_loader(), progress=False, **arguments)
    weights = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in weights)


def test_a_loader_that_cannot_teach_is_refused():
    images, labels = make_images()
    with pytest.raises(ValueError, match=r"24 images, batch_size=32, drop_last=True"):
        retrain(make_model(), DataLoader(TensorDataset(images, labels), batch_size=32, drop_last=True))
    with pytest.raises(ValueError, match=r"teacher=None\) got a batch without labels"):
        retrain(make_model(), DataLoader(images, batch_size=8), progress=False)
    with pytest.raises(ValueError, match=r"labels from 0 to 2 for a model with 2 classes"):
        retrain(make_model(2), make_loader(shuffle=False), progress=False)
    with pytest.raises(TypeError, match=r"loader=list"):
        retrain(make_model(), [(images, labels)])
    model = make_model()
    with pytest.raises(ValueError, match="cannot teach itself"):
        retrain(model, make_loader(), teacher=model)


def test_a_loss_that_is_not_finite_names_step_and_rate():
    images, labels = make_images()
    images[16] = float("nan")
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    with pytest.raises(FloatingPointError, match=r"learning_rate=0.02.*loss is nan at step 3 of 3, rate .*0.002"):
        retrain(make_model(), loader, epochs=1, learning_rate=0.02, warmup_fraction=0, progress=False)


TWO_PROCESSES = """
import torch
from tests.test_retrain import make_loader, make_model
from lfrns_hub.measure import evaluate, measure
from lfrns_hub.retrain import make_accelerator, retrain

accelerator = make_accelerator()
assert accelerator.num_processes == 2
model = make_model()
model.unused = torch.nn.Parameter(torch.zeros(2))
retrain(model, make_loader(26, 4), epochs=4, learning_rate=0.02, eval_loader=make_loader(7, 2), accelerator=accelerator)

flat = torch.cat([value.flatten().float() for value in model.state_dict().values()])
both = accelerator.gather(flat[None])
assert torch.equal(both[0], both[1])

for count in (1, 3, 7, 8):
    alone = evaluate(model, make_loader(count, 2, shuffle=False), progress=False)
    shared = evaluate(model, make_loader(count, 2, shuffle=False), accelerator=accelerator, progress=False)
    assert shared["images"] == count and shared["class_counts"] == alone["class_counts"], (count, shared)
    assert shared["per_class_pct"] == alone["per_class_pct"], (alone, shared)
    assert abs(shared["loss"] - alone["loss"]) < 1e-5, (alone, shared)

record = measure(model, make_loader(7, 2), dense=model, accelerator=accelerator, progress=False)
latency = accelerator.gather(torch.tensor([record.slim["latency_ms"]]))
assert record.slim["images"] == 7 and latency[0] == latency[1] > 0
print("same weights, every image once")
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_count_every_image_once(tmp_path, free_port):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port,
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same weights, every image once") == 2
    assert len(re.findall(r"epoch 4 of 4: top-1, % [\d.]+; 7 images", done.stderr)) == 1
