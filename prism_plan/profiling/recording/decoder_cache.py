"""The cache that a decoder is given with each pass, under the name that its release has for it.

transformers calls it ``past_key_values`` up to 5.23 and ``cache`` from 5.24 on; from 5.40 on the
old name is gone. All that names it is here.

There are caches of many kinds: full, sliding, static, quantised, of linear attention, and mixtures
(read in 5.24.0). None is known by its class. What counts is whether a cache tells its length,
and that is checked with every pass: S new tokens must make it S longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from prism_plan.errors import InputError

REMEDY = "generate with transformers' default cache of this model, or record it with an engine"
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


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds for each sequence, padding included; 0 without a cache.

    Raises
    ------
    InputError
        It does not tell: no attention layer in it, or no cache of transformers at all.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"a cache ({type(cache).__name__}) that does not tell how many tokens it holds",
            source="forward pass",
            remedy=REMEDY,
        ) from error


def require_grown(cache: Any, wanted: int) -> None:
    """Refuse a cache that does not hold ``wanted`` tokens after a pass.

    It would not tell passes that go on with it from those that begin new sequences.

    Raises
    ------
    InputError
        Names the class of the cache and both lengths.
    """
    if cache is not None and (length := cached_tokens(cache)) != wanted:
        raise InputError(
            f"a cache ({type(cache).__name__}) that tells {length} tokens",
            source="forward pass",
            expected=f"{wanted} after this pass",
            remedy=REMEDY,
        )


def returned_cache(output: Any) -> Any:
    """The cache that a decoder made in a pass and returns with its output; None if there is none.

    It is known by its method: its name in the output differs as that of the argument does, and
    with ``return_dict=False`` it has none.
    """
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple):
        return None
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
