"""Fold: fit the weights of a cut network, layer after layer, so that every layer's output matches the dense one's.

N images, r positions sampled per image, C channels, P entries that one output reads (input channels x kernel),
O outputs, G conv groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfrns_hub.format.narrow import model_copy
from lfrns_hub.method.fold import RIDGES
from lfrns_hub.method.responses import HELD_OUT_EVERY, add_products, mirror
from lfrns_hub.method.taps import channels_last
from lfrns_hub.model_io.hooks import OnInput, OnOutput, hooked
from lfrns_hub.model_io.model import device_of
from lfrns_hub.runs.processes import ALONE, Processes
from lfrns_hub.trace.sites import Site
from lfrns_hub.units import SlimPlan, UnitGroup

ROWS_PER_ENTRY = 4  # at least
MAX_ROWS = 65536
ROWS_SHARE = 4.0  # of the MACs of all images, for products of further rows; fewer rows cost accuracy
TARGETS = 2**24  # values kept for one layer: rows x outputs, 64 MiB
MAX_ENTRIES = 4608  # 512 channels under a 3x3 kernel: 170 MB of moments, seconds to solve
MAX_BYTES = 2**30  # of the largest activation: all images run at once
CHUNK = 16384  # rows in one product
PRIOR_ROWS = 8  # weight of the start, in rows at an entry's typical peak: units that rarely fire keep their weights


def reconstruct(
    dense: nn.Module,
    slim: nn.Module,
    sites: Sequence[Site],
    groups: Sequence[UnitGroup],
    plan: SlimPlan,
    batches: Sequence[Tensor],
    *,
    seed: int = 0,
    processes: Processes = ALONE,
) -> nn.Module:
    """Return a copy of a cut network whose layers are fitted to the dense one's outputs, on its own inputs.

    One pass: when a layer is about to run, all layers before it have been fitted, so its fit compensates for their
    remaining errors. Where its output is added to another tensor (a residual sum), it also compensates for that
    tensor's difference from the dense network's. A layer keeps its weights where held-out images show they are better.

    Args:
        dense: The dense network, in eval mode.
        slim: The result of `cut`.
        sites: The layers, from the trace, in the order in which they run.
        groups, plan: The groups and the plan of the cut.
        batches: Images [N, C, H, W]; four batches of five fit, the fifth chooses the ridge.
        seed: Seed of the sampled positions.
        processes: Each runs its share of the images; the sums are reduced.
    Returns:
        A new model; weights, biases and the running means of BatchNorms differ from `slim`'s.
    Source: Least squares on the layers' outputs is He et al. 2017 (channel pruning), on the slim network's own inputs
        Zhang et al. 2016 (asymmetric reconstruction); the sums' compensation and the single pass are ours.
    """
    slim = model_copy(slim).eval()
    kept = {site.module: kept_outputs(dense, site.module, groups, plan) for site in sites}
    fit_layers(dense, slim, sites, kept, batches, Layer.write, seed=seed, processes=processes)
    return slim


@dataclass
class Fit:
    """Result of fitting one layer.

    Attributes:
        weight: [G, O / G, P], float64.
        offset: [O], or None where the layer has no parameter for it.
        share: Share of the targets' variance on held-out images that the weight explains.
        changed: Whether the weight differs from the start.
    """

    weight: Tensor
    offset: Tensor | None
    share: float
    changed: bool


class Layer:
    """One layer of the narrow network, with the outputs of its dense counterpart.

    Attributes:
        name, module: The narrow layer.
        kept: Outputs of the dense layer that are compared, [O], int64.
        scale: Factor of the following norm and layer scales on its outputs, [O].
        positions: Sampled output positions of each image, [N, r], int64.
        targets: Desired outputs there, [N, r, O], float32.
    """

    def __init__(self, site: Site, dense: nn.Module, slim: nn.Module, kept: Tensor, positions: Tensor):
        self.site, self.name, self.kept, self.positions = site, site.module, kept, positions
        self.module = slim.get_submodule(site.module)
        self.norm = slim.get_submodule(site.norm) if site.norm else None
        self.scale = torch.ones(len(kept), device=positions.device)
        if site.norm:
            norm = dense.get_submodule(site.norm)
            gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
            self.scale = (gain / (norm.running_var + norm.eps).sqrt())[kept]
        for name in site.scales:
            self.scale = self.scale * dense.get_parameter(name).detach().flatten()[kept]
        self.targets = torch.zeros(*positions.shape, len(kept), device=positions.device)

    def take(self, value: Tensor, images: slice | Tensor = slice(None)) -> Tensor:
        """Return the rows of `value` at the sampled positions of its images, [n, r, C].

        Args:
            value: A tensor of those images, [..., C], image after image: [n, T, C], or windows of them [n x windows, T,
                C].
            images: Indices of the images among all images.
        """
        index = self.positions[images]
        rows = value.reshape(len(index), -1, value.shape[-1])
        return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1])).float()

    def of_sum(self, other: Tensor) -> Tensor:
        """Return the layer output that is equivalent to `other` [n, r, O] in the following sum."""
        small = self.scale.abs() < 1e-2 * self.scale.abs().median()
        return torch.where(small, 0, other / torch.where(small, 1, self.scale))

    def entries(self, value: Tensor, images: Tensor) -> Tensor:
        """Return the input entries of each sampled output of some images, [G, n r, P + 1]; the last entry is 1."""
        if isinstance(self.module, nn.Linear):
            whole = value.reshape(len(self.positions), -1, value.shape[-1])
            rows = self.take(whole[images], images).flatten(0, 1)[:, None]
        else:
            rows = patches(self.module, value[images].float(), self.positions[images])
        return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2).transpose(0, 1)

    def fit(self, value: Tensor, held: Tensor, total: Callable[[Tensor], Tensor]) -> Fit:
        """Fit a weight to the targets.

        Args:
            value: All inputs of the layer.
            held: Which images choose the ridge, [N], bool; the others fit.
            total: Sums a tensor over the processes.
        """
        groups = getattr(self.module, "groups", 1)
        start = self.start(groups)
        inner = start.new_zeros(2, groups, start.shape[2], start.shape[2])
        cross, square = start.new_zeros(2, *start.shape), start.new_zeros(2, *start.shape[:2])
        fourth = start.new_zeros(groups, start.shape[2])
        step = max(1, CHUNK // self.positions.shape[1])
        for at in range(0, len(held), step):
            for part in (0, 1):
                images = (held[at : at + step] == bool(part)).nonzero().flatten() + at
                if len(images):
                    rows = self.entries(value, images)
                    wanted = self.targets[images].flatten(0, 1).T.reshape(groups, -1, rows.shape[1])
                    add_products(inner[part], rows)
                    cross[part] += (wanted @ rows).cpu()
                    square[part] += wanted.square().sum(2, dtype=torch.float64).cpu()
                    if part == 0:
                        fourth += rows.square().square_().sum(1, dtype=torch.float64).cpu()
        mirror(inner)
        inner, cross, square, fourth = total(inner), total(cross), total(square), total(fourth)
        has_offset = self.norm is not None or self.module.bias is not None
        if not has_offset:
            inner, cross, start, fourth = inner[..., :-1, :-1], cross[..., :-1], start[..., :-1], fourth[..., :-1]
        judge = int(bool(inner[1].any()))  # a single batch has no held-out part
        cost = self.scale.double().square().cpu().view(groups, -1)

        def error(weight: Tensor) -> float:
            known = (weight * (2 * cross[judge] - weight @ inner[judge])).sum(2)
            return float((cost * (square[judge] - known)).sum())

        own = inner[0].diagonal(dim1=-2, dim2=-1).clamp(min=0)
        prior = PRIOR_ROWS * fourth / own.clamp(min=1e-30) + 1e-9 * own.amax(-1, keepdim=True) + 1e-30
        best, least = start, error(start)
        for ridge in reversed(RIDGES):  # the error has a single minimum: smaller ridges are not solved for
            fit = solve(inner[0], cross[0], start, ridge * own + prior)
            if (now := error(fit)) >= least:
                break
            best, least = fit, now
        whole = square[judge]
        if has_offset:
            whole = whole - cross[judge][..., -1].square() / inner[judge][:, -1:, -1]
        share = 1 - least / max(float((cost * whole).sum()), 1e-30)
        if has_offset:
            return Fit(best[..., :-1], best[..., -1].flatten(), share, best is not start)
        return Fit(best, None, share, best is not start)

    def start(self, groups: int) -> Tensor:
        """Return the weight and offset to which the ridge shrinks, [G, O / G, P + 1]; zero if the widths differ."""
        weight, bias = self.module.weight.detach().double().cpu(), self.module.bias
        if len(weight) != len(self.kept):
            return weight.new_zeros(groups, len(self.kept) // groups, weight[0].numel() + 1)
        offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
        return torch.cat([weight.reshape(groups, len(weight) // groups, -1), offset.view(groups, -1, 1)], 2)

    def write(self, fit: Fit) -> None:
        """Set the layer's weight; its offset goes into the bias, or into the norm's running mean."""
        if not fit.changed:
            return
        self.module.weight.copy_(fit.weight.reshape(self.module.weight.shape))
        if self.module.bias is not None:
            self.module.bias.copy_(fit.offset)
        elif fit.offset is not None:
            self.norm.running_mean -= fit.offset.to(self.norm.running_mean)


@torch.no_grad()
def fit_layers(
    dense: nn.Module,
    slim: nn.Module,
    sites: Sequence[Site],
    kept: dict[str, Tensor],
    batches: Sequence[Tensor],
    use: Callable[[Layer, Fit], None],
    *,
    seed: int,
    processes: Processes = ALONE,
) -> None:
    """Run the dense network for the targets, then the narrow one; pass on each layer's fit just before it runs."""
    device, ranks = device_of(dense), processes.count
    numbers = [number for number, batch in enumerate(batches) if batch.shape[1:] == batches[0].shape[1:]]
    batches = [batches[number] for number in numbers]
    every_image = torch.cat(batches)
    two = every_image[:2].to(device)
    places, left = count_places(dense, sites, two), count_places(slim, sites, two)
    # Where units are positions of a layer, as in a token-mixing layer, rows of the two networks cannot be paired.
    sites = [
        s for s in sites if left.get(s.module, 0) == places.get(s.module) and fittable(slim.get_submodule(s.module))
    ]
    if not sites:
        return
    largest = max(places[s.module] * len(dense.get_submodule(s.module).weight) for s in sites)
    most = max(1, MAX_BYTES // (4 * largest))
    is_held = [number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for number in numbers]
    held = torch.cat([torch.full((len(batch),), is_last) for batch, is_last in zip(batches, is_held, strict=True)])
    if not held.any():  # fewer than five batches
        held = torch.arange(len(held)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = torch.arange(len(held))[:: -(-len(held) // (most * ranks))][processes.share]
    images, held = every_image[chosen].to(device), held[chosen].to(device)

    layers = []
    macs = len(images) * ranks * sum(places[s.module] * slim.get_submodule(s.module).weight.numel() for s in sites)
    for number, site in enumerate(sites):
        entries, outputs = slim.get_submodule(site.module).weight[0].numel() + 1, len(kept[site.module])
        cheap = int(ROWS_SHARE * macs / len(sites) / entries**2)
        wanted = max(ROWS_PER_ENTRY * entries, min(MAX_ROWS, TARGETS // outputs, cheap))
        count = min(places[site.module], -(-wanted // (len(images) * ranks)))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * ranks + processes.rank)
        drawn = [torch.randperm(places[site.module], generator=generator)[:count] for _ in images]
        positions = torch.stack(drawn).to(device)
        layers.append(Layer(site, dense, slim, kept[site.module].to(device), positions))

    step = max(map(len, batches))
    for at in range(0, len(images), step):
        part = slice(at, at + step)

        def add(layer: Layer, value: Tensor, part: slice = part) -> None:
            layer.targets[part] += layer.take(value, part)[..., layer.kept]

        def add_other(layer: Layer, value: Tensor, part: slice = part) -> None:
            layer.targets[part] += layer.of_sum(layer.take(value, part)[..., layer.kept])

        with watching(dense, layers, on_output=add, on_other=add_other):
            dense(images[part])

    def take_off(layer: Layer, value: Tensor) -> None:
        layer.targets -= layer.of_sum(layer.take(value))

    def fit(layer: Layer, value: Tensor) -> None:
        use(layer, layer.fit(value, held, processes.sum))
        layer.targets = layer.positions = None

    with watching(slim, layers, on_input=fit, on_other=take_off):
        slim(images)


def fittable(module: nn.Module) -> bool:
    """Return whether a layer's entries can be gathered and its moments fit in memory."""
    padding, mode = getattr(module, "padding", 0), getattr(module, "padding_mode", "zeros")
    return module.weight[0].numel() <= MAX_ENTRIES and not isinstance(padding, str) and mode == "zeros"


def kept_outputs(dense: nn.Module, name: str, groups: Sequence[UnitGroup], plan: SlimPlan) -> Tensor:
    """Return the outputs of a dense layer that a plan keeps, [O], int64."""
    stays = torch.ones(dense.get_submodule(name).weight.shape[0], dtype=torch.bool)
    for group in groups:
        for part in group.slices:
            if part.tensor == f"{name}.weight" and part.dim == 0:
                stays[part.index[plan.removed(group)].flatten()] = False
    return stays.nonzero().flatten()


def count_places(model: nn.Module, sites: Sequence[Site], images: Tensor) -> dict[str, int]:
    """Count the output positions of each layer per image.

    Args:
        model: The dense network.
        sites: Its layers.
        images: Two images, [2, C, H, W]; with one image the order cannot be tested and any order is accepted.
    Returns:
        Layers whose outputs come image after image. A layer with positions first, or with windows of all images in
        turn, is left out: rows of two networks could not be paired.
    """

    def outputs(some: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def note(name: str) -> OnOutput:
            def noted(module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):  # a custom class may return something else
                    found[name] = channels_last(module, output)

            return noted

        with hooked(outputs=[(model.get_submodule(site.module), note(site.module)) for site in sites]):
            model(some)
        return found

    alone, together = outputs(images[:1]), outputs(images)
    places = {}
    for name, one in alone.items():
        both = together[name]
        if both.numel() != len(images) * one.numel():
            continue
        if isinstance(model.get_submodule(name), nn.Linear):
            both = both.reshape(len(images), -1, both.shape[-1])
        if len(both) == len(images):
            rows = one.reshape(-1, one.shape[-1])
            if (both[0].reshape(rows.shape) - rows).norm() <= 1e-2 * rows.norm():
                places[name] = len(rows)
    return places


@contextmanager
def watching(
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    on_input: Callable[[Layer, Tensor], None] | None = None,
    on_output: Callable[[Layer, Tensor], None] | None = None,
    on_other: Callable[[Layer, Tensor], None],
) -> Iterator[None]:
    """Call functions on each layer's input, its output and the other summand, the last two with channels last."""
    inputs: list[tuple[nn.Module, OnInput]] = []
    outputs: list[tuple[nn.Module, OnOutput]] = []

    def watch(name: str, kind: str, function: Callable[[Tensor], None]) -> None:
        def on_arguments(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            function(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

        def on_answer(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            function(output[0] if isinstance(output, tuple) else output)

        module = model.get_submodule(name)
        if kind == "input":
            inputs.append((module, on_arguments))
        else:
            outputs.append((module, on_answer))

    for layer in layers:
        if layer.site.other:
            first = layer.site.other_first
            watch(
                *layer.site.other,
                lambda t, layer=layer, first=first: on_other(layer, t.movedim(1, -1) if first else t),
            )
        if on_output:
            watch(layer.name, "output", lambda t, layer=layer: on_output(layer, channels_last(layer.module, t)))
        if on_input:
            watch(layer.name, "input", lambda t, layer=layer: on_input(layer, t))
    with hooked(inputs=inputs, outputs=outputs):
        yield


def patches(conv: nn.Module, value: Tensor, positions: Tensor) -> Tensor:
    """Return the input entries of a convolution for some of its outputs.

    Args:
        conv: A convolution of 1 to 3 dimensions, padded with zeros.
        value: Its input, [n, C, ...].
        positions: Output positions of each image, [n, r], int64.
    Returns:
        Rows [n r, G, C / G x kernel], in the order of a weight's entries.
    """
    padded = F.pad(value, [side for pad in reversed(conv.padding) for side in (pad, pad)])
    sizes = padded.shape[2:]
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    outputs = [(size - r - 1) // s + 1 for size, r, s in zip(sizes, reach, conv.stride, strict=True)]
    index = positions.new_zeros(*positions.shape, 1)
    for axis, coordinate in enumerate(torch.unravel_index(positions, outputs)):
        taps = torch.arange(conv.kernel_size[axis], device=value.device) * conv.dilation[axis]
        here = coordinate[..., None] * conv.stride[axis] + taps  # [n, r, kernel]
        index = (index[..., None] * sizes[axis] + here[..., None, :]).flatten(2)
    flat = padded.flatten(2).mT
    rows = flat[torch.arange(len(flat), device=value.device)[:, None, None], index]  # [n, r, kernel, C]
    return rows.flatten(0, 1).mT.reshape(index.shape[:2].numel(), conv.groups, -1)


def solve(inner: Tensor, cross: Tensor, start: Tensor, pull: Tensor) -> Tensor:
    """Return the weight [G, O / G, P] of least squared error, with a ridge towards the start.

    Args:
        inner: Products of the entries, [G, P, P].
        cross: Products of the targets with the entries, [G, O / G, P].
        start: The weight that the ridge shrinks to.
        pull: Strength of the ridge, as a sum of squares of each entry, [G, P].
    Returns:
        The weight; the start, if rounding leaves the system without a solution.
    """
    factor, failed = torch.linalg.cholesky_ex(inner + torch.diag_embed(pull))
    if failed.any():
        return start
    return torch.cholesky_solve((cross + start * pull[:, None]).mT, factor).mT
