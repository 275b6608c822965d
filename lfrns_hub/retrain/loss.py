"""The loss of a step: from labels, the teacher's outputs, or both, by the meaning of the outputs."""

import torch
from torch import Tensor, nn

from lfrns_hub.model_io.answers import Answer, Outputs, read_answer


def ask_teacher(teacher: nn.Module | None, images: Tensor, outputs: Outputs) -> Answer | None:
    """Return the teacher's answer, without gradient, read in the same way as the student's."""
    if teacher is None:
        return None
    with torch.no_grad():
        return read_answer(teacher, teacher(images), outputs, every_feature=True)


def mixed_loss(
    answer: Answer,
    labels: dict[str, Tensor | None],
    taught: Answer | None,
    label_smoothing: float,
    distill_weight: float,
    temperature: float,
) -> Tensor:
    """Mix the task loss with the teacher's, summed over the heads; a head without labels has only the teacher's.

    Args:
        answer: The student's answer.
        labels: Labels of each head, as returned by `Outputs.read_labels`; None where there are none.
        taught: The teacher's answer, if there is a teacher.
        label_smoothing, distill_weight, temperature: As for `retrain`.
    """
    if taught is None and all(value is None for value in labels.values()):
        if answer.outputs.are_features:
            raise ValueError(
                "retrain(teacher=None): the model answers with features, of which no label speaks. Pass the dense "
                "model as teacher."
            )
        raise ValueError(
            "retrain(loader, teacher=None) got a batch without labels. Yield (images, labels), or pass the dense model "
            "as teacher."
        )
    losses = []
    targets = [None] * len(answer.parts) if taught is None else taught.parts
    for (name, meaning, part), target in zip(answer.heads, targets, strict=True):
        if target is not None and target.shape != part.shape:
            raise ValueError(
                f"retrain(teacher): it has {target.shape[1]} {meaning.name}, the model has {part.shape[1]}. Teach with "
                "the model that the slim one came from."
            )
        hard = None if labels[name] is None else meaning.task_loss(part, labels[name], label_smoothing)
        soft = None if target is None else meaning.distillation_loss(part, target, temperature)
        if hard is not None and soft is not None:
            losses.append((1 - distill_weight) * hard + distill_weight * soft)
        elif (loss := soft if hard is None else hard) is not None:
            losses.append(loss)
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]
