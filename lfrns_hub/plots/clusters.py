"""The cluster figure: unit maps of one layer on real images, each removed unit below the kept one it follows.

N images, U units, M values of a unit's maps (images x positions).
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from lfrns_hub.method.redundancy import MIN_R2
from lfrns_hub.method.report import GroupReport, SlimResult
from lfrns_hub.method.taps import channels_last, watched
from lfrns_hub.model_io.batches import UNREADABLE, iterate
from lfrns_hub.model_io.model import as_input, evaluating, unwrap
from lfrns_hub.plots import COLOURS, OTHER, mark_of
from lfrns_hub.runs import written_aside
from lfrns_hub.self_check import find_units
from lfrns_hub.units import UnitGroup

MAX_CLUSTERS = 4
MAX_REMOVED = 3  # per cluster, below the kept one
MAX_IMAGES = 6
MIN_SIDE = 3  # of a map, in positions: smaller maps show nothing
MAX_EXTRA_TOKENS = 5  # class, distillation and register tokens before the patches
KINDS = ("channel", "head", "neuron")  # the order of preference: the finer the grid, the more a map shows
# Lengths are in pixels at the width of a card, 120 per inch; the file has a higher resolution, for sharp letters.
WIDTH, INCH, DPI = 900, 120, 160
MARGIN, LABEL, GAP, BLOCK_GAP, FRAME = 16, 122, 4, 20, 3
TITLE_LINE, LINE = 24, 17
TITLE_LETTERS, LETTERS = 76, 120  # per line, at their font sizes
GREY, COLOUR_MAP = "#444444", "viridis"


@dataclass
class Cluster:
    """One block of the figure.

    Attributes:
        kept: The kept unit.
        removed: Rows of the report for the removed units shown: {"unit", "stand_ins", "r2"}.
        more: Number of removed units of the cluster that are not shown.
    """

    kept: int
    removed: list[dict[str, Any]]
    more: int


def plot_clusters(
    dense: nn.Module, result: SlimResult, images: Tensor, path: str | Path, *, group: str | None = None
) -> Path:
    """Draw the clusters of one group: feature maps on real images, the kept unit of each framed, removed ones below.

    A cluster is a kept unit and the redundant removed units whose strongest stand-in it is. R^2 is the report's: the
    share of a removed unit that all kept ones together explain on the calibration images. r is the correlation of its
    map with the framed one's over the given images. A stand-in relation holds up to scale and sign, so each row has
    its own range of colour, and a map of negative r is shown with its sign flipped; the printed r keeps its sign. A
    unit of several channels, such as a head, is shown by the norm over them, which has no sign to flip.

    Args:
        dense: The model that was slimmed; untouched.
        result: The result of `slim`.
        images: A few images as model input, [N, C, H, W]; the first six are run, four or six are shown.
        path: The PNG to write.
        group: Name of the group to show. Default: the group that shows most: channels before heads before neurons,
            then the largest sum of r^2 over the units to be shown, times the logarithm of the map's positions.
    Returns:
        The path.
    Raises:
        ValueError: Nothing was removed, or the removed units are not read on a grid of positions; no such group.
    """
    dense = unwrap(dense, "plot_clusters")
    images = images[:MAX_IMAGES]
    rows = candidates(result.report.groups, group)
    found = {one.name: one for one in find_units(dense, images[:1])}
    clusters = {row.name: find_clusters(row.redundant or row.weak) for row in rows}
    maps = observe(dense, [found[row.name] for row in rows if row.name in found], clusters, images)
    shown = [row for row in rows if row.name in maps]
    if not shown:
        names = ", ".join(row.name for row in rows[:3])
        raise ValueError(
            f"plot_clusters(group={group!r}): the units of {names} are not read on a grid of at least {MIN_SIDE} x "
            f"{MIN_SIDE} positions, and only maps can be shown. Name a group that a convolution or all tokens read."
        )
    # Redundant units come first: weak units show what was lost.
    best = min(
        shown,
        key=lambda row: (not row.redundant, KINDS.index(row.kind), -telling(clusters[row.name], maps[row.name])),
    )
    figure = draw(best, found[best.name], clusters[best.name], maps[best.name], images, model_name(dense))
    with written_aside(Path(path)) as partial:
        figure.savefig(partial, format="png", metadata={"Comment": mark_of(result.plan.keep)})
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


def candidates(rows: Sequence[GroupReport], group: str | None) -> list[GroupReport]:
    """Return the groups that lost units, or only the named one.

    Raises:
        ValueError: Nothing was removed, or no such group was slimmed.
    """
    names = [row.name for row in rows]
    if group is not None and group not in names:
        raise ValueError(
            f"plot_clusters(group={group!r}): slim cut no group of that name. Name one of {', '.join(names[:8])}."
        )
    lost = [row for row in rows if (row.redundant or row.weak) and group in (None, row.name)]
    if not lost:
        raise ValueError(
            f"plot_clusters(group={group!r}): no unit was removed, and a cluster needs a removed one. "
            + ("Slim to a smaller budget, such as macs=0.5." if group is None else "Name another group, or none.")
        )
    return lost


def find_clusters(removed: Sequence[dict[str, Any]]) -> list[Cluster]:
    """Group removed units by their strongest stand-in.

    Args:
        removed: Rows of a GroupReport.
    Returns:
        The clusters with most members, with their members of highest R^2.

    Example:
        >>> rows = [{"unit": u, "stand_ins": [k, 9], "r2": r2} for u, k, r2 in ((1, 0, 0.6), (2, 4, 0.7), (3, 0, 0.9))]
        >>> [(cluster.kept, [row["unit"] for row in cluster.removed]) for cluster in find_clusters(rows)]
        [(0, [3, 1]), (4, [2])]
    """
    members: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(removed, key=lambda row: -row["r2"]):
        members.setdefault(row["stand_ins"][0], []).append(row)
    largest = sorted(members.items(), key=lambda item: -len(item[1]))[:MAX_CLUSTERS]
    return [Cluster(kept, rows[:MAX_REMOVED], max(0, len(rows) - MAX_REMOVED)) for kept, rows in largest]


def correlations(kept_M: Tensor, removed_UM: Tensor) -> Tensor:
    """Return the correlation of each removed unit's map with the kept one's, [U], 0 where either is constant.

    Example:
        >>> correlations(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[5.0, 3.0, 1.0], [1.0, 1.0, 1.0]])).tolist()
        [-1.0, 0.0]
    """
    kept_M = kept_M.double() - kept_M.double().mean()
    removed_UM = removed_UM.double() - removed_UM.double().mean(1, keepdim=True)
    return (removed_UM @ kept_M) / (removed_UM.norm(dim=1) * kept_M.norm()).clamp(min=1e-30)


def read_maps(module: nn.Module, value: Tensor, index: Tensor, images: Tensor) -> Tensor | None:
    """Return units' maps from a consumer's input.

    Args:
        module: The consumer.
        value: Its input: [N, D, H, W] of a convolution; [N, H, W, D] or tokens [N, T, D] of a linear layer; tokens
            before a square of patches are dropped.
        index: Channels of each unit, [U, width], int64.
        images: [N, C, H, W].
    Returns:
        Maps [N, U, H, W], the norm over a unit's channels if it has several; None if there is no such grid.
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
    maps = value[..., index.to(value.device)].float()  # [N, H, W, U, width]
    return (maps.squeeze(-1) if index.shape[1] == 1 else maps.norm(dim=-1)).movedim(-1, 1).cpu()


