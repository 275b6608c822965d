"""A model's answers, read by their meaning, and the divergence of two answers.

N images, K outputs of one head, f features of one tensor.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lfrns_hub.format.untrusted import short
from lfrns_hub.model_io.batches import find_logits, named_tensors, read_rows, split_batch
from lfrns_hub.model_io.meaning import (
    CALIBRATED_BY,
    SAY_IT,
    Classes,
    Features,
    LabelForm,
    Labelled,
    Labels,
    Meaning,
    Quantities,
    activation_of,
    said_meaning,
)
from lfrns_hub.model_io.model import as_input, differentiated
from lfrns_hub.runs.processes import ALONE, Processes

# A fixed random choice represents a feature map: a backbone's maps of a few hundred images are gigabytes.
FEATURES_READ = 4096
IMAGES_SEEN = 64  # of a dataset, to determine the form of the labels


@dataclass(frozen=True)
class Outputs:
    """Meaning of each head of a model; `settle` determines it.

    Attributes:
        heads: Meanings by name. A single head with labels is named "".
        widths: Number of outputs of each head, K.
        sure: Whether the model or the labels state it, rather than only the shape.
    """

    heads: dict[str, Meaning]
    widths: dict[str, int]
    sure: bool = True

    @property
    def are_features(self) -> bool:
        """Whether no head has labels."""
        return not any(isinstance(meaning, Labelled) for meaning in self.heads.values())

    @property
    def word(self) -> str | dict[str, str]:
        """The name in records and provenance: one word, or with several heads one for each."""
        names = {name: meaning.name for name, meaning in self.heads.items()}
        return names if len(names) > 1 and not self.are_features else next(iter(names.values()))

    def parts(self, output: Any) -> tuple[Tensor, ...]:
        """Return each head's tensor of an output, [N, K]."""
        if list(self.heads) == [""] and not self.are_features:
            logits = find_logits(output)
            if logits is None:
                # In training mode a model may add outputs of other shapes after its evaluation output.
                logits = next(iter(read_rows(output).values()))
            rows = {"": logits}
        else:
            rows = read_rows(output)
        missing = [name for name in self.heads if name not in rows]
        if missing:
            raise ValueError(
                f"the model answers with {', '.join(map(repr, rows))}, without {missing[0]!r}: answer with the same "
                "heads in training and in evaluation."
            )
        return tuple(rows[name] for name in self.heads)

    def read_labels(self, labels: Any, images: int, call: str) -> dict[str, Tensor | None]:
        """Convert the labels of a batch to the form of each head's losses; None for a head without labels.

        Raises:
            ValueError: The labels do not fit these outputs, or their number differs from the images'.
        """
        shared = share_out(labels, list(self.heads))
        read: dict[str, Tensor | None] = {}
        for name, meaning in self.heads.items():
            value = shared[name] if isinstance(meaning, Labelled) else None
            if value is not None:
                if value.ndim == 0 or len(value) != images:
                    given = len(value) if value.ndim else "a single one of its"
                    raise ValueError(
                        f"{call}: a batch has {images} images and {given} labels. Give one label an image."
                    )
                try:
                    value = meaning.read_labels(value, self.widths[name])
                except ValueError as error:
                    raise ValueError(f"{call}: {f'{name}: ' if name else ''}{error}") from None
            read[name] = value
        return read


