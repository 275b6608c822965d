"""The cluster figure: on real images, kept units, removed units like them, and what all kept ones make of the removed.

N images, H x W positions, D channels of a consumer's input.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lfrns_hub.measure import count_macs
from lfrns_hub.method.responses import HELD_OUT_EVERY, collect, held_out
from lfrns_hub.method.taps import channels_last, watched
from lfrns_hub.model_io.batches import UNREADABLE, iterate, shuffle_images
from lfrns_hub.model_io.model import as_input, evaluating, unwrap
from lfrns_hub.plots.charts import COLOURS, mark_of
from lfrns_hub.plots.pairs import Estimate, Pair
from lfrns_hub.plots.style import INK, sheet
from lfrns_hub.self_check import find_units
from lfrns_hub.units import SlimPlan, UnitGroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PAIRS = 6
MAX_IMAGES = 24  # of which each pair takes those on which its removed unit varies most
IMAGES_PER_PAIR = 2
MIN_SIDE = 3  # of a map, in positions: smaller maps show nothing
MAX_EXTRA_TOKENS = 5  # class, distillation and register tokens before the patches
HEADINGS = ("image", "nearest kept", "removed", "from all kept")
# Inches.
TILE, GAP, PANEL_GAP, BLOCK_GAP = 0.84, 0.05, 0.4, 0.14
HEAD, LABEL = 0.24, 0.17  # heights of the columns' headings and of the line above a pair
COLOUR_MAP, BRIGHTEST = "viridis", 0.99  # quantile of a unit's values from which on tiles are as bright as can be


@dataclass(frozen=True)
class Gallery:
    """What the figure shows of one group.

    Attributes:
        group: The group.
        pairs: All its pairs, those of the largest correlation first.
        estimate: The fold of its first consumer.
        positions: Positions of a map.
        centred: Whether the fold has an offset.
    """

    group: UnitGroup
    pairs: list[Pair]
    estimate: Estimate
    positions: int
    centred: bool

    @property
    def score(self) -> float:
        """How much a figure of this group would show."""
        return sum(pair.r**2 for pair in self.pairs[:MAX_PAIRS]) * math.log2(self.positions)


@dataclass(frozen=True)
class Row:
    """One image of a pair.

    Attributes:
        image: [H, W, 3], from 0 to 1.
        kept, removed, estimate: Maps [H, W].
    """

    image: Tensor
    kept: Tensor
    removed: Tensor
    estimate: Tensor


def plot_clusters(
    dense: nn.Module, plan: SlimPlan, loader: Any, path: str | Path, *, group: str | None = None, seed: int = 0
) -> Path:
    """Draw what a cut removed from one group: feature maps on real images, and what the kept units make of them.

    A row shows an image, the kept unit whose values correlate most with a removed one's, the removed unit, and its
    least-squares estimate from all kept units, which the fold writes into the weights of their consumer. The pairs of
    the largest correlation r come first. A map of negative r is shown with its sign flipped; the printed r keeps its
    sign. A unit of several channels, such as a head, is shown along the first principal component of its channels.

    Images are dealt as in `slim`, one in five held out: the others fit, and r, R^2 (see `Pair`) and the images shown
    are those of the held-out ones.

    Args:
        dense: The model that was slimmed; untouched.
        plan: What stays of it.
        loader: The calibration images, with or without labels; they are run once.
        path: The PNG to write.
        group: Name of the group to show. Default: the group that shows most: the largest sum of r^2 over the pairs
            to be shown, times the logarithm of the map's positions.
        seed: Seed of `slim`, which deals the images.
    Returns:
        The path.
    Raises:
        ValueError: Nothing was removed, or the removed units are not read on a grid of positions; no such group; the
            loader is empty.
    """
    dense = unwrap(dense, "plot_clusters")
    batches = shuffle_images(list(iterate(loader)), held_out_every=HELD_OUT_EVERY, seed=seed)
    if not batches:
        raise ValueError("plot_clusters(loader): the loader is empty. Give the images that slim was given.")
    every = find_units(dense, batches[0][0][:1])
    lost = candidates(every, plan, group)
    with evaluating(dense):
        galleries = survey(dense, every, lost, plan, [images for images, _ in batches], seed)
        if not galleries:
            names = ", ".join(one.name for one in lost[:3])
            raise ValueError(
                f"plot_clusters(group={group!r}): the units of {names} do not vary, or are not read on a grid of at "
                f"least {MIN_SIDE} x {MIN_SIDE} positions, and only maps can be shown. Name a group that a convolution "
                "or all tokens read."
            )
        best = max(galleries, key=lambda gallery: gallery.score)
        rows = read_rows(dense, best, choose_images(held_out(batches)))
    images = sum(len(images) for images, _ in held_out(batches))
    draw(best, plan, rows, path, model_name(dense), images)
    return Path(path)


def choose_images(loader: Any) -> Tensor:
    """Choose images to show, first one of each class, then a second of each: [N, C, H, W], N at most MAX_IMAGES.

    Args:
        loader: Batches; read until enough classes have been seen. Without class labels its first images are used.
    Example:
        >>> images, labels = torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor([7, 7, 3, 3])
        >>> choose_images([(images, labels)]).flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    by_class: dict[Any, list[Tensor]] = {}
    shape = None
    for images, labels in iterate(loader):
        shape = shape or images.shape[1:]
        has_classes = isinstance(labels, Tensor) and labels.shape == (len(images),) and not labels.is_floating_point()
        classes = labels.tolist() if has_classes else [None] * len(images)
        for image, label in zip(images, classes, strict=True):
            if label != UNREADABLE and image.shape == shape and len(by_class.get(label, [])) < MAX_IMAGES:
                by_class.setdefault(label, []).append(image)
        if len(by_class) >= MAX_IMAGES or not has_classes:
            break
    turns = zip_longest(*by_class.values())  # the first image of each class, then the second
    return torch.stack([image for turn in turns for image in turn if image is not None][:MAX_IMAGES])


