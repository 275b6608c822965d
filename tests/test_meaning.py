"""What an output means: classes, labels that hold together, quantities, features, or several of these by name."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from children import end, start
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfrns_hub as lfrns
from lfrns_hub.hub.card import render_card
from lfrns_hub.measure import Record, evaluate, format_table
from lfrns_hub.model_io.answers import Outputs, probe, read_answer, settle, settle_by_loader
from lfrns_hub.model_io.batches import split_batch
from lfrns_hub.model_io.meaning import Classes, Features, Labels, Quantities
from lfrns_hub.retrain import make_accelerator
from lfrns_hub.retrain.loss import mixed_loss
from lfrns_hub.zoo import guard_against_chance

BRIGHT = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
HOLD = torch.stack([BRIGHT[:, 0].mean((1, 2)) > 0, BRIGHT[:, 1].mean((1, 2)) > 0, BRIGHT.mean((1, 2, 3)) > 0], 1)
SUM = BRIGHT[:, :2].mean((2, 3))


class Net(nn.Module):
    """Two convolutions and a head of any width; `heads` names several."""

    def __init__(self, width: int = 3, heads: dict[str, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.heads = nn.ModuleDict({name: nn.Linear(16, k) for name, k in (heads or {"": width}).items() if name})
        self.head = None if heads else nn.Linear(16, width)

    def forward(self, images: Tensor) -> Any:
        pooled = self.second(self.first(images).relu()).relu().mean((2, 3))
        return {name: head(pooled) for name, head in self.heads.items()} if self.head is None else self.head(pooled)


class Given(nn.Module):
    """Answers what stands in its images, so that every figure is known by hand."""

    def __init__(self, shift: float = 0.0, **said: Any) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.__dict__.update(said)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) + self.shift


def given(outputs: Tensor, labels: Tensor, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(outputs.float()[:, :, None, None], labels), batch_size)


def lively(model: nn.Module) -> nn.Module:
    """The same with larger weights, so that its answers differ from image to image."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def slimmed(model: nn.Module, *batch: Any, **options: Any) -> Any:
    return lfrns.slim(model.eval(), [batch], **{"macs": 0.7, "fcr_steps": 3, "progress": False} | options)


# --- the losses, by hand
def test_the_distance_of_labels_is_the_sum_of_bernoulli_divergences() -> None:
    dense, moved = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]])  # 1/2, 3/4 and 3/4, 1/2
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    by_hand += 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(Labels().divergence(moved, dense)) == pytest.approx(by_hand)
    soft = Labels().distillation_loss(moved * 2, dense * 2, temperature=2.0)
    assert float(soft) == pytest.approx(4 * by_hand / 2)  # temperature squared, the mean over two labels


def test_the_distance_of_quantities_is_in_the_variance_of_each() -> None:
    dense, moved = torch.tensor([[0.0, 0.0], [2.0, 200.0]]), torch.tensor([[1.0, 100.0], [2.0, 200.0]])
    meaning = Quantities().calibrated(dense)
    assert meaning.variance == pytest.approx((1.0, 10_000.0))
    assert float(meaning.divergence(moved, dense)) == pytest.approx(1.0)
    assert float(meaning.divergence(moved[:1], dense[:1])) == pytest.approx(1.0)  # of one image alone, too


@pytest.mark.parametrize(
    ("meaning", "outputs", "curvature"),
    [
        (Labels(), [[0.0, math.log(3)]], [0.25, 0.1875]),  # p (1 - p)
        (Quantities((4.0, 0.25)), [[1.0, 1.0]], [0.25, 4.0]),  # one over the variance
    ],
)
def test_the_drawn_loss_has_the_curvature_of_the_distance(meaning: Any, outputs: Any, curvature: list[float]) -> None:
    outputs, generator = torch.tensor(outputs, requires_grad=True), torch.Generator().manual_seed(0)
    draws = [torch.autograd.grad(meaning.drawn_loss(outputs, generator), outputs)[0] for _ in range(3000)]
    assert torch.stack(draws).square().mean(0)[0].tolist() == pytest.approx(curvature, rel=0.15)


