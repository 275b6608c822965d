"""Model outputs on images, each image counted once on any number of processes, and their scores."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.measure.figures import kind_of, worst
from lfrns_hub.measure.occasion import image_keys, images_id
from lfrns_hub.model_io.answers import Answer, Outputs, probe, read_answer, settle_by_loader
from lfrns_hub.model_io.batches import LABEL_KEYS, UNREADABLE, check_finite, iterate
from lfrns_hub.model_io.meaning import Classes, Labels
from lfrns_hub.model_io.model import as_input, device_of, evaluating, unwrap
from lfrns_hub.runs.processes import Processes
from lfrns_hub.runs.progress import Phase

NO_LABELS = (
    "evaluate(loader) got a batch without labels: accuracy needs them. Yield (images, labels), or dicts with one of "
    f"{', '.join(LABEL_KEYS)}."
)


@dataclass
class Answers:
    """Outputs of models on the images, gathered from all processes.

    Attributes:
        outputs: Meaning of the outputs.
        kept: By model and head, the data that its `Kind` kept of the images that count, [images, ...] each.
        labels: Labels of each head, None where there are none.
        images, skipped: Number of images that count, and of those that could not be read.
        images_id: Id of the images that count.
        input_size: [C, H, W].
    """

    outputs: Outputs
    kept: dict[tuple[str, str], dict[str, Tensor]]
    labels: dict[str, Tensor | None]
    images: int
    skipped: int
    images_id: str
    input_size: list[int]

    def score(self, name: str) -> dict[str, Any]:
        """Return the figures of one model; see `evaluate`."""
        heads = {
            head: kind_of(meaning).scores(meaning, self.kept[name, head], self.labels[head], self.outputs.widths[head])
            for head, meaning in self.outputs.heads.items()
        }
        return self._joined(heads) | {
            "images": self.images,
            "images_skipped": self.skipped,
            "images_id": self.images_id,
            "input_size": self.input_size,
        }

    def compared(self, slim: str, dense: str) -> dict[str, Any]:
        """Return the figures of one model that need another: agreement, and the class that lost most."""
        heads = {}
        for head, meaning in self.outputs.heads.items():
            kind, sides = kind_of(meaning), (self.kept[slim, head], self.kept[dense, head])
            heads[head] = kind.compared(*sides)
            if kind.worst:
                before, after = (
                    kind.scores(meaning, side, self.labels[head], self.outputs.widths[head])[kind.worst]
                    for side in reversed(sides)
                )
                heads[head]["worst_class"] = worst(before, after)
        return self._joined(heads)

    def _joined(self, heads: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Combine the figures of several heads; feature tensors have common figures."""
        word = self.outputs.word
        if isinstance(word, dict):
            return {"output": word, "heads": {name: {"output": word[name]} | one for name, one in heads.items()}}
        figures = list(heads.values())
        joined = {key: sum(one[key] for one in figures) / len(figures) if len(figures) > 1 else figures[0][key]
                  for key in figures[0]}  # fmt: skip
        return {"output": word} | joined


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a model on labelled images, each counted once on any number of processes.

    Args:
        model: Run in eval mode, without wrappers; its training mode and device are restored at the end.
        loader: Yields (images, labels) or dicts with pixel_values and labels.
        teacher: A model to compare with, such as the dense one.
        accelerator: Splits the images over its processes; without it, one process on the model's device.
        progress: Show a bar on the main process.
    Returns:
        output (meaning of the outputs), loss (the mean training loss), images, images_skipped (images that could not be
        read, with label -100: they count in no other figure), images_id (id of these images), input_size [C, H, W], and

        - for classes: top1_pct, per_class_pct (None for a class without images), class_counts; if labels are
          probabilities, the most likely class is the label. With a teacher agreement_pct, the share of images for which
          it predicts the same class;
        - for multi-label classes: map_pct (mean average precision, the mean over labels that an image has),
          per_label_ap_pct, label_accuracy_pct (single labels that are right at a probability of 1/2), label_counts.
          With a teacher agreement_pct, the share of single labels on which both agree;
        - for quantities: r2 and mae (mean absolute error), the mean over the quantities, per_quantity_r2,
          per_quantity_mae. With a teacher explained_pct, the explained share of its outputs' variance;
        - for several heads: these by name, in heads.

        With a teacher also worst_class, the class or label that lost most, except for quantities.
    Raises:
        ValueError: The loader is empty or has no labels, a label does not fit, or the model returns features.
    """
    models = {"model": unwrap(model, "evaluate")}
    if teacher is not None:
        models["teacher"] = unwrap(teacher, "evaluate")
    answers = answer(models, loader, Processes(accelerator), progress)
    if answers.outputs.are_features:
        raise ValueError(
            f"evaluate({type(models['model']).__name__}): it answers with features, and accuracy needs logits [N, "
            "classes]. measure(model, loader, dense=dense) tells how near two feature extractors are."
        )
    if all(labels is None for labels in answers.labels.values()):
        raise ValueError(NO_LABELS)
    scores = answers.score("model")
    return scores if teacher is None else merged(scores, answers.compared("model", "teacher"))


def merged(scores: dict[str, Any], compared: dict[str, Any]) -> dict[str, Any]:
    """Add the results of `Answers.compared` to the scores, head by head."""
    if "heads" not in scores:
        return scores | compared
    return scores | {"heads": {name: one | compared["heads"][name] for name, one in scores["heads"].items()}}


def answer(models: dict[str, nn.Module], loader: Any, processes: Processes, progress: bool) -> Answers:
    """Run all models over the images.

    Args:
        models: By name, without wrappers; the last is the model that others are compared with.
        loader: Batches; their labels are not read where the models return features.
        processes: The processes that share the images.
        progress: Show a bar on the main process.
    Raises:
        ValueError: There are no images, a value is not finite, classes come without labels, labels do not fit, or the
            models' outputs do not match.
    """
    device = processes.device or device_of(next(iter(models.values())))
    loader = processes.prepare_loader(loader)
    phase = Phase("evaluate", _length(loader), show=progress and processes.is_main)
    gathered: dict[tuple[str, ...], list[Tensor]] = {}
    outputs, input_size = None, []
    with phase, evaluating(*models.values(), device=device), torch.no_grad():
        for images, labels in iterate(loader):
            check_finite(images, "evaluate(loader)")
            given = {name: model(as_input(images, model)) for name, model in models.items()}
            if outputs is None:
                first = probe(next(iter(models.values())), images)
                outputs = settle_by_loader(list(models.values()), first, labels, loader, "evaluate", processes)
            answers = {name: read_answer(model, given[name], outputs) for name, model in models.items()}
            batch = _keep(answers, labels, len(images), device)
            batch["images",] = image_keys(images, labels).to(device)
            for key, value in processes.gather_batch(batch).items():
                gathered.setdefault(key, []).append(value.cpu())
            input_size = list(images.shape[1:])
            phase.advance()
    whole = {key: torch.cat(parts) for key, parts in gathered.items()}
    counted = whole.pop(("counted",), torch.zeros(0, dtype=torch.bool))
    keys = whole.pop(("images",), torch.zeros(0, dtype=torch.int64))
    if outputs is None or not counted.any():
        raise ValueError(
            "evaluate(loader) got no image: the loader is empty, or none could be read. Check the folder, the split "
            "and the limit."
        )
    kept: dict[tuple[str, str], dict[str, Tensor]] = {(name, head): {} for name in models for head in outputs.heads}
    labels = dict.fromkeys(outputs.heads)
    for key, value in whole.items():
        if key[0] == "labels":
            labels[key[1]] = value[counted]
        else:
            kept[key[1:3]][key[3]] = value[counted]
    return Answers(
        outputs, kept, labels, int(counted.sum()), int((~counted).sum()), images_id(keys[counted]), input_size
    )


def _keep(answers: dict[str, Answer], labels: Any, images: int, device: torch.device) -> dict[tuple[str, ...], Tensor]:
    """Return the data kept of one batch, each [N, ...], by model and head, by labels, or by which images count.

    Raises:
        ValueError: Classes or multi-label classes come without labels, labels do not fit, or a model has another
            number of outputs.
    """
    *_, dense = answers.values()
    outputs = dense.outputs
    read = outputs.read_labels(labels, images, "evaluate(loader)")
    counted = torch.zeros(images, dtype=torch.bool)
    batch: dict[tuple[str, ...], Tensor] = {}
    for place, (head, meaning) in enumerate(outputs.heads.items()):
        kind, of_head = kind_of(meaning), read[head]
        if of_head is None and isinstance(meaning, (Classes, Labels)):
            raise ValueError(NO_LABELS)
        if of_head is not None:
            known = meaning.known(of_head)
            counted |= (known if known.ndim == 1 else known.any(1)).cpu()
            of_head = kind.labels_of_batch(of_head).to(device)
            batch["labels", head] = of_head
        for name, one in answers.items():
            part, target = one.parts[place], dense.parts[place]
            if part.shape != target.shape:
                raise ValueError(
                    f"evaluate(loader): one model answers with {part.shape[1]} {meaning.name}, another with "
                    f"{target.shape[1]}. Compare a slim model with the dense one that it came from."
                )
            for key, value in kind.of_batch(meaning, part, target, of_head).items():
                batch["model", name, head, key] = value
    if all(value is None for value in read.values()):
        counted = _readable(labels, images)
    batch["counted",] = counted.to(device)
    return batch


def _readable(labels: Any, images: int) -> Tensor:
    """Return which images of a batch could be read, by labels that are used for nothing else, [N], bool."""
    if isinstance(labels, Tensor) and labels.shape == (images,) and not labels.is_floating_point():
        return labels.cpu() != UNREADABLE
    return torch.ones(images, dtype=torch.bool)


def _length(loader: Any) -> int | None:
    """Return the number of batches where the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None