@dataclass
class Answer:
    """A model's answer to N images.

    Attributes:
        parts: The tensor of each head [N, K], float32 or float64; a feature tensor has at most FEATURES_READ columns.
        outputs: Meaning of the heads.
    """

    parts: tuple[Tensor, ...]
    outputs: Outputs

    @property
    def heads(self) -> Iterable[tuple[str, Meaning, Tensor]]:
        """Name, meaning and tensor of each head."""
        meanings = self.outputs.heads.items()
        return [(name, meaning, part) for (name, meaning), part in zip(meanings, self.parts, strict=True)]

    def divergence(self, dense: "Answer") -> Tensor:
        """Return the divergence of this answer from the dense model's, summed over images and heads.

        For classes and labels it is in nats; see each `Meaning`. All feature tensors together count as one head by
        their mean, so that every tensor has the same weight at any scale.
        """
        return sum(
            share * meaning.divergence(got, target)
            for (_, meaning, got), target, share in zip(self.heads, dense.parts, self._shares(), strict=True)
        )

    def drawn_loss(self, generator: torch.Generator) -> Tensor:
        """Return a randomised loss whose expected squared gradient is the curvature of `divergence`."""
        return sum(
            share**0.5 * meaning.drawn_loss(got, generator)
            for (_, meaning, got), share in zip(self.heads, self._shares(), strict=True)
        )

    def _shares(self) -> list[float]:
        """Return the weight of each head."""
        features = sum(isinstance(meaning, Features) for meaning in self.outputs.heads.values())
        return [1 / features if isinstance(meaning, Features) else 1.0 for meaning in self.outputs.heads.values()]


def read_answer(
    model: nn.Module, output: Any, outputs: Outputs | None = None, *, every_feature: bool = False
) -> Answer:
    """Read a model's output.

    Args:
        model: The model without wrappers.
        output: Its output.
        outputs: Meaning of its outputs; default: set by `understand` on the model, else by `settle` without labels.
        every_feature: Read all features of a map.
    """
    outputs = outputs or getattr(model, "lfrns_outputs", None) or settle([model], output, [], "read_answer")
    meanings = outputs.heads.values()
    parts = [part if part.dtype == torch.float64 else part.float() for part in outputs.parts(output)]
    parts = [meaning.read_outputs(part) for meaning, part in zip(meanings, parts, strict=True)]
    if not every_feature:
        parts = [_chosen(p) if isinstance(m, Features) else p for m, p in zip(meanings, parts, strict=True)]
    return Answer(tuple(parts), outputs)


def settle(models: Sequence[nn.Module], output: Any, labels: Sequence[Any], call: str) -> Outputs:
    """Determine the meaning of models' outputs: as they state it, else by the labels, else by the outputs' shape.

    By shape only, [N, K] are classes, [N, 1] a quantity, and everything else is features. If a model's graph ends with
    a softmax or a sigmoid, its outputs are read as probabilities.

    Args:
        models: Models with matching outputs, such as a slim and its dense one, without wrappers.
        output: The first model's output for some images, with its graph for gradients (see `probe`).
        labels: Labels of batches, as loaded; None or an empty sequence if there are none.
        call: Name of the call, for the error.
    Raises:
        ValueError: Two models state different meanings, or the labels are ambiguous.
    """
    said = _agreed(models, call)
    rows, logits = read_rows(output), find_logits(output)
    widths = {name: part.shape[1] for name, part in rows.items()}
    flat = {name for name, part in named_tensors(output).items() if part.ndim in (1, 2)}  # maps have no labels
    labelled = any(value is not None for value in share_out(labels[0] if labels else None, list(rows)).values())
    if isinstance(said, Features):
        return Outputs(dict.fromkeys(rows, said), widths)
    if isinstance(said, Mapping):
        return Outputs({name: _activated(said.get(name, Features()), rows[name]) for name in rows}, widths)
    if logits is not None and not (len(rows) > 1 and labelled):
        width = logits.shape[1]
        meaning = said or _by_labels(models[0], labels, "", [""], width, call)
        if isinstance(meaning, Classes) and width == 1:
            raise ValueError(
                f"{call}({type(models[0]).__name__}): it says 'single_label_classification' and has one output, which "
                "no softmax tells anything by. Say 'multi_label_classification' of a yes or no, else 'regression'."
            )
        default = Labels() if activation_of(logits) == "sigmoid" else Classes() if width > 1 else Quantities()
        return Outputs({"": _activated(meaning or default, logits)}, {"": width}, meaning is not None)
    found = {
        name: _by_labels(models[0], labels, name, list(rows), widths[name], call) if name in flat else None
        for name in rows
    }
    heads = {name: _activated(meaning or Features(), rows[name]) for name, meaning in found.items()}
    return Outputs(heads, widths, any(found.values()))