def observe(
    dense: nn.Module, groups: Sequence[UnitGroup], clusters: dict[str, list[Cluster]], images: Tensor
) -> dict[str, dict[int, Tensor]]:
    """Run the images once; return {group: {unit: map [N, H, W]}} for all units of the clusters that a grid reads."""
    maps: dict[str, dict[int, Tensor]] = {}
    readers: dict[str, list[UnitGroup]] = {}
    for group in groups:
        readers.setdefault(group.taps[0].module, []).append(group)

    def hook_of(name: str) -> Any:
        def look(module: nn.Module, value: Tensor) -> None:
            for group in readers[name]:
                units = [u for c in clusters[group.name] for u in (c.kept, *(row["unit"] for row in c.removed))]
                read = read_maps(module, value, group.taps[0].index[units], images)
                if read is not None:
                    maps[group.name] = dict(zip(units, read.unbind(1), strict=True))

        return look

    with torch.no_grad(), evaluating(dense), watched(dense, {name: hook_of(name) for name in readers}):
        dense(as_input(images, dense))
    return maps


def alike(cluster: Cluster, maps: dict[int, Tensor]) -> list[float]:
    """Return the correlation of each removed unit shown with its cluster's kept one."""
    removed = torch.stack([maps[row["unit"]].flatten() for row in cluster.removed])
    return correlations(maps[cluster.kept].flatten(), removed).tolist()