def test_the_task_loss_is_what_torch_has_and_smoothing_draws_labels_to_the_middle() -> None:
    outputs, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    expected = F.binary_cross_entropy_with_logits(outputs, labels)
    torch.testing.assert_close(Labels().task_loss(outputs, labels), expected)
    smoothed = F.binary_cross_entropy_with_logits(outputs, labels * 0.9 + 0.05)
    torch.testing.assert_close(Labels().task_loss(outputs, labels, 0.1), smoothed)
    torch.testing.assert_close(Quantities().task_loss(outputs, labels), F.mse_loss(outputs, labels))
    with pytest.raises(ValueError, match=r"label_smoothing=0.1: quantities have no probability"):
        Quantities().task_loss(outputs, labels, 0.1)


def test_what_is_not_known_teaches_nothing() -> None:
    outputs, labels = torch.zeros(2, 2), torch.tensor([[1.0, -100.0], [-100.0, -100.0]])
    assert float(Labels().task_loss(outputs, labels)) == pytest.approx(math.log(2))
    assert float(Labels().surprise(outputs, labels)) == pytest.approx(math.log(2))
    numbers = torch.tensor([[3.0, float("nan")], [float("nan"), float("nan")]])
    assert float(Quantities().task_loss(outputs, numbers)) == 9.0
    assert Quantities((1.0, 1.0)).surprise(outputs, numbers).tolist() == 4.5


# --- labels of any form come to one
ONE_HOT = F.one_hot(torch.tensor([2, 0, 1]), 3)


@pytest.mark.parametrize(
    "labels",
    [
        *(torch.tensor([2, 0, 1], dtype=d) for d in (torch.int32, torch.uint8, torch.int16, torch.int8, torch.uint16)),
        torch.tensor([[2], [0], [1]]), torch.tensor([2.0, 0.0, 1.0]), torch.tensor([[2.0], [0.0], [1.0]]),
        ONE_HOT, ONE_HOT.bool(), ONE_HOT.float(), ONE_HOT.to(torch.uint8), ONE_HOT.half(), [2, 0, 1],
    ],
    ids=lambda labels: f"{getattr(labels, 'dtype', 'list')} {list(getattr(labels, 'shape', [3]))}",
)  # fmt: skip
def test_class_labels_of_any_form_are_class_numbers(labels: Any) -> None:
    outputs = settle([nn.Identity()], torch.zeros(3, 3), [labels], "slim")
    read = outputs.read_labels(labels, 3, "slim(loader)")[""]
    assert outputs.word == "classes" and read.dtype == torch.int64 and read.tolist() == [2, 0, 1]


def test_a_class_number_of_an_unsigned_type_is_not_taken_for_an_unreadable_image() -> None:
    labels = torch.tensor([156, 3], dtype=torch.uint8)  # 156 is -100 in 8 bits
    scores = evaluate(Given(), given(F.one_hot(torch.tensor([156, 3]), 200), labels), progress=False)
    assert scores["images"] == 2 and scores["images_skipped"] == 0 and scores["top1_pct"] == 100


def test_probabilities_teach_as_such_and_are_scored_by_the_most_likely_class() -> None:
    labels, outputs = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]]), torch.randn(2, 3)
    read = Classes().read_labels(labels, 3)
    torch.testing.assert_close(Classes().task_loss(outputs, read), -(labels * outputs.log_softmax(1)).sum(1).mean())
    scores = evaluate(Given(), given(torch.tensor([[5.0, 0, 0], [5.0, 0, 0]]), labels), progress=False)
    assert scores["top1_pct"] == 50 and scores["class_counts"] == [1, 0, 1]


@pytest.mark.parametrize(
    ("meaning", "width", "labels", "message"),
    [
        (Classes(), 3, torch.tensor([0, 3]), r"labels from 0 to 3 for a model with 3 classes: .*\[0, 3\).*a head"),
        (Classes(), 3, torch.tensor([0.5, 1.0]), r"labels are float32 \[2\].*class numbers \[N\] or one-hot.*Set|set"),
        (Classes(), 3, torch.tensor([True, False]), r"labels are bool \[2\] for a model with 3 classes"),
        (
            Classes(),
            3,
            torch.tensor([[1, 1, 0]]),
            r"labels are int64 \[1, 3\] and a row of them adds up to 2: of 3 classes one holds.*problem_type",
        ),
        (Classes(), 3, torch.tensor([[1, 0]]), r"labels are int64 \[1, 2\] for a model with 3 classes"),
        (Labels(), 3, torch.tensor([0, 1]), r"labels are int64 \[2\] for a model with 3 labels.*\[N, 3\]"),
        (Labels(), 3, torch.tensor([[0, 1, -1]]), r"labels from -1 to 1 .*must lie in \[0, 1\], or be -100"),
        (Quantities(), 2, torch.tensor([1.0, 2.0]), r"labels are float32 \[2\] for a model with 2 quantities"),
        (Quantities(), 1, torch.tensor([math.inf]), "labels of quantities are infinite"),
    ],
)
def test_labels_that_do_not_fit_are_refused(meaning: Any, width: int, labels: Tensor, message: str) -> None:
    outputs = Outputs({"": meaning}, {"": width})
    with pytest.raises(ValueError, match=rf"^retrain\(loader\): {message}"):
        outputs.read_labels(labels, len(labels), "retrain(loader)")


