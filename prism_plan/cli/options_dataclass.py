"""The options of a command as one frozen dataclass, and the names that errors give them.

The parameters of a command have the names of the library's: ``--half-life`` is ``half_life_s``. So
an error of the library that names its parameter can name the option instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from prism_plan.errors import InputError, PrismError

#: Under this key the contexts of a command line hold that of the command which runs.
_RUNNING_CONTEXT = "prism_plan.running"


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options and arguments of a command; subclasses have a field for each of them.

    ``explicit_names`` are those that stand on the command line, and not by default.
    """

    explicit_names: frozenset[str]

    def __post_init__(self) -> None:
        """Refuse combinations of options that are wrong for any content of the files."""

    def refuse(self, *names: str, found: str, remedy: str = "leave it out") -> None:
        """Refuse options that were given and would have no effect.

        Raises
        ------
        InputError
            Names the first one.
        """
        for name in names:
            if name in self.explicit_names:
                raise InputError(found, parameter=name, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class TableOptions(CommandOptions):
    """Options of commands that print tables, or JSON in their place."""

    table_format: str
    as_json: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_json:
            self.refuse("table_format", found="has no effect with ``as_json``")


Kind = TypeVar("Kind", bound=CommandOptions)
Result = TypeVar("Result")


def options_as(kind: type[Kind]) -> Callable[[Callable[[Kind], Result]], Callable[..., Result]]:
    """Decorate a click command so that it is called with its parameters as one ``kind``."""

    def decorate(command: Callable[[Kind], Result]) -> Callable[..., Result]:
        @functools.wraps(command)
        def run(**values: Any) -> Result:
            context = click.get_current_context()
            context.meta[_RUNNING_CONTEXT] = context
            given = frozenset(
                name
                for name in values
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT
            )
            return command(kind(explicit_names=given, **values))

        return run

    return decorate


def add_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that gives a click command these options, in their order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def running_context(context: click.Context) -> click.Context:
    """The context of the command that runs within ``context``."""
    found: click.Context = context.meta.get(_RUNNING_CONTEXT, context)
    return found


def option_names(context: click.Context) -> dict[str, str]:
    """Parameter name to what a user typed: the option, or the value of an argument."""
    names = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        if isinstance(parameter, click.Argument):
            value = context.params.get(name)
            names[name] = (
                value if isinstance(value, str) else (parameter.metavar or name).strip("[].")
            )
        else:
            names[name] = max(parameter.opts, key=len)
    return names


def error_line(error: PrismError) -> str:
    """The message of an error that a command prints before it continues."""
    return error.line(option_names(running_context(click.get_current_context())))
