"""Run images, keep running moments per tap, and what a consumer's output error costs in loss.

N rows (images x positions), D input channels of a consumer, O its outputs. Nothing of size N x D is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.answers import read_answer
from lfrns_hub.batches import split_batch
from lfrns_hub.taps import channel_count, channels_last, watched

HELD_OUT_EVERY = 5  # every fifth batch chooses the ridge; the others fit
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Moments:
    """First and second moments of a consumer's input, the fitting part and the held-out part apart.

    Attributes:
        centred: Whether the consumer has no padding, so that covariances and an offset are right.
        count, total, square: Rows, sum [2, D], second moment sum [2, D, D], float64; first fit, then held out.
        loss_weight: What one unit of squared error at each output costs in loss, [O], float64.
    """

    centred: bool
    count: Tensor
    total: Tensor
    square: Tensor
    loss_weight: Tensor

    @property
    def width(self) -> int:
        """Number of input channels D."""
        return self.total.shape[1]

    def matrix(self, part: int | None = None) -> Tensor:
        """Give the covariance, or for a padded consumer the raw second moment, [D, D], float64.

        Args:
            part: 0 the fitting images, 1 the held-out ones, None both.
        """
        if part is None or self.count[part] == 0:
            count, total, square = self.count.sum(), self.total.sum(0), self.square.sum(0)
        else:
            count, total, square = self.count[part], self.total[part], self.square[part]
        second = square / count
        if self.centred:
            mean = total / count
            second = second - torch.outer(mean, mean)
        return second

    def mean(self) -> Tensor:
        """Give the mean of each channel over all images, [D], float64."""
        return self.total.sum(0) / self.count.sum()


def is_unpadded(module: nn.Module) -> bool:
    """Whether every output position of a consumer sees only real inputs."""
    return isinstance(module, nn.Linear) or (not isinstance(module.padding, str) and not any(module.padding))


def collect(
    model: nn.Module,
    taps: Sequence[str],
    batches: Sequence[Any],
    *,
    loss_batches: int,
    seed: int,
    accelerator: Any = None,
) -> dict[str, Moments]:
    """Run images and keep the moments at each tap.

    Args:
        model: The dense network, in eval mode.
        taps: Names of consumers.
        batches: Batches as the user's loader yields them; labels are not needed.
        loss_batches: On how many batches the loss weights are measured, by a backward pass each.
        seed: Of the subsample of positions and of the labels drawn from the model's own predictions.
        accelerator: Given, each process takes its share of the batches and the sums are reduced.
    Returns:
        Moments per consumer.
    Source: Moments of the features as DESIGN.md section 4; the loss weights are the diagonal of the Fisher
        information at the consumers' outputs, with labels drawn from the model's own distribution (`drawn_loss`).
    """
    device = next(model.parameters()).device
    modules = {name: model.get_submodule(name) for name in taps}
    moments = {}
    for name, module in modules.items():
        width, outputs = channel_count(module), module.weight.shape[0]
        moments[name] = Moments(
            is_unpadded(module), torch.zeros(2, dtype=torch.float64), torch.zeros(2, width, dtype=torch.float64),
            torch.zeros(2, width, width, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64),
        )  # fmt: skip
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    images_seen = torch.zeros(1, dtype=torch.float64)
    for number, batch in enumerate(batches):
        if number % ranks != rank:
            continue
        images, _ = split_batch(batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        part = int(number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)

        def observe(name: str, generator: torch.Generator = generator, part: int = part) -> Any:
            def hook(module: nn.Module, value: Tensor) -> None:
                accumulate(moments[name], channels_last(module, value.detach()), part, generator)

            return hook

        with watched(model, {name: observe(name) for name in taps}):
            if number < loss_batches:
                add_loss_weights(model, modules, moments, images.to(device), generator)
                images_seen += len(images)
            else:
                with torch.no_grad():
                    model(images.to(device))
    if ranks > 1:
        for m in moments.values():
            for tensor in (m.count, m.total, m.square, m.loss_weight):
                tensor.copy_(accelerator.reduce(tensor.to(accelerator.device), "sum").cpu())
        images_seen = accelerator.reduce(images_seen.to(accelerator.device), "sum").cpu()
    for m in moments.values():
        m.loss_weight /= images_seen.clamp(min=1)
    return moments


def accumulate(moments: Moments, value: Tensor, part: int, generator: torch.Generator) -> None:
    """Add a seeded subsample of rows of `value` [..., D] to the moments, products in float32."""
    width = value.shape[-1]
    lead = value.shape[:-1].numel()
    most = max(4096, 2 * width)
    if lead > most:
        positions = torch.unravel_index(
            torch.randint(lead, (most,), generator=generator).to(value.device), value.shape[:-1]
        )
        rows = value[positions].float()
    else:
        rows = value.reshape(-1, width).float()
    with torch.autocast(rows.device.type, enabled=False):
        moments.count[part] += len(rows)
        moments.total[part] += rows.double().sum(0).cpu()
        moments.square[part] += (rows.T @ rows).double().cpu()


def add_loss_weights(
    model: nn.Module,
    modules: dict[str, nn.Module],
    moments: dict[str, Moments],
    images: Tensor,
    generator: torch.Generator,
) -> None:
    """Add each consumer output's squared gradient, summed over positions and images, to its loss weight."""
    if not images.is_floating_point():  # nothing to differentiate by: all outputs weigh alike
        with torch.no_grad():
            model(images)
        for m in moments.values():
            m.loss_weight += len(images)
        return
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name, module in modules.items()
    ]
    try:
        with torch.enable_grad():
            loss = read_answer(model, model(images.detach().requires_grad_())).drawn_loss(generator)
            outputs = {name: out for name, out in outputs.items() if out.requires_grad}  # others see no image
            gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
        if gradient is not None:
            rows = channels_last(modules[name], gradient)
            moments[name].loss_weight += (
                rows.reshape(-1, output.shape[-1 if rows.shape == output.shape else 1]).double().square().sum(0).cpu()
            )