# --- who says what an output means
def saying(**attributes: Any) -> nn.Module:
    model = nn.Identity()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def configured(**fields: Any) -> nn.Module:
    return saying(config=SimpleNamespace(**fields))


HOT = torch.tensor([[1, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("model", "width", "labels", "word"),
    [
        (saying(), 3, None, "classes"),
        (saying(), 1, None, "quantities"),
        (saying(), 3, torch.tensor([0, 2]), "classes"),
        (saying(), 3, HOT, "labels"),
        (saying(), 3, HOT.float(), "labels"),
        (saying(), 3, HOT.bool(), "labels"),
        (saying(), 3, torch.tensor([[1, 0, 0], [0, 1, 0]]).float(), "classes"),
        (saying(), 3, torch.tensor([[-3.0, 0.5, 12.0]]), "quantities"),
        (saying(), 1, torch.tensor([0, 1]), "labels"),  # yes or no
        (saying(), 1, torch.tensor([[0.0], [1.0]]), "labels"),
        (saying(), 1, torch.tensor([17, 64]), "quantities"),
        (saying(), 1, torch.tensor([0.0, 0.4]), "quantities"),
        (saying(num_classes=1), 1, torch.tensor([True, False]), "labels"),
        (configured(problem_type=None, num_labels=1), 1, torch.tensor([0.0, 1.0]), "quantities"),  # as transformers
        (configured(problem_type=None, num_labels=1), 1, torch.tensor([0, 1]), "labels"),
        (configured(problem_type=None, num_labels=3), 3, HOT.float(), "labels"),
        (configured(problem_type="multi_label_classification"), 3, None, "labels"),
        (configured(problem_type="multi_label_classification"), 3, torch.tensor([[1, 0, 0]]), "labels"),
        (configured(problem_type="regression"), 1, torch.tensor([0, 1]), "quantities"),
        (configured(problem_type="single_label_classification"), 3, torch.tensor([0, 1]), "classes"),
        (configured(num_labels=0), 3, torch.tensor([0, 1]), "features"),
        (saying(num_classes=0), 3, torch.tensor([0, 1]), "features"),
        (saying(problem_type="regression"), 3, HOT.float(), "quantities"),
        (saying(lfrns_provenance={"output": "labels"}), 3, None, "labels"),
        (saying(lfrns_provenance={"output": ["labels"]}), 3, None, "classes"),  # a file says what nobody knows
    ],
)
def test_the_model_says_what_its_output_means_else_the_labels_do(
    model: nn.Module, width: int, labels: Any, word: str
) -> None:
    assert settle([model], torch.zeros(2, width), [labels], "slim").word == word


@pytest.mark.parametrize(
    ("models", "labels", "message"),
    [
        ([saying(problem_type="ranking")], None, r"problem_type='ranking': it must be one of single_label"),
        ([saying()], torch.tensor([[0.2, 0.9, 0.3]]), r"slim\(loader\): labels are rows of 3 fractions .*Set model"),
        ([saying()], torch.tensor([[2, 0, 5]]), r"slim\(loader\): labels are rows of 3 whole numbers"),
        (
            [saying(problem_type="regression"), configured(problem_type="multi_label_classification")], None,
            r"slim\(Identity, Identity\): the outputs of one model mean labels and those of another quantities",
        ),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused(models: list[nn.Module], labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(models, torch.zeros(1, 3), [labels], "slim")


def test_all_batches_decide_and_not_the_first() -> None:
    one, both = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert settle([nn.Identity()], torch.zeros(1, 3), [one, both], "slim").word == "labels"
    data = TensorDataset(torch.zeros(2, 3), torch.cat([one, both]))
    outputs = settle_by_loader([nn.Identity()], torch.zeros(1, 3), one, DataLoader(data, 1), "retrain")
    assert outputs.word == "labels"


@pytest.mark.parametrize("key", ["labels", "label", "label_ids", "targets", "target"])
def test_labels_of_a_dict_stand_under_any_usual_key(key: str) -> None:
    batch = {"pixel_values": torch.zeros(2, 3), key: torch.tensor([0, 1]), "pixel_mask": torch.ones(2)}
    assert split_batch(batch)[1] is batch[key]
    assert split_batch({"pixel_values": torch.zeros(2, 3)})[1] is None


# --- the figures, by hand or against a slow reference
def average_precision(holds: Tensor, logits: Tensor) -> float:
    """The mean, over the images that have the label, of the share of those ranked no lower that have it."""
    return float(torch.stack([holds[logits >= own].float().mean() for own in logits[holds]]).mean())


@pytest.mark.parametrize("accelerated", [False, True])
def test_labels_that_hold_together_are_scored_label_by_label(accelerated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 3, generator=generator), torch.randint(0, 2, (7, 3), generator=generator).float()
    labels[:, 2] = 0  # no image has the third
    labels[6], labels[0, 0] = -100, -100  # an image that cannot be read, and a label that nobody knows
    accelerator = Accelerator(cpu=True) if accelerated else None
    loader, teacher = given(logits, labels), Given(0.3)
    scores = evaluate(Given(), loader, teacher=teacher, accelerator=accelerator, progress=False)
    known = labels[:6] != -100
    precisions = [100 * average_precision(labels[1:6, 0] > 0, logits[1:6, 0])]
    precisions.append(100 * average_precision(labels[:6, 1] > 0, logits[:6, 1]))
    assert scores["per_label_ap_pct"] == [*map(pytest.approx, precisions), None]
    assert scores["output"] == "labels" and scores["map_pct"] == pytest.approx(sum(precisions) / 2)
    right = ((logits[:6] > 0) == (labels[:6] > 0))[known].float()
    assert scores["label_accuracy_pct"] == pytest.approx(100 * float(right.mean()))
    expected = F.binary_cross_entropy_with_logits(logits[:6][known], labels[:6][known])
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert (scores["images"], scores["images_skipped"]) == (6, 1)
    alike = ((logits[:6] > 0) == (logits[:6] + 0.3 > 0)).float()
    assert scores["agreement_pct"] == pytest.approx(100 * float(alike.mean()))


@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
def test_quantities_are_scored_by_r2_and_mean_absolute_error(shape: tuple[int, ...]) -> None:
    labels = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, squares about it 14
    outputs = torch.tensor([[1.0], [3.0], [3.0], [4.0]])  # squared errors 0, 1, 0, 4
    scores = evaluate(Given(), given(outputs, labels.reshape(shape)), teacher=Given(1.0), progress=False)
    assert scores["r2"] == pytest.approx(1 - 5 / 14) and scores["mae"] == pytest.approx(0.75)
    assert scores["loss"] == pytest.approx(5 / 4)
    variance = float(outputs.var(correction=0))
    assert scores["explained_pct"] == pytest.approx(100 * (1 - 1 / variance), rel=1e-5)
    alone = lfrns.measure(Given(), [outputs[:, :, None, None]], dense=Given(1.0), progress=False)
    assert alone.slim["r2"] is None and alone.slim["explained_pct"] == pytest.approx(scores["explained_pct"])


def test_constant_quantities_have_no_r2_and_unknown_ones_do_not_count() -> None:
    labels = torch.tensor([[1.0, 5.0], [2.0, 5.0], [float("nan"), float("nan")]])
    scores = evaluate(Given(), given(torch.ones(3, 2), labels), progress=False)
    assert scores["per_quantity_r2"] == [pytest.approx(-1.0), None] and scores["per_quantity_mae"] == [0.5, 4.0]
    assert (scores["images"], scores["images_skipped"]) == (2, 1)


def test_models_of_other_widths_or_labels_of_other_form_are_not_compared() -> None:
    loader = given(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels are int64 \[2\] for a model with 3 labels that hold together"):
        evaluate(Given(problem_type="multi_label_classification"), loader, progress=False)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match="one model answers with 3 classes, another with 4"):
        lfrns.measure(Given(), loader, dense=wide, progress=False)


def test_an_answer_without_an_axis_of_outputs_is_one_output_an_image() -> None:
    squeezed = nn.Sequential(nn.Flatten(0))
    outputs = settle([squeezed], torch.zeros(4), [torch.tensor([0, 1, 1, 0])], "slim")
    assert outputs.word == "labels" and outputs.widths == {"": 1}
    scores = evaluate(squeezed, given(torch.tensor([[-1.0], [2.0]]), torch.tensor([0, 1])), progress=False)
    assert scores["label_accuracy_pct"] == 100 and scores["map_pct"] == 100


def test_one_output_that_says_it_is_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slim\(Identity\): it says 'single_label_classification' and has one output"):
        settle([saying(problem_type="single_label_classification")], torch.zeros(2, 1), [], "slim")


def test_outputs_that_are_probabilities_already_are_read_as_such() -> None:
    images, classes, labels = torch.randn(6, 3, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2]), torch.eye(6)[:, :3] + 0
    labels[0, 1] = 1
    for activation, wanted in ((nn.Softmax(1), classes), (nn.Sigmoid(), labels)):
        loader = DataLoader(TensorDataset(images, wanted), 3)
        plain, ended = Given(), nn.Sequential(nn.Flatten(), activation)
        scores = [evaluate(model, loader, progress=False) for model in (plain, ended)]
        assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-4)
        accuracy = "top1_pct" if wanted is classes else "label_accuracy_pct"
        assert scores[1][accuracy] == scores[0][accuracy]
    hidden = nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Unflatten(1, (3, 1)), nn.Flatten())
    assert settle([hidden], probe(hidden, images), [], "slim").word == "labels"
    assert not settle([plain], probe(plain, images), [], "slim").heads[""].probabilities


# --- slim and retrain follow
def test_one_output_is_a_quantity_and_learns_from_the_teacher() -> None:
    dense = lively(Net(1))
    slim = slimmed(dense, BRIGHT, macs=0.4, fold=False).model
    off = lambda: float((slim.eval()(BRIGHT) - dense(BRIGHT)).square().mean().detach())  # noqa: E731
    before = off()
    lfrns.retrain(slim, DataLoader(BRIGHT, 16), teacher=dense, epochs=10, learning_rate=1e-2, progress=False)
    assert off() < 0.5 * before


def test_labels_that_hold_together_are_learned_and_noted(tmp_path: Path) -> None:
    result = slimmed(Net(), BRIGHT, HOLD)
    assert result.model.lfrns_provenance["output"] == "labels" and not hasattr(result.model, "lfrns_outputs")
    loader = DataLoader(TensorDataset(BRIGHT, HOLD.int()), 16)
    seen: list[dict[str, float]] = []
    lfrns.retrain(
        result.model, loader, epochs=30, learning_rate=2e-2, eval_loader=loader, progress=False,
        tracker=lambda values, _: seen.append(values),
    )  # fmt: skip
    scores = [values for values in seen if "eval_map_pct" in values]
    assert scores[-1]["eval_label_accuracy_pct"] > 80 > scores[0]["eval_label_accuracy_pct"]
    lfrns.save(result.model, tmp_path / "slim", base=Net())
    loaded = lfrns.load(tmp_path / "slim", model=Net())
    record = lfrns.measure(loaded, loader, dense=Net(), progress=False)
    assert record.slim["output"] == "labels" and record.slim["map_pct"] > record.dense["map_pct"]
    assert Record.from_json(record.to_json()) == record


def test_the_cost_of_merges_and_the_gates_follow_the_meaning() -> None:
    reports = {}
    for word in ("single_label_classification", "multi_label_classification", "regression"):
        dense = Net()
        dense.problem_type = word
        analysis = lfrns.analyse(dense, [BRIGHT], progress=False)
        reports[word] = analysis.merges["first"].cost[-1]
        assert "output" in analysis.cut(macs=0.7, fcr_steps=1).model.lfrns_provenance
    assert len(set(reports.values())) == 3 and min(reports.values()) > 0


def test_labels_that_do_not_fit_are_refused_before_the_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the analysis began")

    monkeypatch.setattr(sys.modules["lfrns_hub.slim"], "self_check", refuse)
    with pytest.raises(ValueError, match=r"slim\(loader\): labels from 0 to 7 for a model with 3 classes"):
        slimmed(Net(), BRIGHT[:2], torch.tensor([0, 7]))


def test_several_heads_each_mean_what_their_labels_say() -> None:
    heads = {"kind": 3, "signs": 3, "place": 2, "code": 5}
    labels = {"kind": HOLD.sum(1).clamp(max=2), "signs": HOLD, "place": SUM}
    dense = Net(heads=heads).eval()
    result = slimmed(dense, BRIGHT, labels)
    words = {"kind": "classes", "signs": "labels", "place": "quantities", "code": "features"}
    assert result.model.lfrns_provenance["output"] == words

    class Named(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"pixel_values": BRIGHT[index], **{name: value[index] for name, value in labels.items()}}

    loader = DataLoader(Named(), 16)
    before = lfrns.measure(result.model, loader, dense=dense, progress=False)
    lfrns.retrain(
        result.model, loader, teacher=dense, epochs=15, learning_rate=2e-2, distill_weight=0.1, progress=False
    )
    after = lfrns.measure(result.model, loader, dense=dense, progress=False)
    assert after.slim["heads"]["place"]["r2"] > before.slim["heads"]["place"]["r2"]
    assert after.slim["heads"]["signs"]["map_pct"] > before.slim["heads"]["signs"]["map_pct"]
    assert after.slim["heads"]["code"].keys() == {"output", "explained_pct"}
    card = render_card(after, model_name="several", base="Net", library="pytorch")
    assert "| kind: Top-1 |" in card and "| place: R² |" in card and "pipeline_tag" not in card
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    console.print(format_table(after))
    assert "signs mean average precision, %" in console.export_text()


def test_features_are_taught_as_features() -> None:
    dense = lively(Net(8))
    dense.num_classes = 0
    slim = slimmed(dense, BRIGHT, macs=0.4, fcr_steps=0, fold=False).model
    explained = lambda: lfrns.measure(slim, [BRIGHT], dense=dense, progress=False).slim["explained_pct"]  # noqa: E731
    before = explained()
    lfrns.retrain(slim, DataLoader(BRIGHT, 16), teacher=dense, epochs=10, learning_rate=1e-2, progress=False)
    assert 100 - explained() < 0.5 * (100 - before)
    labelled = DataLoader(TensorDataset(BRIGHT, torch.arange(64)), 16)
    with pytest.raises(ValueError, match=r"retrain\(teacher=None\): the model answers with features"):
        lfrns.retrain(slim, labelled, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"retrain\(eval_loader\): the model answers with features"):
        lfrns.retrain(slim, labelled, teacher=dense, eval_loader=labelled, epochs=1, progress=False)


def test_a_teacher_of_another_meaning_is_refused() -> None:
    teacher = Net()
    teacher.problem_type = "regression"
    student = Net()
    student.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"retrain\(Net, Net\): the outputs of one model mean labels"):
        lfrns.retrain(student, DataLoader(BRIGHT, 16), teacher=teacher, epochs=1, progress=False)


def test_labels_and_teacher_are_mixed_as_their_meaning_has_it() -> None:
    parts, labels = (torch.randn(4, 3), torch.randn(4, 3)), torch.randint(0, 2, (4, 3)).float()
    outputs = Outputs({"": Labels()}, {"": 3})
    answer, taught = (read_answer(nn.Identity(), part, outputs) for part in parts)
    hard, soft = Labels().task_loss(parts[0], labels), Labels().distillation_loss(*parts, 2.0)
    torch.testing.assert_close(mixed_loss(answer, {"": labels}, taught, 0.0, 0.25, 2.0), 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(mixed_loss(answer, {"": None}, taught, 0.0, 0.25, 2.0), soft)
    kinds = Outputs({"a": Features(), "b": Quantities()}, {"a": 3, "b": 3})
    answer, taught = (read_answer(nn.Identity(), {"a": part, "b": part}, kinds) for part in parts)
    both = Features().distillation_loss(*parts, 2.0) + F.mse_loss(*parts)
    torch.testing.assert_close(mixed_loss(answer, {"a": None, "b": None}, taught, 0.0, 0.5, 2.0), both)


# --- what others read of it
def test_a_saved_folder_tells_transformers_what_the_outputs_mean(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    images, labels = torch.randn(4, 3, 160, 160), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
    timm_model = slimmed(timm.create_model("test_vit", num_classes=3), images, labels, fcr_steps=0).model
    lfrns.save(timm_model, tmp_path / "timm")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    vit = ViTForImageClassification(config)
    slim = slimmed(vit, images[..., :16, :16], labels, fcr_steps=0).model
    assert vit.config.problem_type is None and slim.config.problem_type == "multi_label_classification"
    slim.save_pretrained(tmp_path / "transformers")
    for name in ("timm", "transformers"):
        config = AutoModelForImageClassification.from_pretrained(tmp_path / name).config
        assert config.problem_type == "multi_label_classification", name
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["slim"]["output"] == "labels"


@pytest.mark.parametrize(
    ("scores", "rows", "metrics", "tag"),
    [
        (
            {"output": "labels", "map_pct": 61.234, "label_accuracy_pct": 90.0, "agreement_pct": 95.5,
             "worst_class": {"class": 1, "dense_pct": 70.0, "slim_pct": 60.0, "drop_points": 10.0}},
            ["| Mean average precision | 61.23 % | 61.23 % | +0.00 points |", "| Labels right | 90.00 % |",
             "| Label that lost most: dog | 70.00 % | 60.00 % | -10.00 points |",
             "| Agreement with dense |  | 95.50 % |"],
            {"mean_average_precision": 61.23, "accuracy": 90.0}, "image-classification",
        ),
        (
            {"output": "quantities", "r2": 0.81234, "mae": 3.14159, "explained_pct": 97.0},
            ["| R² | 0.812 | 0.812 | +0.000 |", "| Mean absolute error | 3.142 | 3.142 |",
             "| Variance of the dense answers explained |  | 97.00 % |"],
            {"r_squared": 0.812, "mae": 3.142}, None,
        ),
    ],
)  # fmt: skip
def test_the_card_has_the_figures_that_fit(scores: dict, rows: list[str], metrics: dict, tag: str | None) -> None:
    record = {"dense": scores, "slim": scores, "setup": {"label_names": ["cat", "dog"], "dataset": "pets"}}
    card = render_card(record, model_name="net", base="Net")
    for row in rows:
        assert row in card
    import yaml

    header = yaml.safe_load(card.split("---")[1])
    assert header.get("pipeline_tag") == tag and header["metrics"] == list(metrics)
    found = header["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in found} == metrics
    assert "top-1" not in card.lower() and "was not measured: measure it on your data" not in card


def test_chance_is_asked_of_classes_alone() -> None:
    loader = DataLoader(TensorDataset(BRIGHT, HOLD.float()), 16)
    assert guard_against_chance(Net(), loader, "DIR") is None
    regression = Net(1)
    regression.problem_type = "regression"
    assert guard_against_chance(regression, DataLoader(TensorDataset(BRIGHT, SUM[:, 0]), 16), "DIR") is None


# --- several processes
class Rows(torch.utils.data.IterableDataset):
    """Rows of outputs and labels as a stream, of which the first four alone look like one-hot classes."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(16, 3, generator=generator)
        labels = torch.cat(
            [F.one_hot(torch.tensor([0, 1, 2, 0]), 3), torch.randint(0, 2, (12, 3), generator=generator)]
        )
        return zip(outputs[:, :, None, None], labels, strict=True)


def scored(processes: int) -> list[dict[str, Any]]:
    accelerator = make_accelerator() if processes > 1 else None
    labels, numbers = (
        torch.stack(rows) for rows in zip(*((label, output.flatten()) for output, label in Rows()), strict=True)
    )
    loaders = [given(numbers, labels, 4 // processes)]
    loaders.append(given(numbers[:15, :1], numbers[:15, 1], 4 // processes))
    loaders += [DataLoader(Rows(), 4)] if processes > 1 else []
    return [
        evaluate(Given(), loader, teacher=Given(0.3), accelerator=accelerator, progress=False) for loader in loaders
    ]


def score_in_a_process(rank: int, folder: Path) -> None:
    """In each of two processes: score, and leave the figures."""
    (folder / f"{rank}.json").write_text(json.dumps(scored(2)))


def test_two_processes_score_what_one_does(tmp_path: Path, free_port: str) -> None:
    assert end(start(score_in_a_process, tmp_path, processes=2, port=free_port), seconds=120) == [0, 0]
    alone = scored(1)
    assert [one["output"] for one in alone[:2]] == ["labels", "quantities"]
    for rank in (0, 1):
        together = json.loads((tmp_path / f"{rank}.json").read_text())
        for one, other in zip(alone[:2], together[:2], strict=True):
            assert one == {key: pytest.approx(value) if key != "output" else value for key, value in other.items()}
        assert together[2]["output"] == "labels"  # one process begins with the rows that look like classes
