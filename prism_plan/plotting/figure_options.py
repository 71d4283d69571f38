"""What a user may choose for any figure: its title, its size and its resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.input_limits import require_integer
from prism_plan.plotting.style import DPI, WIDTH_IN

MIN_SIDE_IN, MAX_SIDE_IN = 1.0, 100.0
MIN_DPI, MAX_DPI = 10, 1200
#: A pixel takes four bytes, and twice that while a PNG is written.
MAX_PIXELS = 64_000_000
#: The renderer of matplotlib has no longer lines.
MAX_SIDE_PIXELS = 2**16 - 1


@dataclass(frozen=True)
class FigureOptions:
    """The title, size and resolution of a figure.

    Parameters
    ----------
    title
        In place of the title that says what the figure shows; ``""`` leaves the title out.
    size_in
        Width and height in inches; ``None`` is 15 inches by what the content needs.
    dpi
        Pixels an inch, of PNG files and of the images in others.

    Raises
    ------
    InputError
        A value is out of bounds.
    """

    title: str | None = None
    size_in: tuple[float, float] | None = None
    dpi: int = DPI

    def __post_init__(self) -> None:
        require_integer(self.dpi, MIN_DPI, MAX_DPI, "dpi")
        if self.size_in is not None:
            if not all(MIN_SIDE_IN <= side <= MAX_SIDE_IN for side in self.size_in):
                raise InputError(
                    _inches(self.size_in),
                    parameter="size_in",
                    expected=f"a width and a height of {MIN_SIDE_IN:g} to {MAX_SIDE_IN:g} inches",
                )
            self.figure_size(self.size_in[1])

    def width_in(self) -> float:
        """The width of the figure."""
        return WIDTH_IN if self.size_in is None else self.size_in[0]

    def figure_size(self, height_in: float) -> tuple[float, float]:
        """Width and height in inches of a figure whose content needs ``height_in``.

        Raises
        ------
        InputError
            So many pixels would take too much memory.
        """
        size = (WIDTH_IN, height_in) if self.size_in is None else self.size_in
        wide, high = (math.ceil(side * self.dpi) for side in size)
        if wide * high > MAX_PIXELS or max(wide, high) > MAX_SIDE_PIXELS:
            raise InputError(
                f"{_inches(size)} at {self.dpi} dots an inch: {wide:,} × {high:,} pixels",
                parameter="size_in" if self.size_in else "dpi" if self.dpi != DPI else "",
                expected=f"at most {MAX_PIXELS:,} pixels, {MAX_SIDE_PIXELS:,} a side",
                remedy="give a smaller ``size_in`` or ``dpi``, or draw less at a time",
            )
        return size


#: What figures are without a choice.
DEFAULT_FIGURE = FigureOptions()


def _inches(size: tuple[float, float]) -> str:
    return f"{size[0]:g} × {size[1]:g} inches"
