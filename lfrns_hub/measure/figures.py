"""Figures of each kind of output: the data kept of every batch, the scores, the comparison of slim with dense.

N images, K outputs of one head.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lfrns_hub.model_io.meaning import Classes, Features, Labels, Meaning, Quantities


@dataclass(frozen=True)
class Figure:
    """One figure of a head, as tables and cards show it.

    Attributes:
        key: Its key in a record.
        label: Its label in the table on the terminal.
        title: Its title in a card.
        form: Format of its digits.
        unit: Unit after the number in a card.
        change: How slim compares with dense: "points", "difference", or "" for a figure of the slim model only.
        metric: Name of the metric in the Hub's model-index; "" for a figure that has none.
    """

    key: str
    label: str
    title: str
    form: str
    unit: str = ""
    change: str = ""
    metric: str = ""


AGREEMENT = Figure("agreement_pct", "agreement with dense, %", "Agreement with dense", ".2f", " %")
EXPLAINED = Figure(
    "explained_pct", "dense answers explained, %", "Variance of the dense answers explained", ".2f", " %"
)
FEATURES_EXPLAINED = Figure(
    "explained_pct", "dense features explained, %", "Variance of the dense features explained", ".2f", " %"
)


class Kind(ABC):
    """Scoring of outputs of one meaning.

    Attributes:
        figures: The figures that are shown, the most important first.
        worst: Key of the figures by class or label whose largest loss is reported; "" for none.
        task: The Hub's name of the task.
    """

    figures: tuple[Figure, ...] = ()
    worst: str = ""
    task: str | None = None

    @abstractmethod
    def of_batch(self, meaning: Any, part: Tensor, dense: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the data kept of one batch, each [N, ...].

        Args:
            meaning: Meaning of the head.
            part: Its outputs [N, K].
            dense: Outputs of the model to compare with.
            labels: As returned by `Outputs.read_labels`.
        """

    @abstractmethod
    def scores(self, meaning: Any, kept: dict[str, Tensor], labels: Tensor | None, width: int) -> dict[str, Any]:
        """Return the figures of one model, from the data kept of all images."""

    @abstractmethod
    def compared(self, slim: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
        """Return the figures of a slim model that need a dense one."""

    def labels_of_batch(self, labels: Tensor) -> Tensor:
        """Return the labels to keep of a batch."""
        return labels


class ClassFigures(Kind):
    """Figures of classes: top-1, also by class."""

    figures = (Figure("top1_pct", "top-1, %", "Top-1", ".2f", " %", "points", "accuracy"), AGREEMENT)
    worst, task = "per_class_pct", "image-classification"

    def of_batch(self, meaning: Classes, part: Tensor, dense: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the predicted class of each image and the cross-entropy."""
        logits = part.float()
        return {"predicted": logits.argmax(1), "loss": F.cross_entropy(logits, labels, reduction="none")}

    def labels_of_batch(self, labels: Tensor) -> Tensor:
        """Return class labels; for probabilities, the most likely class."""
        return labels if labels.ndim == 1 else labels.argmax(1).masked_fill(labels.sum(1) == 0, -100)

    def scores(self, meaning: Classes, kept: dict[str, Tensor], labels: Tensor | None, width: int) -> dict[str, Any]:
        """Count correct predictions, over all images and by class."""
        known = meaning.known(labels)
        labels, right = labels[known], (kept["predicted"] == labels)[known]
        counts, hits = labels.bincount(minlength=width).tolist(), labels[right].bincount(minlength=width).tolist()
        return {
            "top1_pct": percent(right),
            "loss": kept["loss"][known].double().mean().item(),
            "per_class_pct": [100 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)],
            "class_counts": counts,
        }

    def compared(self, slim: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
        """Count the images for which both predict the same class."""
        return {"agreement_pct": percent(slim["predicted"] == dense["predicted"])}


class LabelFigures(Kind):
    """Figures of multi-label classes: mean average precision and accuracy of single labels."""

    figures = (
        Figure("map_pct", "mean average precision, %", "Mean average precision", ".2f", " %", "points",
               "mean_average_precision"),
        Figure("label_accuracy_pct", "labels right, %", "Labels right", ".2f", " %", "points", "accuracy"),
        AGREEMENT,
    )  # fmt: skip
    worst, task = "per_label_ap_pct", "image-classification"

    def of_batch(self, meaning: Labels, part: Tensor, dense: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the logits: average precision ranks all images."""
        return {"logits": part.float()}

    def scores(self, meaning: Labels, kept: dict[str, Tensor], labels: Tensor | None, width: int) -> dict[str, Any]:
        """Rank the images by each label; a label without images has no average precision."""
        logits, known, holds = kept["logits"], meaning.known(labels), labels > 0.5
        precisions = [_average_precision(holds[k, i], logits[k, i]) for i, k in enumerate(known.T)]
        return {
            "map_pct": _mean(precisions),
            "label_accuracy_pct": percent(((logits > 0) == holds)[known]),
            "loss": meaning.task_loss(logits.double(), labels).item(),
            "per_label_ap_pct": precisions,
            "label_counts": (holds & known).sum(0).tolist(),
        }

    def compared(self, slim: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
        """Count the single labels on which both agree."""
        return {"agreement_pct": percent(((slim["logits"] > 0) == (dense["logits"] > 0)).flatten())}


class QuantityFigures(Kind):
    """Figures of quantities: R2 and mean absolute error, and the explained share of the dense model's variance."""

    figures = (
        Figure("r2", "R2", "R²", ".3f", "", "difference", "r_squared"),
        Figure("mae", "mean absolute error", "Mean absolute error", ".4g", "", "difference", "mae"),
        EXPLAINED,
    )
    task = None  # the Hub has no name for it

    def of_batch(self, meaning: Quantities, part: Tensor, dense: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the outputs."""
        return {"values": part}

    def scores(self, meaning: Quantities, kept: dict[str, Tensor], labels: Tensor | None, width: int) -> dict[str, Any]:
        """Compare with the labels, quantity by quantity; R2 needs labels that differ."""
        names = ("r2", "mae", "loss", "per_quantity_r2", "per_quantity_mae")
        if labels is None:
            return dict.fromkeys(names)
        pairs = [(labels[k, i].double(), kept["values"][k, i].double()) for i, k in enumerate(meaning.known(labels).T)]
        r2 = [_r2(wanted, got) for wanted, got in pairs]
        mae = [float((wanted - got).abs().mean()) if len(wanted) else None for wanted, got in pairs]
        loss = meaning.task_loss(kept["values"].double(), labels).item()
        return dict(zip(names, (_mean(r2), _mean(mae), loss, r2, mae), strict=True))

    def compared(self, slim: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
        """Return the share of the dense outputs' variance that the slim ones explain, the mean over the quantities."""
        pairs = zip(dense["values"].double().T, slim["values"].double().T, strict=True)
        explained = _mean([_r2(wanted, got) for wanted, got in pairs])
        return {"explained_pct": None if explained is None else 100 * explained}


class FeatureFigures(Kind):
    """Figures of features: the explained share of the dense model's variance."""

    figures = (FEATURES_EXPLAINED,)
    task = "image-feature-extraction"

    def of_batch(self, meaning: Features, part: Tensor, dense: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return each image's relative error."""
        return {"error": meaning.relative_error(part, dense)}

    def scores(self, meaning: Features, kept: dict[str, Tensor], labels: Tensor | None, width: int) -> dict[str, Any]:
        """Return nothing: features have no labels."""
        return {}

    def compared(self, slim: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
        """Return one minus the mean relative error, in percent."""
        return {"explained_pct": 100 * (1 - slim["error"].double().mean().item())}


KINDS: dict[str, Kind] = {
    Classes.name: ClassFigures(),
    Labels.name: LabelFigures(),
    Quantities.name: QuantityFigures(),
    Features.name: FeatureFigures(),
}


def kind_of(meaning: Meaning) -> Kind:
    """Return the scoring of a meaning's outputs."""
    return KINDS[meaning.name]


def word_of(scores: dict[str, Any]) -> str:
    """Return the meaning of the outputs of a record's side; older records show it only by their keys."""
    word = scores.get("output")
    return word if isinstance(word, str) and word in KINDS else "features" if "explained_pct" in scores else "classes"


def main_figure(scores: dict[str, Any]) -> Figure:
    """Return the figure shown in a table or plot of several models."""
    return KINDS[word_of(scores)].figures[0]


def nearness(scores: dict[str, Any]) -> Figure:
    """Return the figure for how near a slim model is to its dense one."""
    return KINDS[word_of(scores)].figures[-1]


def heads_of(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of each head by its name, "" for the only one."""
    return scores["heads"] if isinstance(scores.get("heads"), dict) else {"": scores}


def main_figures(scores: dict[str, Any]) -> list[tuple[str, Figure, float]]:
    """Return the figures of a model that are based on labels: the head, the figure, its value."""
    return [
        (head, figure, of_head[figure.key])
        for head, of_head in heads_of(scores).items()
        for figure in KINDS[word_of(of_head)].figures
        if figure.metric and of_head.get(figure.key) is not None
    ]


def worst(dense: list[float | None], slim: list[float | None]) -> dict[str, Any] | None:
    """Return the class or label that lost most; the first of equals, None where none was scored."""
    pairs = zip(dense, slim, strict=True)
    drops = [(before - after, -i) for i, (before, after) in enumerate(pairs) if None not in (before, after)]
    if not drops:
        return None
    drop, place = max(drops)
    return {"class": -place, "dense_pct": dense[-place], "slim_pct": slim[-place], "drop_points": drop}


def percent(right: Tensor) -> float:
    """Return the share of true entries in percent."""
    return 100 * int(right.sum()) / len(right)


def _average_precision(holds: Tensor, logits: Tensor) -> float | None:
    """Return the average precision of one label in percent, None where no image has it."""
    from sklearn.metrics import average_precision_score  # imported here: slow

    return 100 * float(average_precision_score(holds.numpy(), logits.numpy())) if holds.any() else None


def _r2(wanted: Tensor, got: Tensor) -> float | None:
    """Return the share of the variance that is explained, None where there is no variance."""
    from sklearn.metrics import r2_score  # imported here: slow

    return float(r2_score(wanted.numpy(), got.numpy())) if len(wanted) > 1 and wanted.var() > 0 else None


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of the measured values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