def fold_matrix(second: Tensor, keep: Tensor, leave: Tensor, ridge: float) -> Tensor:
    """Give the least-squares estimate of cut channels from kept ones, [cut, K].

    Args:
        second: Covariance or second moment [D, D], float64.
        keep, leave: Channels kept [K] and cut [cut].
        ridge: Relative to each kept channel's own variance.
    """
    kept = second[keep][:, keep]
    scale = kept.diagonal().clamp(min=1e-30)
    system = kept + torch.diag(ridge * scale + 1e-12 * scale.max())
    return torch.linalg.solve(system, second[keep][:, leave]).T


def weight_products(weight_OD: Tensor) -> Tensor:
    """Give the products of a consumer's weights, summed over outputs and taps of the kernel, [D, D], float64."""
    flat = weight_OD.double().flatten(2).permute(0, 2, 1).flatten(0, 1) if weight_OD.ndim > 2 else weight_OD.double()
    return flat.T @ flat


def output_error(second: Tensor, products: Tensor, keep: Tensor, leave: Tensor, fold: Tensor | None) -> float:
    """Give the squared error at a consumer's outputs when cut channels are estimated by `fold` from kept ones.

    Args:
        second: Covariance or second moment of all channels, [D, D].
        products: `weight_products` of the channels cut, [cut, cut].
        keep, leave: Channels kept [K] and cut [cut].
        fold: The estimate [cut, K], or None for nothing.
    """
    removed = second[leave][:, leave]
    if fold is not None:
        cross = fold @ second[keep][:, leave]
        removed = removed - cross - cross.T + fold @ second[keep][:, keep] @ fold.T
    return float((products * removed).sum())


def best_fold(moments: Moments, weight: Tensor, keep: Tensor, leave: Tensor) -> Tensor | None:
    """Choose the ridge on the held-out images; None where no fold is the best.

    Args:
        moments: Of the consumer's input.
        weight: The consumer's weight [O, D, ...].
        keep, leave: Channels kept [K] and cut [cut].
    Returns:
        The fold [cut, K], float64, or None.
    """
    if len(leave) == 0:
        return None
    products = weight_products(weight[:, leave.to(weight.device)].cpu())
    fit, held = moments.matrix(0), moments.matrix(1)
    errors = {None: output_error(held, products, keep, leave, None)}
    for ridge in RIDGES:
        errors[ridge] = output_error(held, products, keep, leave, fold_matrix(fit, keep, leave, ridge))
    ridge = min(errors, key=lambda r: errors[r])
    return None if ridge is None else fold_matrix(fit, keep, leave, ridge)


def fold_offset(moments: Moments, keep: Tensor, leave: Tensor, fold: Tensor) -> Tensor:
    """Give the constant that completes a centred fold, [cut]."""
    mean = moments.mean()
    return mean[leave] - fold @ mean[keep]


def integrity(moments: Moments, weight: Tensor, keep: Tensor, leave: Tensor) -> float:
    """Give the share of a consumer's output variance on held-out images that the kept channels explain, in [0, 1]."""
    fold = best_fold(moments, weight, keep, leave)
    held, products = moments.matrix(1), weight_products(weight.cpu())
    every = torch.arange(moments.width)
    whole = output_error(held, products, every[:0], every, None)
    lost = output_error(held, products[leave][:, leave], keep, leave, fold)
    return max(0.0, 1.0 - lost / whole) if whole > 0 else 1.0