def telling(clusters: Sequence[Cluster], maps: dict[int, Tensor]) -> float:
    """Return a score of how much a figure of a group would show."""
    positions = next(iter(maps.values()))[0].numel()
    return sum(r * r for cluster in clusters for r in alike(cluster, maps)) * math.log2(positions)


def is_signed(group: UnitGroup) -> bool:
    """Return whether a unit is one channel, whose map has a sign; the norm over several has none."""
    return group.taps[0].index.shape[1] == 1


def model_name(dense: nn.Module) -> str:
    """Return timm's name of an architecture, or the class."""
    return (getattr(dense, "pretrained_cfg", None) or {}).get("architecture") or type(dense).__name__


def draw(
    row: GroupReport, group: UnitGroup, clusters: Sequence[Cluster], maps: dict[int, Tensor], images: Tensor, model: str
) -> Figure:
    """Draw one or two panels of blocks, each below the images."""
    panels = min(2, len(clusters))
    columns = min(len(images), MAX_IMAGES if panels == 1 else 4)
    panel = (WIDTH - 2 * MARGIN - (panels - 1) * 2 * BLOCK_GAP) / panels
    tile = (panel - LABEL) / max(4, columns) - GAP
    lefts = [MARGIN + number * (panel + 2 * BLOCK_GAP) for number in range(panels)]
    title = textwrap.wrap(f"{model}, {row.name}: {row.kept_units} of {row.dense_units} {row.kind}s kept", TITLE_LETTERS)
    lines = [line for said in explain(row, group, len(images)) for line in textwrap.wrap(said, LETTERS)]
    top = MARGIN + TITLE_LINE * len(title) + LINE * len(lines) + BLOCK_GAP / 2

    bottoms, places = [top + tile + BLOCK_GAP] * panels, []
    for cluster in clusters:  # the next block goes to the shorter panel
        at = bottoms.index(min(bottoms))
        places.append((cluster, lefts[at], bottoms[at]))
        rows = (1 + len(cluster.removed)) * (tile + GAP) + FRAME
        bottoms[at] += rows + BLOCK_GAP + (LINE if cluster.more else 0)
    sheet = Sheet(max(bottoms) - BLOCK_GAP + MARGIN)
    for number, text in enumerate(title):
        sheet.text(MARGIN, MARGIN + TITLE_LINE * number, text, size=11.5, weight="bold")
    for number, text in enumerate(lines):
        sheet.text(MARGIN, MARGIN + TITLE_LINE * len(title) + LINE * number, text, size=8, color=GREY)
    for left in lefts:
        sheet.strip(left + LABEL, top, tile, [picture(image) for image in images[:columns]])
    colour, signed = COLOURS.get(row.kind, OTHER), is_signed(group)
    for cluster, left, y in places:
        sheet.frame(left + LABEL, y, columns * (tile + GAP) - GAP, tile, colour)
        for name, said, shown in strips(cluster, maps, weak=not row.redundant, signed=signed):
            style = {"color": colour, "weight": "bold"} if said == "kept" else {"color": GREY}
            sheet.text(left, y + tile / 2 - 16, name, size=9, **style)
            sheet.text(left, y + tile / 2 + 1, said, size=8, **style)
            seen = shown[:columns]
            sheet.strip(left + LABEL, y, tile, seen, cmap=COLOUR_MAP, vmin=float(seen.min()), vmax=float(seen.max()))
            y += tile + GAP + (FRAME if said == "kept" else 0)
        if cluster.more:
            sheet.text(left + LABEL, y, f"and {cluster.more} more removed", size=8, color=GREY)
    return sheet.figure


