"""Run images, keep running moments per tap, and the loss per squared error at a consumer's outputs.

N rows (images x positions), D input channels of a consumer, O its outputs. Nothing of size N x D is kept.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.method.taps import channel_count, channels_last, watched
from lfrns_hub.model_io.answers import read_answer
from lfrns_hub.model_io.batches import Batches, read_tensors, split_batch
from lfrns_hub.model_io.hooks import OnOutput, hooked
from lfrns_hub.model_io.model import as_input, differentiated, return_memory
from lfrns_hub.runs.processes import ALONE, Processes
from lfrns_hub.units import UnitGroup

HELD_OUT_EVERY = 5  # every fifth batch chooses the ridge; the others fit (their images: shuffle_images)
ROWS_PER_CHANNEL = 4  # at least: needed by a covariance that is inverted
MOMENTS_SHARE = 0.05  # of the forward passes' MACs, for the products of rows
BLOCK = 256  # channels; the products of a wider tap are symmetric in blocks of an eighth
MAX_MOMENT_BYTES = 2**33  # in memory; larger moments are mapped from files, which the system caches in free memory
WIDE = 512  # channels; moments of more are kept, inverted and solved in float32, at half the memory and time
WEIGHED_EVERY = 32  # images, one of which is differentiated for the loss weights
LEAST_WEIGHED = 8


@dataclass
class Moments:
    """First and second moments of a consumer's input, the fitting part separate from the held-out part.

    Attributes:
        centred: Whether the consumer has no padding, so that covariances and an offset are valid.
        count, total: Rows, [2], and their sum [2, D], float64; first fit, then held out.
        square: Sum of the products of rows about `about`, [2, D, D]; float64, for more than WIDE channels float32.
        about: Near the mean, [D], float64: where the mean is large, products about zero lose the differences of rows.
        loss_weight: Loss per unit of squared error at each output, [O], float64.
    """

    centred: bool
    count: Tensor
    total: Tensor
    square: Tensor
    about: Tensor
    loss_weight: Tensor

    @classmethod
    def empty(cls, module: nn.Module, about: Tensor, file: str | None = None) -> "Moments":
        """Return the moments of a consumer before any image.

        Args:
            module: The consumer.
            about: See the attribute.
            file: File to which `square` is mapped; in memory if None.
        """
        width = channel_count(module)
        count, total, loss_weight = (
            torch.zeros(shape, dtype=torch.float64) for shape in ((2,), (2, width), (module.weight.shape[0],))
        )
        dtype, shape = square_dtype(width), (2, width, width)
        if file is None:
            square = torch.zeros(shape, dtype=dtype)
        else:
            square = torch.from_file(file, shared=True, size=2 * width**2, dtype=dtype).view(shape)
        return cls(is_unpadded(module), count, total, square, about, loss_weight)

    @property
    def width(self) -> int:
        """Number of input channels D."""
        return self.total.shape[1]

    def matrix(self, part: int | None = None, channels: Tensor | None = None) -> Tensor:
        """Return the covariance, or the raw second moment if padded, [D, D], float64; float32 if `square` is float32.

        Args:
            part: 0 the fitting images, 1 the held-out ones, None both.
            channels: Only these channels, int64; None for all.
        """
        if part is None or self.count[part] == 0:
            count, total, square = self.count.sum(), self.total.sum(0), self.square.sum(0)
        else:
            count, total, square = self.count[part], self.total[part], self.square[part]
        about = self.about
        if channels is not None:
            total, about, square = total[channels], about[channels], square[channels][:, channels]
        second, mean = square / count, total / count
        if self.centred:
            off = (mean - about).to(second.dtype)
            size = second.diagonal().clone()
            return without_noise(second.addr_(off, off, alpha=-1), size)
        raw = second.double() + torch.outer(about, mean) + torch.outer(mean, about) - torch.outer(about, about)
        return without_noise(raw.to(second.dtype), second.diagonal() + about.square().to(second.dtype))

    def mean(self) -> Tensor:
        """Return the mean of each channel over all images, [D], float64."""
        return self.total.sum(0) / self.count.sum()


def without_noise(second: Tensor, size: Tensor) -> Tensor:
    """Set to zero, in place, the channels of a moment matrix [D, D] whose own moment is rounding error.

    Args:
        size: Diagonal before the subtraction, [D]. Images are float32, whose sums err by about 1e-7 of it.
    """
    noise = second.diagonal() <= 1e-6 * size
    if noise.any():
        second[noise] = 0
        second[:, noise] = 0
    return second


def held_out(batches: Sequence[Any]) -> list[Any]:
    """Return the batches used for no fit, every fifth; all of them where there are fewer than five."""
    return list(batches)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or list(batches)


def fitting(batches: Sequence[Any]) -> list[Any]:
    """Return the batches that are not held out."""
    return [batch for number, batch in enumerate(batches) if number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


def is_unpadded(module: nn.Module) -> bool:
    """Return whether every output position of a consumer reads only real inputs."""
    return isinstance(module, nn.Linear) or (not isinstance(module.padding, str) and not any(module.padding))


def square_dtype(width: int) -> torch.dtype:
    """Return the dtype of the second moments for a number of channels."""
    return torch.float64 if width <= WIDE else torch.float32


def empty_moments(modules: dict[str, nn.Module], means: dict[str, Tensor]) -> dict[str, Moments]:
    """Return the moments of some consumers before any image, mapped from files if they are too large for memory.

    The files lie in the folder for temporary files (TMPDIR), are already unlinked, and are freed with the moments.
    """
    figures = sum(2 * len(mean) ** 2 * square_dtype(len(mean)).itemsize for mean in means.values())
    if figures <= MAX_MOMENT_BYTES:
        return {name: Moments.empty(modules[name], mean) for name, mean in means.items()}
    with tempfile.TemporaryDirectory(prefix="lfrns-moments-") as folder:
        return {
            name: Moments.empty(modules[name], mean, f"{folder}/{number}")
            for number, (name, mean) in enumerate(means.items())
        }


def collect(
    model: nn.Module,
    taps: Sequence[str],
    batches: Sequence[Any],
    *,
    macs: float,
    seed: int,
    processes: Processes = ALONE,
    weigh: bool = True,
) -> dict[str, Moments]:
    """Run the images once and keep the moments at each tap.

    All rows of all images are more than the moments need, and cost as much as the network itself. The number of rows
    drawn per tap is set so that their products cost a twentieth of the passes, but is at least four per channel.

    Args:
        model: The dense network, in eval mode.
        taps: Names of consumers.
        batches: Batches as the user's loader yields them; labels are not needed.
        macs: MACs of the forward pass of one image.
        seed: Seed of the rows drawn and of the labels drawn from the model's own predictions.
        processes: Each runs its share of the batches; the sums are reduced.
        weigh: Whether to run backward passes for the loss weights, which are zero otherwise.
    Returns:
        Moments per consumer; those that read the same tensor share them.
    Source: Moments of the features as DESIGN.md section 4; the loss weights are the diagonal of the Fisher
        information at the consumers' outputs, with labels drawn from the model's own distribution (`drawn_loss`), on
        one image in WEIGHED_EVERY.
    """
    modules = {name: model.get_submodule(name) for name in taps}
    images_of = [split_batch(batch)[0] for batch in batches]
    readers, means = first_readers(model, taps, as_input(images_of[0][:1], model))
    moments = empty_moments(modules, means)
    count = sum(map(len, images_of))
    rows = {
        name: max(ROWS_PER_CHANNEL * m.width / count, MOMENTS_SHARE * macs / len(moments) / m.width**2)
        for name, m in moments.items()
    }
    loss_weights = {name: torch.zeros(len(m.weight), dtype=torch.float64) for name, m in modules.items()}
    weighed, to_weigh = torch.zeros(1, dtype=torch.float64), max(LEAST_WEIGHED, count // WEIGHED_EVERY) * weigh
    ours = range(len(images_of))[processes.share]
    for number, images in enumerate(images_of):
        weighing = min(len(images), to_weigh)
        to_weigh -= weighing
        if number not in ours:
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        part = int(number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        pieces = [*images[:weighing].split(backward_share(len(images))), images[weighing:]] if weighing else [images]
        for place, some in enumerate(pieces):
            some = as_input(some, model)
            observe = {
                name: partial(accumulate, m, ceil(rows[name] * len(some)), part, generator)
                for name, m in moments.items()
            }
            with watched(model, observe):
                if weighing and place < len(pieces) - 1:
                    add_loss_weights(model, modules, loss_weights, some, generator)
                    weighed += len(some)
                elif len(some):
                    with torch.no_grad():
                        model(some)
            if place == len(pieces) - 2:
                return_memory()  # of backward passes
    for m in moments.values():
        mirror(m.square)
    sums = [t for m in moments.values() for t in (m.count, m.total, m.square)]
    for tensor in [*sums, *loss_weights.values(), weighed]:
        tensor.copy_(processes.sum(tensor))
    return {
        name: replace(
            moments[readers[name]],
            centred=is_unpadded(module),
            loss_weight=loss_weights[name] / weighed.clamp(min=1),
        )
        for name, module in modules.items()
    }


def backward_share(batch: int) -> int:
    """Return how many images of a batch a backward pass, which keeps all activations, can run in the same memory."""
    return max(1, batch // 32)


def first_readers(model: nn.Module, taps: Sequence[str], image: Tensor) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Find which consumers read the same tensors, at every call, by running one image.

    Returns:
        For each consumer the first one that reads the same tensors, often itself; and for each of these first ones the
        mean of each channel, [D], float64.
    """
    read: dict[str, list[Tensor]] = {name: [] for name in taps}
    with watched(model, {name: lambda _, value, name=name: read[name].append(value) for name in taps}), torch.no_grad():
        model(image)
    firsts: dict[tuple[int, ...], str] = {}
    # Tensors are all kept alive here, so their ids are unique.
    readers = {name: firsts.setdefault(tuple(map(id, values)) or (name,), name) for name, values in read.items()}
    means = {}
    for name in firsts.values():
        module = model.get_submodule(name)
        rows = [channels_last(module, value).reshape(-1, channel_count(module)).double() for value in read[name]]
        means[name] = torch.cat(rows).mean(0).cpu() if rows else torch.zeros(channel_count(module)).double()
    return readers, means