def probe(model: nn.Module, images: Tensor) -> Any:
    """Return a model's output for two images (with one, `squeeze()` leaves no row), with its graph for gradients.

    A forward without gradients is run without them.
    """
    images = as_input(images[:2], model).detach()
    try:
        with torch.enable_grad():  # a copy: a forward may write to its input, which a leaf forbids
            return model(images.requires_grad_().clone() if images.is_floating_point() else images)
    except RuntimeError:
        with torch.no_grad():
            return model(images.detach().clone())


def settle_by_loader(
    models: Sequence[nn.Module], output: Any, labels: Any, loader: Any, call: str, processes: Processes = ALONE
) -> Outputs:
    """Determine the meaning of outputs at the first batch of a loader, the same on every process and for any batch.

    Rows [N, K] of one batch may look like classes by chance. Where they decide, images from all over the dataset are
    examined; for a stream, the first batches of all processes.

    Args:
        models, output, call: As for `settle`.
        labels: Labels of the batch.
        loader: Loader of the batch.
        processes: All of them call this at the same time.
    """
    logits = find_logits(output)
    plain = logits is not None and logits.shape[1] > 1 and getattr(labels, "ndim", 0) == 1
    if labels is None or plain or _agreed(models, call) is not None:
        return settle(models, output, [labels], call)
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset) and collate:
        places = torch.linspace(0, len(dataset) - 1, min(len(dataset), IMAGES_SEEN)).long().unique().tolist()
        return settle(models, output, [split_batch(collate([dataset[place] for place in places]))[1]], call)
    return settle(models, output, processes.gather(labels), call)


def check_differentiable(model: nn.Module, images: Tensor, call: str) -> None:
    """Refuse a model without a gradient from its outputs to the images: the value of units would be unknown.

    Args:
        model: The model in eval mode.
        images: [N, C, H, W]; images that are not floating-point have no gradient, and are not checked.
        call: The public call, for the error.
    """
    if not images.is_floating_point():
        return
    images = images.detach().requires_grad_()

    def passes() -> None:
        with torch.enable_grad():
            torch.autograd.grad(read_answer(model, model(images)).drawn_loss(torch.Generator()), images)

    try:
        differentiated(passes)
    except RuntimeError as error:
        raise ValueError(
            f"{call}({type(model).__name__}): no gradient passes through its forward ({short(str(error), 160)}), and "
            "what a unit is worth is learned from gradients. Leave torch.no_grad() and detach() out of the forward: "
            "weights that are not to learn take requires_grad_(False)."
        ) from error


def understand(dense: nn.Module, batches: Sequence[tuple[Tensor, Any]], call: str) -> list[tuple[Tensor, Any]]:
    """Determine the meaning of a model's outputs by all calibration batches, and set it on the model for `read_answer`.

    Args:
        dense: The copy for the analysis, in eval mode; copies that are cut from it keep the meaning.
        batches: Images and labels.
        call: Name of the call, for the error.
    Returns:
        The batches with labels in one form: a tensor, with several heads tensors by name, for features as loaded.
    Raises:
        ValueError: The labels do not fit the outputs.
    """
    outputs = settle([dense], probe(dense, batches[0][0]), [labels for _, labels in batches], call)
    with torch.no_grad():
        if any(isinstance(meaning, Quantities) for meaning in outputs.heads.values()):
            outputs = _calibrated(outputs, dense, [images for images, _ in batches])
    dense.lfrns_outputs = outputs
    if outputs.are_features:
        return list(batches)
    read = [(images, outputs.read_labels(labels, len(images), f"{call}(loader)")) for images, labels in batches]
    return [(images, labels[""] if list(labels) == [""] else labels) for images, labels in read]


