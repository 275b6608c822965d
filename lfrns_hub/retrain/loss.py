"""What a step learns from: labels, the teacher's answers, or both."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfrns_hub.batches import read_logits
from lfrns_hub.measure import check_labels


def ask_teacher(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    """Give the teacher's logits [N, classes], without gradient."""
    if teacher is None:
        return None
    with torch.no_grad():
        return read_logits(teacher(images)).float()


def mixed_loss(
    logits: Tensor,
    labels: Tensor | None,
    soft_targets: Tensor | None,
    label_smoothing: float,
    distill_weight: float,
    temperature: float,
) -> Tensor:
    """Mix cross-entropy to the labels with the divergence from the teacher's softened classes."""
    if labels is None and soft_targets is None:
        raise ValueError(
            "retrain(loader, teacher=None) got a batch without labels. Yield (images, labels), or pass the dense model "
            "as teacher."
        )
    if soft_targets is not None and soft_targets.shape != logits.shape:
        raise ValueError(
            f"retrain(teacher): it has {soft_targets.shape[1]} classes, the model has {logits.shape[1]}. Teach with "
            "the model that the slim one came from."
        )
    if labels is not None:
        check_labels(labels, logits.shape[1])
        hard = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if soft_targets is None:
            return hard
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(soft_targets / temperature, dim=1)
    # The gradients of softened logits shrink with the temperature squared.
    soft = temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)
    return soft if labels is None else (1 - distill_weight) * hard + distill_weight * soft
