import json

import pytest
import timm
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lfrns_hub.measure import (
    Record,
    count_macs,
    count_params,
    evaluate,
    format_table,
    measure,
    measure_each,
    measure_latency,
)


class Oracle(nn.Module):
    """Predicts the class that an image's first pixel names, so that every score is known by hand."""

    pretrained_cfg = {"input_size": (1, 2, 2)}  # noqa: RUF012

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.shift = shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        named = (images[:, 0, 0, 0].long() + self.shift) % 3
        return self.scale * nn.functional.one_hot(named, 3).to(self.scale.dtype)


def make_loader(named: list[int], labels: list[int], batch_size: int = 2) -> DataLoader:
    images = torch.tensor(named, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=batch_size)


def test_parameters_that_two_modules_share_count_once():
    first = nn.Linear(3, 3)
    assert count_params(nn.Sequential(first, first)) == 12


def test_macs_of_a_convolution_and_a_linear_layer_are_those_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert count_macs(model, torch.zeros(4, 3, 6, 6)) == 6 * 6 * 9 * 3 * 8 + 8 * 5


def test_macs_of_a_depthwise_convolution_count_one_input_channel_each():
    assert count_macs(nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.zeros(1, 4, 5, 5)) == 5 * 5 * 9 * 4


class Stubborn(nn.Module):
    """Refuses the meta device, so that attention runs as the fused CPU kernel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images * float(1 + images.sum().item()))


def test_attention_counts_on_the_meta_device_and_where_the_cpu_fuses_it():
    model = timm.create_model("test_vit").eval()
    image = torch.zeros(1, 3, 160, 160)
    tokens, width, blocks, hidden = 101, 64, len(model.blocks), model.blocks[0].mlp.fc1.out_features
    linear = tokens * (width * 3 * width + width * width + 2 * width * hidden)
    attention = 2 * tokens * tokens * width
    by_hand = 100 * 3 * 16 * 16 * width + blocks * (linear + attention) + width * 1000
    assert count_macs(model, image) == by_hand
    assert count_macs(Stubborn(model), image) == by_hand


def test_counting_leaves_mode_device_and_weights_alone():
    model = timm.create_model("test_resnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, torch.zeros(2, 3, 64, 64))
    assert model.training and all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_latency_takes_turns_and_restores_the_mode():
    calls: list[str] = []
    models = {name: nn.Sequential(nn.Linear(2, 2)).train() for name in ("dense", "slim")}
    for name, model in models.items():
        model.register_forward_hook(lambda module, _args, _out, name=name: calls.append(f"{name} {module.training}"))
    times = measure_latency(models, torch.zeros(1, 2), runs=2, warmup=1)
    assert calls == ["dense False", "slim False"] * 3
    assert times.keys() == models.keys() and min(times.values()) > 0
    assert all(model.training for model in models.values())
    with pytest.raises(ValueError, match="runs=0"):
        measure_latency(models, torch.zeros(1, 2), runs=0)


@pytest.mark.parametrize("accelerated", [False, True])
def test_scores_are_those_by_hand(accelerated):
    loader = make_loader([0, 0, 1, 1, 1], [0, 1, 1, 1, 0])
    accelerator = Accelerator(cpu=True) if accelerated else None
    scores = evaluate(Oracle(), loader, teacher=Oracle(shift=1), accelerator=accelerator, progress=False)
    assert scores["top1_pct"] == 60.0 and scores["images"] == 5
    assert scores["class_counts"] == [2, 3, 0]
    assert scores["per_class_pct"] == [50.0, pytest.approx(200 / 3), None]
    assert scores["agreement_pct"] == 0.0
    log_sum = torch.logsumexp(torch.tensor([4.0, 0.0, 0.0]), 0).item()
    assert scores["loss"] == pytest.approx(log_sum - 4 * 3 / 5)


def test_scores_read_dicts_and_model_outputs_of_transformers():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(Oracle):
        def forward(self, images):
            return Output(super().forward(images))

    batch = {"pixel_values": torch.zeros(2, 1, 2, 2), "labels": torch.tensor([0, 1])}
    assert evaluate(Wrapped(), [batch], progress=False)["top1_pct"] == 50.0


def test_evaluation_restores_the_mode_of_every_module():
    model = nn.Sequential(Oracle(), nn.Dropout()).train()
    model[1].eval()
    evaluate(model, make_loader([0], [0]), progress=False)
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got no image: the loader is empty"),
        ([torch.zeros(2, 1, 2, 2)], "batch without labels"),
        ([(torch.zeros(2, 1, 2, 2), torch.tensor([0, 3]))], "labels from 0 to 3 for a model with 3 classes"),
    ],
)
def test_a_loader_that_cannot_be_scored_is_refused(batches, message):
    model = Oracle().train()
    with pytest.raises(ValueError, match=message):
        evaluate(model, batches, progress=False)
    assert model.training


def test_the_record_holds_both_models_and_the_class_that_lost_most():
    dense, slim = Oracle(), Oracle(shift=1)
    slim.lfrns_provenance = {"seed": 3}
    record = measure(slim, make_loader([0, 0, 1, 1, 2], [0, 0, 1, 1, 1]), dense=dense, progress=False)
    assert record.dense["top1_pct"] == 80.0 and record.slim["top1_pct"] == 0.0
    assert record.slim["worst_class"] == {"class": 0, "dense_pct": 100.0, "slim_pct": 0.0, "drop_points": 100.0}
    assert record.slim["agreement_pct"] == 0.0
    assert record.slim["params_m"] == 1e-6 and record.slim["size_mb"] == 4e-6
    assert record.slim["flops_g"] == 2 * record.slim["macs_g"]
    assert record.setup["provenance"] == {"seed": 3}
    assert record.setup["input_size"] == [1, 2, 2] and record.setup["batch_size"] == 1
    assert record.setup["machine"]["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(record.setup["versions"]["torch"])


def test_a_record_comes_back_from_its_file(tmp_path):
    record = measure(Oracle(), make_loader([0, 1], [0, 0]), dense=Oracle(), progress=False)
    record.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == record
    assert json.loads(record.to_json())["slim"]["per_class_pct"] == [50.0, None, None]
    with pytest.raises(ValueError, match=r"from_json\(\['model_type'\]\): a record has"):
        Record.from_json('{"model_type": "vit"}')


def test_what_was_not_measured_reads_none_and_says_so_in_the_table():
    record = measure(timm.create_model("test_resnet"), progress=False)
    assert record.dense is None and record.slim["top1_pct"] is None
    assert record.setup["input_size"] == [3, 160, 160] and record.slim["macs_g"] > 0
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    console.print(format_table(record))
    assert "not measured" in console.export_text()


def test_the_table_shows_dense_against_slim():
    record = measure(Oracle(shift=1), make_loader([0, 1], [0, 0]), dense=Oracle(), progress=False)
    record.setup["label_names"] = ["cat", "dog", "eel"]
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=160, file=nowhere)
        console.print(format_table(record))
    text = console.export_text()
    assert "worst class (cat)" in text and "-50.00 points" in text and "2 images tested" in text


def test_without_an_input_size_anywhere_measure_says_what_to_pass():
    with pytest.raises(ValueError, match=r"measure\(Linear\).*example_input"):
        measure(nn.Linear(2, 2))


def test_several_models_are_measured_at_once_as_one_by_one():
    loader, dense = make_loader([0, 1, 2, 2], [0, 1, 2, 1]), Oracle()
    models = {"same": Oracle(), "shifted": Oracle(shift=1)}
    together = measure_each(models, loader, dense=dense, progress=False)
    for name, model in models.items():
        alone = measure(model, loader, dense=dense, progress=False)
        for side in ("dense", "slim"):
            one, other = getattr(together[name], side), getattr(alone, side)
            now = ("latency_ms", "occasion")
            assert {k: v for k, v in one.items() if k not in now} == {k: v for k, v in other.items() if k not in now}
    assert together["same"].slim["agreement_pct"] == 100
    assert together["shifted"].slim["agreement_pct"] == 0