def candidates(groups: Sequence[UnitGroup], plan: SlimPlan, group: str | None) -> list[UnitGroup]:
    """Return the groups that lost units, or only the named one.

    Raises:
        ValueError: Nothing was removed, or no such group was slimmed.
    """
    if group is not None and group not in plan.keep:
        raise ValueError(
            f"plot_clusters(group={group!r}): slim cut no group of that name. Name one of "
            f"{', '.join(list(plan.keep)[:8])}."
        )
    lost = [one for one in groups if group in (None, one.name) and plan.removed(one)]
    if not lost:
        raise ValueError(
            f"plot_clusters(group={group!r}): no unit was removed, and a cluster needs a removed one. "
            + ("Slim to a smaller budget, such as macs=0.5." if group is None else "Name another group, or none.")
        )
    return lost


def survey(
    dense: nn.Module,
    every: Sequence[UnitGroup],
    lost: Sequence[UnitGroup],
    plan: SlimPlan,
    batches: Sequence[Tensor],
    seed: int,
) -> list[Gallery]:
    """Run all images once, and find the pairs of each group that lost units and is read on a grid."""
    example, positions = batches[0][:1], {}
    for name, grid in observe(dense, [one.taps[0].module for one in lost if one.taps], example).items():
        positions[name] = grid.shape[1] * grid.shape[2]
    read = [one for one in lost if one.taps and one.taps[0].module in positions]
    if not read:
        return []
    gone = defaultdict(list)
    for one in every:
        for tap in one.taps if plan.removed(one) else ():
            gone[tap.module].append(tap.index[plan.removed(one)])
    moments = collect(dense, list(positions), batches, macs=count_macs(dense, example), seed=seed, weigh=False)
    found = []
    for one in read:
        name = one.taps[0].module
        estimate = Estimate.of(dense, one, gone[name], moments[name])
        pairs = estimate.find_pairs(one, plan, moments[name])
        if pairs:
            found.append(Gallery(one, pairs, estimate, positions[name], moments[name].centred))
    return found


