"""What a model answers, logits or features, and how far two answers lie apart.

N images, K classes, f features of one tensor.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfrns_hub.batches import UNREADABLE, find_logits, read_rows
from lfrns_hub.running import differentiated
from lfrns_hub.untrusted import short

# Of a feature map a fixed random choice stands for all: a backbone's maps of a few hundred images are gigabytes.
FEATURES_READ = 4096


@dataclass
class Answer:
    """One answer of a model to N images.

    Attributes:
        parts: The logits [N, K] alone, or of each feature tensor [N, f], float32 or float64.
        is_logits: Which of the two.
    """

    parts: tuple[Tensor, ...]
    is_logits: bool

    def divergence(self, dense: "Answer") -> Tensor:
        """Give how far this answer is from the dense model's, summed over the images.

        Of logits it is the Kullback-Leibler divergence, in nats. Features have no distribution: there it is half the
        squared error over the variance of the dense model's, the mean over the tensors, so that every tensor weighs
        alike whatever its scale.
        """
        if self.is_logits:
            got, target = self.parts[0].log_softmax(-1), dense.parts[0].log_softmax(-1)
            return F.kl_div(got, target, reduction="sum", log_target=True)
        return 0.5 * self.relative_error(dense).sum()

    def relative_error(self, dense: "Answer") -> Tensor:
        """Give each image's squared error over the variance of the dense model's features, [N]; 1 is a constant."""
        errors = [
            (got - target).square().mean(1) / _variance(target)
            for got, target in zip(self.parts, dense.parts, strict=True)
        ]
        return torch.stack(errors).mean(0)

    def drawn_loss(self, generator: torch.Generator) -> Tensor:
        """Give a random loss of which the expected square of a gradient is the curvature of `divergence`.

        Of logits it is the cross-entropy with labels drawn from the model's own distribution (the Fisher information),
        of features their product with normal noise, on the scale of their errors (Gauss-Newton).
        """
        if self.is_logits:
            logits = self.parts[0]
            chances = logits.detach().softmax(-1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator).flatten().to(logits.device)
            return F.cross_entropy(logits, drawn, reduction="sum")
        total = self.parts[0].new_zeros(())
        for part in self.parts:
            noise = torch.randn(part.shape, generator=generator).to(part)
            total = total + (noise * part).sum() / (part.shape[1] * len(self.parts) * _variance(part.detach())).sqrt()
        return total


def read_answer(model: nn.Module, output: Any) -> Answer:
    """Tell logits from features.

    Features are every output that `find_logits` finds no logits in, that of a model that says `num_classes == 0`, and
    a single number per image, of which no distribution can be made.

    Args:
        model: Without wrappers.
        output: What it answered.
    """
    logits = find_logits(output)
    if logits is not None and logits.shape[1] > 1 and getattr(model, "num_classes", None) != 0:
        return Answer((_precise(logits),), True)
    return Answer(tuple(_precise(_chosen(rows)) for rows in read_rows(output)), False)


def check_differentiable(model: nn.Module, images: Tensor, call: str) -> None:
    """Refuse a model through which no gradient passes from its answer to the images: what units are worth is unknown.

    Args:
        model: In eval mode.
        images: [N, C, H, W]; those that are not floating-point have no gradient, and are not tried.
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


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class of the model, before they index its logits; UNREADABLE is left to the loss."""
    if labels.ndim == 1 and labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}: class numbers in [0, {num_classes}) are needed, int64 "
            "[N]. Convert them by labels.long()."
        )
    known = (labels == UNREADABLE) | ((labels >= 0) & (labels < num_classes))
    if not known.all():  # one wait for the device
        labels = labels[labels != UNREADABLE]
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} for a model with {num_classes} classes: a label "
            f"must lie in [0, {num_classes}). Give the model a head that fits the data."
        )


def _precise(value: Tensor) -> Tensor:
    """Give half precision as float32."""
    return value if value.dtype == torch.float64 else value.float()


def _variance(features: Tensor) -> Tensor:
    """Give the variance of one tensor's features, above zero also where all are the same."""
    mean_square = features.square().mean()
    return torch.maximum(features.var(correction=0), 1e-6 * mean_square + 1e-12)


def _chosen(features: Tensor) -> Tensor:
    """Give at most FEATURES_READ of the features [N, f], the same ones every time."""
    count = features.shape[1]
    return features if count <= FEATURES_READ else features[:, _choice(count).to(features.device)]


@functools.lru_cache(maxsize=64)
def _choice(count: int) -> Tensor:
    """Choose features at random, once for each count."""
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:FEATURES_READ].sort().values
