"""The options that every ``prism-plan plot`` command has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prism_plan.plotting import FigureOptions

_OPTIONS = (
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
        "--size", metavar="WxH", help="Inches, such as 7x4.5; default: 15 by the content."
    ),
    click.option(
        "--dpi", type=int, default=100, show_default=True, metavar="N", help="Pixels an inch."
    ),
)
#: The parameters of figures by the options that give them.
_NAMES = {"size_in": "--size", "dpi": "--dpi", "size_in and dpi": "--size and --dpi"}


def figure_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``-o``, ``--title``, ``--no-title``, ``--size`` and ``--dpi``.

    It is called with ``output`` and ``options``, a checked ``FigureOptions``. Errors about a
    parameter of the figure name the option, those about what it has to hold the file drawn.
    """

    @functools.wraps(command)
    def run(
        output: str, title: str | None, no_title: bool, size: str | None, dpi: int, **given: Any
    ) -> None:
        from prism_plan import plotting
        from prism_plan.errors import InputError

        plotting.check_extension(output)
        try:
            options = _options(title, no_title, size, dpi)
            command(output=output, options=options, **given)
        except InputError as error:
            parameters = click.get_current_context().command.params
            argument = next(p for p in parameters if isinstance(p, click.Argument))
            names = _NAMES | {"figure": given[str(argument.name)]}
            if error.source not in names:
                raise
            raise InputError(
                error.found,
                source=names[error.source],
                place=error.place,
                expected=error.expected,
                remedy=error.remedy,
            ) from error

    for option in reversed(_OPTIONS):
        run = option(run)
    return run


def _options(title: str | None, no_title: bool, size: str | None, dpi: int) -> FigureOptions:
    from prism_plan.errors import InputError
    from prism_plan.plotting import FigureOptions

    if title is not None and no_title:
        raise InputError(
            "a title and none", source="--title and --no-title", remedy="leave one of the two out"
        )
    return FigureOptions(
        title="" if no_title else title,
        size_in=None if size is None else _size(size),
        dpi=dpi,
    )


def _size(text: str) -> tuple[float, float]:
    from prism_plan.errors import InputError

    try:
        wide, high = text.lower().replace("×", "x").split("x")
        return float(wide), float(high)
    except ValueError:
        raise InputError(
            f"{text!r:.60}", source="--size", expected="width x height in inches, such as 7x4.5"
        ) from None