def observe(dense: nn.Module, taps: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Run a few images; return the inputs [N, H, W, D] of those consumers that read a grid of positions."""
    grids: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def look(module: nn.Module, value: Tensor) -> None:
            grid = read_grid(module, value, images)
            if grid is not None:
                grids[name] = grid

        return look

    with torch.no_grad(), watched(dense, {name: hook_of(name) for name in dict.fromkeys(taps)}):
        dense(as_input(images, dense))
    return grids


def read_grid(module: nn.Module, value: Tensor, images: Tensor) -> Tensor | None:
    """Return a consumer's input on a grid of positions.

    Args:
        module: The consumer.
        value: Its input: [N, D, H, W] of a convolution; [N, H, W, D] or tokens [N, T, D] of a linear layer; tokens
            before a square of patches are dropped.
        images: [N, C, H, W].
    Returns:
        [N, H, W, D], float32 on the CPU; None if there is no such grid, or only a coarse one.
    """
    value = channels_last(module, value.detach())
    if value.ndim == 3:
        side = math.isqrt(value.shape[1])
        extra = value.shape[1] - side**2
        height, width = images.shape[2:]
        if extra > MAX_EXTRA_TOKENS or height != width or height % side:
            return None
        value = value[:, extra:].unflatten(1, (side, side))
    if value.ndim != 4 or len(value) != len(images) or min(value.shape[1:3]) < MIN_SIDE:
        return None
    return value.float().cpu()


def read_rows(dense: nn.Module, gallery: Gallery, images: Tensor) -> list[list[Row]]:
    """Return the rows of each pair shown: the images on which its removed unit varies most, of those still unused."""
    estimate = gallery.estimate
    (grid,) = observe(dense, [gallery.group.taps[0].module], images).values()
    found, used = [], set()
    for pair in gallery.pairs[:MAX_PAIRS]:
        removed = estimate.unit(grid, pair.removed)
        kept = estimate.unit(grid, pair.kept) * (-1 if pair.r < 0 else 1)
        from_all = estimate.estimated(grid, pair.removed)
        most = removed.flatten(1).std(1).argsort(descending=True, stable=True).tolist()
        most = sorted(most, key=used.__contains__)[:IMAGES_PER_PAIR]
        used.update(most)
        found.append([Row(picture(images[i]), kept[i], removed[i], from_all[i]) for i in most])
    return found


def model_name(dense: nn.Module) -> str:
    """Return timm's name of an architecture, or the class."""
    return (getattr(dense, "pretrained_cfg", None) or {}).get("architecture") or type(dense).__name__


def picture(image: Tensor) -> Tensor:
    """Rescale a normalised image [C, H, W] to [0, 1], [H, W, 3], grey unless it has three channels."""
    image = image.detach().float().cpu()
    image = (image if len(image) == 3 else image.mean(0).expand(3, -1, -1)).movedim(0, -1)
    return (image - image.min()) / (image.max() - image.min()).clamp(min=1e-30)


def draw(
    gallery: Gallery, plan: SlimPlan, rows: Sequence[Sequence[Row]], path: str | Path, model: str, images: int
) -> None:
    """Draw a block of rows for each pair, in one or two panels; the first pairs are the uppermost."""
    group, pairs = gallery.group, gallery.pairs[: len(rows)]
    panels = min(2, len(pairs))
    panel = 4 * TILE + 3 * GAP
    block = LABEL + max(map(len, rows)) * (TILE + GAP) + BLOCK_GAP
    size = (2 * panel + PANEL_GAP, HEAD + -(-len(pairs) // panels) * block - BLOCK_GAP)
    title = f"{model}, {group.name}: {len(plan.kept(group))} of {group.size} {group.kind}s kept"
    notes = explain(gallery, f"{len(pairs)} of {len(plan.removed(group))}", images)
    with sheet(path, size, title=title, notes=notes, comment=mark_of(plan.keep)) as figure:
        figure.set_layout_engine("none")
        for number in range(panels):
            write_columns(figure, number * (panel + PANEL_GAP), 0.0, HEADINGS, group, weight="bold")
        for number, (pair, shown) in enumerate(zip(pairs, rows, strict=True)):
            left, top = (number % panels) * (panel + PANEL_GAP), HEAD + number // panels * block
            r, r2 = (f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in (pair.r, pair.r2))
            said = ("", f"unit {pair.kept}, r {r}", f"unit {pair.removed}", f"R² {r2}")
            write_columns(figure, left, top, said, group, size=7.5)
            draw_rows(figure, left, top + LABEL, shown)


def write_columns(
    figure: "Figure", left: float, top: float, texts: Sequence[str], group: UnitGroup, **style: Any
) -> None:
    """Write a text above each column of a panel; kept units and their estimate have the colour of the kind."""
    width, height = figure.get_size_inches()
    for number, text in enumerate(texts):
        x = (left + number * (TILE + GAP) + TILE / 2) / width
        colour = COLOURS.get(group.kind, INK) if number in (1, 3) else INK
        figure.text(x, 1 - top / height, text, ha="center", va="top", color=colour, **style)


def draw_rows(figure: "Figure", left: float, top: float, rows: Sequence[Row]) -> None:
    """Draw the tiles of a pair; the removed unit and its estimate share one range of colour."""
    width, height = figure.get_size_inches()
    ranges = {}
    for column, values in enumerate(([row.kept for row in rows], [row.removed for row in rows]), start=1):
        low, high = torch.stack(values).quantile(torch.tensor([1 - BRIGHTEST, BRIGHTEST])).tolist()
        ranges[column] = {"vmin": low, "vmax": high, "cmap": COLOUR_MAP}
    ranges[3] = ranges[2]
    for number, row in enumerate(rows):
        y = top + number * (TILE + GAP) + TILE
        for column, values in enumerate((row.image, row.kept, row.removed, row.estimate)):
            x = left + column * (TILE + GAP)
            axes = figure.add_axes((x / width, 1 - y / height, TILE / width, TILE / height))
            axes.imshow(values.numpy(), interpolation="nearest", aspect="auto", **ranges.get(column, {}))
            axes.set_axis_off()


def explain(gallery: Gallery, shown: str, images: int) -> list[str]:
    """Return the explanation below the title."""
    kind, tap, width = gallery.group.kind, gallery.group.taps[0].module, gallery.estimate.index.shape[1]
    share = "variance" if gallery.centred else "squared values"
    lines = [
        f"A removed {kind}; the kept one that correlates most with it (r; its map is flipped where r is negative); and "
        "the removed one's estimate by least squares from all kept ones, which the fold uses (R²: explained share of "
        f"its {share}).",
        f"Maps are inputs of {tap}; a removed {kind} and its estimate have one scale. r and R² are those of {images:,} "
        f"images held out from the fit. Largest r first: {shown} removed {kind}s.",
    ]
    if width > 1:
        lines.append(f"A {kind} of {width} channels is shown along its first principal component.")
    return lines