def strips(cluster: Cluster, maps: dict[int, Tensor], *, weak: bool, signed: bool) -> list[tuple[str, str, Tensor]]:
    """Return the two labels of each row of a block and its maps [N, H, W], the kept unit first.

    Args:
        cluster: The block.
        maps: Map of each unit, [N, H, W].
        weak: Whether the removed units are weak, which each label then states.
        signed: Whether to flip maps of negative correlation.
    """
    rows = [(f"unit {cluster.kept}", "kept", maps[cluster.kept])]
    for removed, r in zip(cluster.removed, alike(cluster, maps), strict=True):
        name = f"unit {removed['unit']}, weak" if weak else f"unit {removed['unit']}"
        said = f"R² {removed['r2']:.2f}, r {r:.2f}".replace("-", "\N{MINUS SIGN}")
        rows.append((name, said, maps[removed["unit"]] * (-1 if signed and r < 0 else 1)))
    return rows


def explain(row: GroupReport, group: UnitGroup, images: int) -> list[str]:
    """Return the explanation below the title, one or two sentences per line."""
    framed = f"Framed: a kept {row.kind}; below it, removed ones whose strongest stand-in it is. "
    if not row.redundant:
        framed = f"Framed: a kept {row.kind}; below it, weak ones, R² under {MIN_R2}, nearest to it. "
    flipped = ", sign flipped if negative" if is_signed(group) else ""
    return [
        framed + f"Removed in all: {len(row.redundant)} redundant, {len(row.weak)} weak.",
        f"R²: share the kept {row.kind}s explain together. "
        f"r: correlation with the framed map on {images} images{flipped}.",
        f"Maps are the input of {group.taps[0].module}, each row in its own range.",
    ]


def picture(image: Tensor) -> Tensor:
    """Rescale a normalised image [C, H, W] to [0, 1], [H, W, 3], grey unless it has three channels."""
    image = image.detach().float().cpu()
    image = (image if len(image) == 3 else image.mean(0).expand(3, -1, -1)).movedim(0, -1)
    return (image - image.min()) / (image.max() - image.min()).clamp(min=1e-30)


class Sheet:
    """A figure with pixel coordinates at the width of a card, from the upper left corner."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / INCH, height / INCH), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def box(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Return matplotlib's left, bottom, width and height."""
        return x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height

    def text(self, x: float, y: float, text: str, *, size: float, **style: Any) -> None:
        """Draw text with its upper left corner at (x, y)."""
        self.figure.text(x / WIDTH, 1 - y / self.height, text, va="top", fontsize=size, **style)

    def strip(self, x: float, y: float, tile: float, pixels: Sequence[Tensor], **style: Any) -> None:
        """Draw square tiles in a row."""
        for number, values in enumerate(pixels):
            axes = self.figure.add_axes(self.box(x + number * (tile + GAP), y, tile, tile))
            axes.imshow(values.numpy(), interpolation="nearest", aspect="auto", **style)
            axes.set_axis_off()

    def frame(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Draw a frame around a strip."""
        left, bottom, *size = self.box(x - FRAME, y - FRAME, width + 2 * FRAME, height + 2 * FRAME)
        style = {"fill": False, "edgecolor": colour, "linewidth": 2.6, "transform": self.figure.transFigure}
        self.figure.add_artist(Rectangle((left, bottom), *size, **style))
