"""Search for the predicted budget at which the latency measured on the whole model meets its budget."""

from collections.abc import Callable
from typing import TypeVar

Plan = TypeVar("Plan")

WINDOW = 0.98  # of the target: the measured latency may lie between this share of it and the target
TRIES = 8


def search(
    plan_at: Callable[[float], Plan],
    measure: Callable[[Plan], float],
    target: float,
    *,
    start: float,
    least: float = 0.0,
) -> float:
    """Find the predicted fraction at which the measured fraction meets its target from below.

    Args:
        plan_at: Returns the plan at a predicted fraction.
        measure: Returns the fraction of the dense time that a plan's model needs.
        target: Fraction to meet.
        start: Predicted fraction to test first.
        least: The smallest fraction for which there is a plan.
    Returns:
        The predicted fraction.
    Raises:
        ValueError: The smallest plan takes longer.

    Example:
        >>> round(search(lambda p: p, lambda p: 0.1 + 0.9 * p, 0.55, start=0.55), 2)
        0.49
    """
    aim = (1 + WINDOW) / 2 * target
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    at = min(1.0, max(start, least))
    for _ in range(TRIES):
        ratio = measure(plan_at(at))
        if ratio <= target:
            below = max(below or (at, ratio), (at, ratio))
            if ratio >= WINDOW * target or at == 1:
                return at
        else:
            above = min(above or (at, ratio), (at, ratio))
            if at == least:
                break
        at = min(1.0, max(least, _next(below, above, aim)))
        if below and above and abs(above[0] - below[0]) < 1e-3:
            break
    if below is None and at != least:
        below = (least, measure(plan_at(least)))
        above = below if below[1] > target else above
        below = None if below[1] > target else below
    if below is None:
        raise ValueError(
            f"the budget latency={target:g} is not reachable: the smallest model takes {above[1]:.3f} of the dense "
            "one's time. Ask for more, or open more groups (kinds=, exclude=, min_keep=)."
        )
    return below[0]


def _next(below: tuple[float, float] | None, above: tuple[float, float] | None, aim: float) -> float:
    """Return the next predicted fraction to test: in proportion, or between two that enclose the target."""
    if below is None or above is None:
        at, ratio = below or above
        return at * aim / ratio
    (low, slow), (high, fast) = below, above
    if low >= high:  # noise: the plan that was predicted faster was measured slower
        return high * aim / fast
    part = (aim - slow) / (fast - slow)
    return low + (high - low) * min(0.9, max(0.1, part))
