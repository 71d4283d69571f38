"""Public names and parameters that were renamed: the old ones work, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], str]:
    """A function that gives the present name for an old one, with a ``DeprecationWarning``.

    Parameters
    ----------
    module
        Whose names they are, for the warning.
    names
        The present name of each old one. Other names are given back as they are.
    """

    def current_name(name: str) -> str:
        if name not in names:
            return name
        _warn(f"{module}.{name}", names[name], 4)
        return names[name]

    return current_name


def renamed_parameters(**names: str) -> Callable[[F], F]:
    """A decorator of functions: parameters may be given by their old ``names`` too."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **values: Any) -> Any:
            for old in names.keys() & values.keys():
                where = function.__qualname__.removesuffix(".__init__")
                if names[old] in values:
                    raise TypeError(
                        f"{where}: {names[old]} is given, and also by its old name {old}"
                    )
                _warn(f"{where}: {old}", names[old], 3)
                values[names[old]] = values.pop(old)
            return function(*args, **values)

        return cast(F, call)

    return decorate


def renamed_fields(**names: str) -> Callable[[C], C]:
    """A decorator of dataclasses: fields may be given and read by their old ``names`` too."""

    def decorate(cls: C) -> C:
        init = renamed_parameters(**names)(cls.__init__)  # type: ignore[misc]
        cls.__init__ = init  # type: ignore[misc]
        for old, new in names.items():
            setattr(cls, old, property(functools.partial(_read, cls.__name__, old, new)))
        return cls

    return decorate


def _read(owner: str, old: str, new: str, instance: Any) -> Any:
    _warn(f"{owner}: {old}", new, 3)
    return getattr(instance, new)


def _warn(old: str, new: str, level: int) -> None:
    """Warn in the name of the caller that stands ``level`` frames above."""
    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=level)
