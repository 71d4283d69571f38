"""Axes of numbers that span more than a linear scale can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Values that lie further apart than so many times are drawn on a logarithmic axis.
LOG_RATIO = 20.0


def needs_log_scale(values: Iterable[float], ratio: float = LOG_RATIO) -> bool:
    """Whether all values are positive and the largest is more than ``ratio`` times the least."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > ratio * min(known)


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic x or y axis from ``low`` to ``high`` with plain numbers at 1, 2, 5, 10, ...

    Only powers of ten are marked where there are many.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3.5 else (1,)
    ticks = [step * 10.0**power for power in decades for step in steps]
    set_axis(axes, which, [tick for tick in ticks if low <= tick <= high], log=True)
    if which == "x":
        axes.set_xlim(low, high)
    else:
        axes.set_ylim(low, high)


def set_axis(axes: Axes, which: str, ticks: Sequence[float], *, log: bool) -> None:
    """The scale of an axis, its ticks and their numbers; no others between them."""
    scale = "log" if log else "linear"
    if which == "x":
        axes.set_xscale(scale)
    else:
        axes.set_yscale(scale)
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axis.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks], minor=False)
    axis.set_ticks([], minor=True)


def thin_out(values: Sequence[float], most: int, *, log: bool) -> list[float]:
    """Those of the ascending ``values`` that lie at least 1/``most`` of the axis apart.

    The last is kept and the others go before it, so that the ends of a sweep can be read.
    """
    places = [math.log(value) if log else value for value in values]
    gap = (places[-1] - places[0]) / most
    kept = [0]
    for i in range(1, len(values) - 1):
        if places[i] - places[kept[-1]] >= gap and places[-1] - places[i] >= gap:
            kept.append(i)
    if len(values) > 1:
        kept.append(len(values) - 1)
    return [values[i] for i in kept]
