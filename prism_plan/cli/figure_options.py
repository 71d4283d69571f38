"""The options that every ``prism-plan plot`` command has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prism_plan.cli.options_dataclass import CommandOptions, add_options
from prism_plan.errors import InputError

if TYPE_CHECKING:
    from prism_plan.plotting import FigureOptions

#: Gives a command ``-o``, ``--title``, ``--no-title``, ``--size`` and ``--dpi``.
figure_options = add_options(
    click.option(
        "-o",
        "--output",
        required=True,
        metavar="FILE.png",
        help="Figure to write: .png, .svg or .pdf.",
    ),
    click.option("--title", metavar="TEXT", help="In place of the title that says what it shows."),
    click.option("--no-title", is_flag=True, help="Leave the title out."),
    click.option(
        "--size",
        "size_in",
        metavar="WxH",
        help="Inches, such as 7x4.5; default: 15 by the content.",
    ),
    click.option(
        "--dpi", type=int, default=100, show_default=True, metavar="N", help="Pixels an inch."
    ),
)


@dataclass(frozen=True, kw_only=True)
class PlotOptions(CommandOptions):
    """What a command of ``prism-plan plot`` is given: the file to draw, and how."""

    file: str
    output: str
    title: str | None
    no_title: bool
    size_in: str | None
    dpi: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_title:
            self.refuse("title", found="given with ``no_title``", remedy="leave one of the two out")

    def draw(self, figure: Callable[[FigureOptions], Any]) -> None:
        """Write the figure that ``figure`` makes; errors that name no parameter are about the file.

        Raises
        ------
        InputError
            The extension, the size or the resolution is wrong, or there is nothing to draw.
        """
        from prism_plan import plotting
        from prism_plan.cli.inputs import error_source

        plotting.check_extension(self.output)
        options = plotting.FigureOptions(
            title="" if self.no_title else self.title,
            size_in=None if self.size_in is None else _size(self.size_in),
            dpi=self.dpi,
        )
        with error_source(self.file):
            drawn = figure(options)
        plotting.save(drawn, self.output)


def _size(text: str) -> tuple[float, float]:
    try:
        wide, high = text.lower().replace("×", "x").split("x")
        return float(wide), float(high)
    except ValueError:
        raise InputError(
            f"{text!r:.60}",
            parameter="size_in",
            expected="width x height in inches, such as 7x4.5",
        ) from None