def accumulate(
    moments: Moments, wanted: int, part: int, generator: torch.Generator, module: nn.Module, value: Tensor
) -> None:
    """Add a seeded sample of the rows of a consumer's input to the moments, products in float32; see `add_products`."""
    value = channels_last(module, value.detach())
    lead, width = value.shape[:-1], value.shape[-1]
    if lead.numel() > wanted:
        drawn = torch.randint(lead.numel(), (wanted,), generator=generator).to(value.device)
        rows = value[torch.unravel_index(drawn, lead)].float()
        rows -= moments.about.to(rows)  # in place: a copy already
    else:
        rows = value.reshape(-1, width).float()
        rows = rows - moments.about.to(rows)
    with torch.autocast(rows.device.type, enabled=False):
        moments.count[part] += len(rows)
        moments.total[part] += rows.sum(0, dtype=torch.float64).cpu() + len(rows) * moments.about
        add_products(moments.square[part], rows)


def add_products(square: Tensor, rows: Tensor) -> None:
    """Add the products of rows to `square`, except for blocks below the diagonal, in place.

    Args:
        square: [..., D, D], on the CPU.
        rows: [..., N, D], float32.
    """
    width = rows.shape[-1]
    block = max(BLOCK, -(-width // 8))
    for at in range(0, width, block):
        of_block, some = square[..., at : at + block, at:], rows[..., at : at + block].mT
        if rows.ndim == 2 and of_block.dtype == rows.dtype and of_block.device == rows.device:
            of_block.addmm_(some, rows[:, at:])
        else:
            of_block += (some @ rows[..., at:]).cpu()


def mirror(square: Tensor) -> None:
    """Fill in the blocks below the diagonal that `add_products` leaves out, [..., D, D], in place."""
    block = max(BLOCK, -(-square.shape[-1] // 8))
    for at in range(block, square.shape[-1], block):
        square[..., at : at + block, :at] = square[..., :at, at : at + block].mT


def add_loss_weights(
    model: nn.Module,
    modules: dict[str, nn.Module],
    loss_weights: dict[str, Tensor],
    images: Tensor,
    generator: torch.Generator,
) -> None:
    """Add each consumer output's squared gradient, summed over positions and images, to its loss weight."""
    if not images.is_floating_point():  # no gradient is possible: all outputs have equal weight
        with torch.no_grad():
            model(images)
        for weight in loss_weights.values():
            weight += len(images)
        return
    outputs: dict[str, Any] = {}

    def note(name: str) -> OnOutput:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    def passes() -> dict[str, tuple[Tensor, Tensor | None]]:
        loss = read_answer(model, model(images.detach().requires_grad_())).drawn_loss(generator)
        firsts = {name: next(iter(read_tensors(out)), None) for name, out in outputs.items()}  # of a tuple, too
        seen = {name: out for name, out in firsts.items() if out is not None and out.requires_grad}  # others: no image
        gradients = torch.autograd.grad(loss, list(seen.values()), allow_unused=True) if seen else ()
        return {name: (out, gradient) for (name, out), gradient in zip(seen.items(), gradients, strict=True)}

    with hooked(outputs=[(module, note(name)) for name, module in modules.items()]), torch.enable_grad():
        found = differentiated(passes)
    for name, (output, gradient) in found.items():
        if gradient is not None:
            rows = channels_last(modules[name], gradient)
            channels = output.shape[-1 if rows.shape == output.shape else 1]
            loss_weights[name] += rows.reshape(-1, channels).square().sum(0, dtype=torch.float64).cpu()


def observe(
    dense: nn.Module, chosen: Sequence[UnitGroup], batches: Batches, macs: float, seed: int, processes: Processes
) -> dict[str, Moments]:
    """Run the images and return the moments at every tap of the chosen groups."""
    taps = list(dict.fromkeys(tap.module for group in chosen for tap in group.taps))
    return collect(dense, taps, batches, macs=macs, seed=seed, processes=processes)