def _calibrated(outputs: Outputs, dense: nn.Module, batches: Sequence[Tensor]) -> Outputs:
    """Return the outputs with each quantity's variance in the dense model's answers to the first images."""
    answers, left = [], CALIBRATED_BY
    for images in batches:
        if left > 0:
            answers.append(outputs.parts(dense(as_input(images[:left], dense))))
            left -= len(images)
    parts = [torch.cat(part) for part in zip(*answers, strict=True)]
    heads = {
        name: meaning.calibrated(part) if isinstance(meaning, Quantities) else meaning
        for (name, meaning), part in zip(outputs.heads.items(), parts, strict=True)
    }
    return replace(outputs, heads=heads)


def share_out(labels: Any, names: Sequence[str]) -> dict[str, Tensor | None]:
    """Assign labels to heads: one tensor belongs to a single head; several are assigned by name or by position.

    Args:
        labels: A tensor, or numbers for one; a mapping, tuple or list of these; None, or a value that is not labels.
        names: Names of the heads.
    """
    if isinstance(labels, Mapping):
        shared = {name: labels.get(name) for name in names}
    elif len(names) == 1:
        shared = {names[0]: labels}
    else:
        by_place = isinstance(labels, (tuple, list)) and len(labels) == len(names)
        shared = dict(zip(names, labels, strict=True)) if by_place else dict.fromkeys(names)
        shared = {name: value if getattr(value, "ndim", 0) else None for name, value in shared.items()}
    return {name: _as_tensor(value) for name, value in shared.items()}


def _activated(meaning: Meaning, outputs: Tensor) -> Meaning:
    """Return the meaning of outputs, marked if they already are probabilities."""
    ends_with = {"softmax": Classes, "sigmoid": Labels}.get(activation_of(outputs))
    return replace(meaning, probabilities=True) if ends_with and isinstance(meaning, ends_with) else meaning


def _agreed(models: Sequence[nn.Module], call: str) -> Mapping[str, Meaning] | Meaning | None:
    """Return the meaning that models state for their outputs, from the first that states any."""
    said = [meaning for model in models if (meaning := said_meaning(model)) is not None]
    words = {
        str({name: m.name for name, m in meaning.items()} if isinstance(meaning, Mapping) else meaning.name)
        for meaning in said
    }
    if len(words) > 1:
        names = ", ".join(type(model).__name__ for model in models)
        raise ValueError(
            f"{call}({names}): the outputs of one model mean {' and those of another '.join(sorted(words))}, "
            f"which cannot be compared. {SAY_IT}"
        )
    return said[0] if said else None


def _by_labels(
    model: nn.Module, labels: Sequence[Any], name: str, names: Sequence[str], width: int, call: str
) -> Meaning | None:
    """Return the meaning of one head by all labels examined; None where there are no labels."""
    seen = [value for one in labels if (value := share_out(one, names)[name]) is not None and value.ndim]
    if not seen:
        return None
    form = functools.reduce(lambda one, other: one & other, map(LabelForm.of, seen))
    config = getattr(model, "config", None)
    try:
        return form.meaning(width, sure_of_quantity=getattr(config, "num_labels", None) == 1)
    except ValueError as error:
        raise ValueError(f"{call}(loader): {f'{name}: ' if name else ''}{error}") from None


def _as_tensor(value: Any) -> Tensor | None:
    """Return labels as a tensor, integers as int64; None for values that are not labels, such as boxes."""
    try:
        labels = None if value is None else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels is None or labels.is_floating_point() or labels.dtype == torch.bool:
        return labels
    return labels.long()  # in an unsigned dtype -100 is another number


def _chosen(features: Tensor) -> Tensor:
    """Return at most FEATURES_READ of the features [N, f], always the same."""
    count = features.shape[1]
    return features if count <= FEATURES_READ else features[:, _choice(count).to(features.device)]


@functools.lru_cache(maxsize=64)
def _choice(count: int) -> Tensor:
    """Return a random choice of features, the same for each count."""
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:FEATURES_READ].sort().values
