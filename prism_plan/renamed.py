"""Public names that were renamed: the old ones work in this version, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping


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
        warnings.warn(
            f"{module}.{name} is called {names[name]} now", DeprecationWarning, stacklevel=3
        )
        return names[name]

    return current_name
