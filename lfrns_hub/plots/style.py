"""The look of all plots: colours, a white sheet with a title, and labels that stay clear of each other."""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfrns_hub.runs import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Okabe and Ito's palette, which colour-blind readers can tell apart; marks and line styles differ as well, for print.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
INK, GREY, LIGHT = "#333333", "#666666", "#BDBDBD"
DPI = 150
PADDING = 0.15  # inches of white around everything: pages may be dark
LETTER = 0.53  # mean width of a letter, as a share of its height
STYLE = {
    "font.size": 8,
    "text.parse_math": False,  # names are no formulas
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
# Where a label may stand: offset in points and alignment. A curve of accuracy rises to the right, so these come first.
PLACES = [
    (scale * x, scale * y, horizontal, vertical)
    for scale in (1, 2, 3)
    for x, y, horizontal, vertical in (
        (5, -4, "left", "top"), (-5, 4, "right", "bottom"), (0, -7, "center", "top"), (0, 7, "center", "bottom"),
        (7, 0, "left", "center"), (-7, 0, "right", "center"), (5, 4, "left", "bottom"), (-5, -4, "right", "top"),
    )
]  # fmt: skip


@contextmanager
def sheet(
    path: str | Path,
    size: tuple[float, float],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    comment: str = "",
) -> Iterator["Figure"]:
    """Open a figure, and write it to a PNG file when the context ends; the user's matplotlibrc has no effect on it.

    Args:
        path: The PNG to write, replaced whole.
        size: Width and height of the plots, in inches; title and notes stand above them.
        title, notes: Lines of text, wrapped.
        comment: Comment in the file.
    """
    import matplotlib  # imported here: slow, and not needed by a checkpoint
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name in a script that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        _write_head(figure, title, notes)
        with written_aside(Path(path)) as partial:
            metadata = {"Comment": comment} if comment else None
            figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=PADDING, metadata=metadata)


def _write_head(figure: "Figure", title: str, notes: Sequence[str]) -> None:
    """Write title and notes above a figure, from the lowest line up."""
    width, height = figure.get_size_inches()
    y = height + 0.12
    for texts, size, style in ((notes, 8, {"color": GREY}), ([title], 10.5, {"weight": "bold"})):
        letters = int(72 * width / (size * (LETTER + 0.09 * ("weight" in style))))
        for line in reversed([line for text in texts for line in textwrap.wrap(text, letters)]):
            figure.text(0, y / height, line, va="bottom", fontsize=size, **style)
            y += 1.45 * size / 72


def label_points(
    axes: "Axes", points: Sequence[tuple[float, float]], texts: Sequence[str], *, size: float = 7, **style: Any
) -> None:
    """Write a text beside each point, where it covers no point and no other text.

    Args:
        axes: The axes, with final limits; the layout of their figure is fixed from here on.
        points: In data coordinates.
        texts: One for each point, perhaps empty; without free space a text stands where it covers least.
        size, style: Font size in points, and other properties of the texts.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()
    inside, mark = axes.get_window_extent(), 4 * figure.dpi / 72
    taken = [Bbox.from_bounds(x - mark, y - mark, 2 * mark, 2 * mark) for x, y in axes.transData.transform(points)]
    style |= {
        "fontsize": size,
        "textcoords": "offset points",
        "path_effects": [withStroke(linewidth=2, foreground="white")],
    }

    def covered(box: Bbox) -> float:
        common = [Bbox.intersection(box, other) for other in taken]
        within = Bbox.intersection(box, inside)
        outside = _area(box) - (_area(within) if within else 0)
        return outside + sum(_area(part) for part in common if part)

    for point, text in zip(points, texts, strict=True):
        if not text:
            continue
        places = [axes.annotate(text, point, (x, y), ha=ha, va=va, **style) for x, y, ha, va in PLACES]
        boxes = [place.get_window_extent() for place in places]
        best = min(range(len(places)), key=lambda number: round(covered(boxes[number])))
        for number, place in enumerate(places):
            place.set_in_layout(False)
            if number != best:
                place.remove()
        taken.append(boxes[best])


def _area(box: "Bbox") -> float:
    """Return the area of a box in pixels."""
    return box.width * box.height


def axis_range(values: Sequence[float], room: float) -> tuple[float, float]:
    """Return the limits of an axis that exaggerates no small difference.

    Args:
        values: All values shown.
        room: Least width of the axis.
    Returns:
        From 0 where the smallest value is below half of the largest, otherwise at least `room` wide, from a multiple
        of half of it.

    Example:
        >>> axis_range([86.0, 87.0], 10.0), axis_range([30.0, 87.0], 10.0)
        ((75.0, 88.4), (0.0, 97.4))
    """
    low, high = min(values), max(values)
    start = min(low - 0.25 * (high - low), high - room)
    start = 0.0 if 0 <= low and start < high / 2 else room / 2 * (start // (room / 2))
    top = high + 0.12 * (high - start if high > start else room)
    return start, float(f"{top:.3g}")


def name_machine(setup: dict[str, Any]) -> str:
    """Return the processor or GPU, the threads and the dtype of a record's or a benchmark's setup, as one line."""
    machine = setup.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    device, threads = machine.get("device"), machine.get("threads")
    name = machine.get("cpu") if device == "cpu" else device
    plural = "" if threads == 1 else "s"
    parts = [name, f"{threads} thread{plural}" if device == "cpu" and threads else None, setup.get("dtype")]
    return ", ".join(str(part) for part in parts if part)
