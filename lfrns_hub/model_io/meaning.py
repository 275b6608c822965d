"""Meaning of an output: classes, multi-label classes, quantities or features. No other file defines it.

Comparison, distillation and scoring depend on a `Meaning`: the calibration loss, the gates, retraining, the scores.

N images, K outputs of one head.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfrns_hub.model_io.batches import UNREADABLE

CALIBRATED_BY = 256  # images whose outputs determine the variance of a quantity


class Meaning(ABC):
    """Meaning of one head's outputs [N, K].

    Attributes:
        name: Its name in records and provenance.
    """

    name: ClassVar[str]

    def read_outputs(self, outputs: Tensor) -> Tensor:
        """Return outputs in the form that all methods expect: logits, or the numbers themselves."""
        return outputs

    @abstractmethod
    def divergence(self, got: Tensor, dense: Tensor) -> Tensor:
        """Return the divergence of outputs from the dense model's, summed over the images."""

    @abstractmethod
    def drawn_loss(self, got: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random loss whose expected squared gradient is the curvature of `divergence`."""

    @abstractmethod
    def distillation_loss(self, got: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Return the training loss towards a teacher's outputs, the mean over the images."""


class Labelled(Meaning):
    """Meaning of outputs that can have labels."""

    @abstractmethod
    def read_labels(self, labels: Tensor, width: int) -> Tensor:
        """Convert labels to the form of the losses; labels in that form are unchanged.

        Args:
            labels: Labels of any dtype.
            width: K.
        Raises:
            ValueError: The labels do not fit such outputs.
        """

    @abstractmethod
    def known(self, labels: Tensor) -> Tensor:
        """Return which labels are known, in the labels' own shape, bool: not those of an unreadable image."""

    @abstractmethod
    def surprise(self, got: Tensor, labels: Tensor) -> Tensor:
        """Return minus the log-likelihood of labels, in the unit of `divergence`, summed over the images."""

    @abstractmethod
    def task_loss(self, got: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the training loss on labels, the mean over known labels."""


@dataclass(frozen=True)
class Classes(Labelled):
    """Logits of classes, one of which is true: softmax.

    Attributes:
        probabilities: Whether the model ends with the softmax itself.
    """

    name: ClassVar[str] = "classes"
    probabilities: bool = False

    def read_outputs(self, outputs: Tensor) -> Tensor:
        """Return logits: for probabilities, their logarithms."""
        return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log() if self.probabilities else outputs

    def divergence(self, got: Tensor, dense: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence, in nats."""
        return F.kl_div(got.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)

    def drawn_loss(self, got: Tensor, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy to labels drawn from the model's own distribution: Fisher information."""
        drawn = torch.multinomial(got.detach().softmax(-1).cpu(), 1, generator=generator).flatten().to(got.device)
        return F.cross_entropy(got, drawn, reduction="sum")

    def read_labels(self, labels: Tensor, width: int) -> Tensor:
        """Return class numbers [N], int64, UNREADABLE for unknown ones; probabilities [N, K] are kept."""
        if labels.shape[1:] == (width,) and width > 1:
            return _read_distributions(labels, width)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.flatten()
        if labels.ndim != 1 or (labels.dtype == torch.bool and width != 2) or not _all_whole(labels):
            raise ValueError(
                f"labels are {_kind(labels)} for a model with {width} classes: class numbers [N] or one-hot rows "
                f"[N, {width}] are needed. {SAY_IT}"
            )
        labels = labels.long()
        known = (labels == UNREADABLE) | ((labels >= 0) & (labels < width))
        if not known.all():  # a single wait for the device
            labels = labels[labels != UNREADABLE]
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())} for a model with {width} classes: a label "
                f"must lie in [0, {width}). Give the model a head that fits the data."
            )
        return labels

    def known(self, labels: Tensor) -> Tensor:
        """Return which class numbers, or rows of probabilities, are known, [N]."""
        return labels != UNREADABLE if labels.ndim == 1 else labels.sum(1) > 0

    def surprise(self, got: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, in nats."""
        return F.cross_entropy(got, _like(labels, got), reduction="sum")

    def task_loss(self, got: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(got, _like(labels, got), label_smoothing=label_smoothing)

    def distillation_loss(self, got: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Return the divergence of softened classes, Hinton et al. 2015, section 2."""
        student, target = F.log_softmax(got / temperature, dim=1), F.log_softmax(taught / temperature, dim=1)
        # The gradients of softened logits shrink with the temperature squared.
        return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Labels(Labelled):
    """Logits of multi-label classes, independent of each other: sigmoid. A single output is a yes or no.

    Attributes:
        probabilities: Whether the model ends with the sigmoid itself.
    """

    name: ClassVar[str] = "labels"
    probabilities: bool = False

    def read_outputs(self, outputs: Tensor) -> Tensor:
        """Return logits, also for probabilities."""
        return outputs.logit(eps=1e-6) if self.probabilities else outputs

    def divergence(self, got: Tensor, dense: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence, in nats, the sum over independent labels."""
        return _bernoulli_divergence(got, dense).sum()

    def drawn_loss(self, got: Tensor, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy to labels drawn from the model's own distribution: Fisher information."""
        drawn = torch.bernoulli(got.detach().sigmoid().cpu(), generator=generator).to(got)
        return F.binary_cross_entropy_with_logits(got, drawn, reduction="sum")

    def read_labels(self, labels: Tensor, width: int) -> Tensor:
        """Return the probability of each label, mostly 0 or 1, UNREADABLE where it is not known: [N, K], float."""
        labels = _as_rows(labels, width, f"with {width} labels that hold together: 0 or 1 for each is")
        known = labels[labels != UNREADABLE]
        if not ((known >= 0) & (known <= 1)).all():
            raise ValueError(
                f"labels from {float(known.min()):g} to {float(known.max()):g} for a model whose {width} labels hold "
                f"together: each must lie in [0, 1], or be {UNREADABLE} where it is not known. {SAY_IT}"
            )
        return labels

    def known(self, labels: Tensor) -> Tensor:
        """Return which labels are known, [N, K]."""
        return labels != UNREADABLE

    def surprise(self, got: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, in nats, the sum over the labels."""
        return self._cross_entropy(got, labels).sum()

    def task_loss(self, got: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy over images and labels; smoothing moves each label towards 1/2."""
        labels = torch.where(self.known(labels), labels * (1 - label_smoothing) + label_smoothing / 2, labels)
        return self._cross_entropy(got, labels).sum() / self.known(labels).sum().clamp(min=1)

    def distillation_loss(self, got: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Return the divergence of softened labels, the mean over images and labels as in `task_loss`."""
        return temperature**2 * _bernoulli_divergence(got / temperature, taught / temperature).mean()

    def _cross_entropy(self, got: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each label, [N, K], 0 where it is not known."""
        known, labels = self.known(labels).to(got.device), labels.to(got)
        return F.binary_cross_entropy_with_logits(got, labels.clamp(min=0), reduction="none") * known


@dataclass(frozen=True)
class Quantities(Labelled):
    """Numbers that are predicted directly: regression.

    Attributes:
        variance: Variance of each quantity in the dense model's outputs, K numbers; None: computed from each batch.
    """

    name: ClassVar[str] = "quantities"
    variance: tuple[float, ...] | None = None

    def calibrated(self, dense: Tensor) -> "Quantities":
        """Return a copy with the variance of the dense model's outputs [N, K]."""
        return Quantities(tuple(_variance(dense.double(), 0).tolist()))

    def divergence(self, got: Tensor, dense: Tensor) -> Tensor:
        """Return half the squared error over the dense model's variance, the sum over the quantities."""
        return 0.5 * ((got - dense).square() / self._scale(dense)).sum()

    def drawn_loss(self, got: Tensor, generator: torch.Generator) -> Tensor:
        """Return the outputs' product with normal noise, on the scale of their errors: Gauss-Newton."""
        noise = torch.randn(got.shape, generator=generator).to(got)
        return (noise * got / self._scale(got.detach()).sqrt()).sum()

    def read_labels(self, labels: Tensor, width: int) -> Tensor:
        """Return the quantities [N, K], float, NaN for unknown ones."""
        unread = labels == UNREADABLE if not labels.is_floating_point() else torch.zeros_like(labels, dtype=torch.bool)
        rows = _as_rows(labels, width, f"with {width} quantities: a number for each is")
        rows = rows.masked_fill(unread.reshape(rows.shape), float("nan"))
        if rows.isinf().any():
            raise ValueError(
                "labels of quantities are infinite: finite numbers are needed. Set what is unknown to NaN."
            )
        return rows

    def known(self, labels: Tensor) -> Tensor:
        """Return which quantities are known, [N, K]."""
        return ~labels.isnan()

    def surprise(self, got: Tensor, labels: Tensor) -> Tensor:
        """Return half the squared error over the dense model's variance, the sum over the quantities."""
        return 0.5 * (self._squares(got, labels) / self._scale(got.detach())).sum()

    def task_loss(self, got: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean squared error.

        Raises:
            ValueError: Label smoothing is requested.
        """
        if label_smoothing:
            raise ValueError(
                f"label_smoothing={label_smoothing:g}: quantities have no probability that could be smoothed. Pass 0."
            )
        return self._squares(got, labels).sum() / self.known(labels).sum().clamp(min=1)

    def distillation_loss(self, got: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Return the mean squared error; the temperature has no effect."""
        return F.mse_loss(got, taught)

    def _squares(self, got: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of each quantity, [N, K], 0 where it is not known."""
        labels = labels.to(got)
        return (got - torch.where(labels.isnan(), got.detach(), labels)).square()

    def _scale(self, dense: Tensor) -> Tensor:
        """Return the variance by which errors are scaled, [K]."""
        return _variance(dense, 0) if self.variance is None else torch.tensor(self.variance).to(dense)


@dataclass(frozen=True)
class Features(Meaning):
    """A tensor of unnamed numbers, [N, f]: maps, tokens, embeddings. It has no labels."""

    name: ClassVar[str] = "features"

    def relative_error(self, got: Tensor, dense: Tensor) -> Tensor:
        """Return the squared error over the variance of the dense model's features, [N]; a constant output has 1."""
        return (got - dense).square().mean(1) / _variance(dense)

    def divergence(self, got: Tensor, dense: Tensor) -> Tensor:
        """Return half the relative error."""
        return 0.5 * self.relative_error(got, dense).sum()

    def drawn_loss(self, got: Tensor, generator: torch.Generator) -> Tensor:
        """Return the features' product with normal noise, on the scale of their errors: Gauss-Newton."""
        noise = torch.randn(got.shape, generator=generator).to(got)
        return (noise * got).sum() / (got.shape[1] * _variance(got.detach())).sqrt()

    def distillation_loss(self, got: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Return the mean relative error; the temperature has no effect."""
        return self.relative_error(got, taught).mean()


# transformers' names (`config.problem_type`), and one for the meaning without such a name.
PROBLEMS: dict[str, Meaning] = {
    "single_label_classification": Classes(),
    "multi_label_classification": Labels(),
    "regression": Quantities(),
    "feature_extraction": Features(),
}
MEANINGS = {meaning.name: meaning for meaning in PROBLEMS.values()}
SAY_IT = f"If the outputs mean something else, set model.problem_type to {', '.join(map(repr, PROBLEMS))}."


@dataclass(frozen=True)
class LabelForm:
    """Form of labels: properties of all labels examined.

    Attributes:
        single: One value per image, [N] or [N, 1], instead of a row [N, K].
        whole: Integer dtype, or bool.
        binary: Only 0 and 1.
        fraction: No values outside [0, 1].
        one_of: Rows that add up to 1.
    """

    single: bool
    whole: bool
    binary: bool
    fraction: bool
    one_of: bool

    @classmethod
    def of(cls, labels: Tensor) -> "LabelForm":
        """Examine labels [N] or [N, K]; unknown labels are ignored."""
        single, whole = labels.ndim < 2 or labels.shape[1:] == (1,), not labels.is_floating_point()
        rows = (labels.flatten()[:, None] if single else labels.flatten(1)).double()
        rows = rows[((rows != UNREADABLE) & ~rows.isnan()).all(1)]
        fraction = bool(((rows >= 0) & (rows <= 1)).all())
        one_of = fraction and bool(((rows.sum(1) - 1).abs() < 1e-3).all())
        return cls(single, whole, bool(((rows == 0) | (rows == 1)).all()), fraction, one_of)

    def __and__(self, other: "LabelForm") -> "LabelForm":
        """Return the properties that both have."""
        return LabelForm(*(a and b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def meaning(self, width: int, sure_of_quantity: bool) -> Meaning:
        """Return the meaning of outputs that only the labels show.

        Args:
            width: K.
            sure_of_quantity: Whether one output with fractional labels counts as a quantity, as in transformers.
        Raises:
            ValueError: The labels are ambiguous, or cannot be read.
        """
        if self.single:
            if width > 1:
                return Classes()
            return Labels() if self.binary and (self.whole or not sure_of_quantity) else Quantities()
        if self.one_of:
            return Classes()
        if self.binary:
            return Labels()
        if self.fraction or self.whole:
            raise ValueError(
                f"labels are rows of {width} {'whole numbers' if self.whole else 'fractions that do not add up to 1'}: "
                "they can be quantities, or something else. Set model.problem_type to 'regression' or "
                "'multi_label_classification'."
            )
        return Quantities()


def said_meaning(model: nn.Module) -> Mapping[str, Meaning] | Meaning | None:
    """Return the meaning that a model states for its outputs, by name if several; None if it states none.

    It is stated by `model.problem_type`, by its transformers configuration, by 0 outputs of a backbone's head, or by
    the provenance from `slim`.

    Raises:
        ValueError: It states an unknown word.
    """
    word = getattr(model, "problem_type", None) or getattr(getattr(model, "config", None), "problem_type", None)
    if word is not None:
        words = dict(word) if isinstance(word, Mapping) else {"": word}
        for one in words.values():
            if one not in PROBLEMS:
                raise ValueError(f"problem_type={one!r}: it must be one of {', '.join(PROBLEMS)}, or of each output.")
        return {name: PROBLEMS[one] for name, one in words.items()} if isinstance(word, Mapping) else PROBLEMS[word]
    if getattr(model, "num_classes", None) == 0 or getattr(getattr(model, "config", None), "num_labels", None) == 0:
        return Features()
    noted = (getattr(model, "lfrns_provenance", None) or {}).get("output")  # from a file, and so untrusted
    if isinstance(noted, Mapping):
        return {str(name): MEANINGS[word] for name, word in noted.items() if word in MEANINGS} or None
    return MEANINGS.get(noted) if isinstance(noted, str) else None


# Names of autograd nodes, between an activation and the output, that do not change values.
_PASSED = re.compile(r"_?(View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|ToCopy|Alias|Clone|Slice|DDPSink)Backward\d?")


def activation_of(outputs: Tensor) -> str | None:
    """Return "softmax" or "sigmoid" where a model ends with it, by the outputs' own graph; None without either."""
    node = outputs.grad_fn
    while node is not None and _PASSED.fullmatch(node.name()) and node.next_functions:
        node = node.next_functions[0][0]
    name = "" if node is None else node.name()
    return next((word for word in ("softmax", "sigmoid") if name.lower().startswith(f"{word}backward")), None)


def problem_type_of(model: nn.Module) -> str | None:
    """Return transformers' name for the stated meaning of a model's single head, for its configuration, or None.

    A pipeline uses it to apply softmax, sigmoid or nothing.
    """
    said = said_meaning(model)
    words = {meaning.name: word for word, meaning in PROBLEMS.items() if isinstance(meaning, Labelled)}
    return words.get(said.name) if isinstance(said, Meaning) else None


def _read_distributions(labels: Tensor, width: int) -> Tensor:
    """Read rows [N, K] of class probabilities; return class numbers if each row has only one class."""
    unread = (labels == UNREADABLE).all(1)
    rows = _as_float(labels).masked_fill(unread[:, None], 0)
    likely = ((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() < 1e-3)) | (rows == 0).all(1) & unread
    if not likely.all():
        raise ValueError(
            f"labels are {_kind(labels)} and a row of them adds up to {float(rows[~likely][0].sum()):g}: of {width} "
            f"classes one holds, or probabilities add up to 1. {SAY_IT}"
        )
    if ((rows == 0) | (rows == 1)).all():
        return rows.argmax(1).masked_fill(unread, UNREADABLE)
    return rows


def _as_rows(labels: Tensor, width: int, wanted: str) -> Tensor:
    """Return labels as rows [N, K] of floating-point numbers."""
    if width == 1 and labels.ndim == 1:
        labels = labels[:, None]
    if labels.shape[1:] != (width,):
        raise ValueError(f"labels are {_kind(labels)} for a model {wanted} needed, [N, {width}]. {SAY_IT}")
    return _as_float(labels)


def _as_float(labels: Tensor) -> Tensor:
    """Return labels in float32, or in float64 if they are float64."""
    return labels if labels.dtype == torch.float64 else labels.float()


def _bernoulli_divergence(got: Tensor, dense: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of independent labels, from logits."""
    likely = dense.sigmoid()
    return F.binary_cross_entropy_with_logits(got, likely, reduction="none") - F.binary_cross_entropy_with_logits(
        dense, likely, reduction="none"
    )


def _variance(values: Tensor, dim: int | None = None) -> Tensor:
    """Return the variance, of all values or along one axis, positive even for constant values."""
    if dim is None:
        spread, mean_square = values.var(correction=0), values.square().mean()
    else:
        spread, mean_square = values.var(dim, correction=0), values.square().mean(dim)
    return torch.maximum(spread, 1e-6 * mean_square + 1e-12)


def _all_whole(labels: Tensor) -> bool:
    """Return whether labels are whole numbers, of any dtype."""
    return not labels.is_floating_point() or bool((labels == labels.round()).all())


def _like(labels: Tensor, got: Tensor) -> Tensor:
    """Return labels on the outputs' device, probabilities in their dtype."""
    return labels.to(got) if labels.is_floating_point() else labels.to(got.device)


def _kind(labels: Tensor) -> str:
    """Describe labels for an error."""
    return f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
