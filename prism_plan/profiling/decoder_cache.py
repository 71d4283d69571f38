"""The cache that a decoder is given with each pass, under the name that its release has for it.

transformers calls it ``past_key_values`` up to 5.23 and ``cache`` from 5.24 on; from 5.40 on the
old name is gone. All that names it is here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError

#: The newest first: a release that takes both warns of the older one.
NAMES = ("cache", "past_key_values")


def cache_argument(decoder: Any) -> str:
    """What a decoder (a torch module) calls the cache.

    Raises
    ------
    InputError
        It takes none under a name that is known: passes that go on with a cache could not be told
        from those that begin.
    """
    taken = inspect.signature(decoder.forward).parameters
    for name in NAMES:
        if name in taken:
            return name
    raise InputError(
        f"takes {', '.join(taken)}",
        source=f"the decoder {type(decoder).__name__}",
        expected=f"a cache as {' or '.join(NAMES)}",
        remedy="use a release of transformers that this package knows",
    )


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a pass, under either name; None if there is none.

    Raises
    ------
    InputError
        There are two.
    """
    found = [kwargs[name] for name in NAMES if kwargs.get(name) is not None]
    if len(found) > 1:
        raise InputError(
            f"two caches, as {' and as '.join(NAMES)}",
            source="forward pass",
            expected="one",
            remedy="name it once",
        )
    return found[0] if found else None
