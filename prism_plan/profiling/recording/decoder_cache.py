"""The KV cache that a decoder is given with each pass: its argument's name and its length.

transformers calls it ``past_key_values`` up to 5.23 and ``cache`` from 5.24 on; from 5.40 on the
old name is gone.

There are caches of many kinds: full, sliding, static, quantised, of linear attention, and mixtures
(read in 5.24.0). None is recognised by its class. A cache must report its length, and that is
checked with every pass: S new tokens must make it S longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from prism_plan.io.location import Location

REMEDY = "generate with transformers' default cache of this model, or record it with an engine"
#: Names of the argument, newest first: a release that takes both warns of the older one.
NAMES = ("cache", "past_key_values")


def cache_argument(decoder: Any) -> str:
    """The name of a decoder's cache argument.

    Raises
    ------
    InputError
        It has none of the known names: passes that continue a cache could not be distinguished from
        those that begin one.
    """
    taken = inspect.signature(decoder.forward).parameters
    for name in NAMES:
        if name in taken:
            return name
    raise Location(f"the decoder {type(decoder).__name__}").error(
        f"takes {', '.join(taken)}",
        f"a cache as {' or '.join(NAMES)}",
        "use a release of transformers that this package knows",
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
        raise Location("forward pass").error(
            f"two caches, as {' and as '.join(NAMES)}", "one", "name it once"
        )
    return found[0] if found else None


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds for each sequence, padding included; 0 without a cache.

    Raises
    ------
    InputError
        It does not report it: it has no attention layer, or is no cache of transformers.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        raise Location("forward pass").error(
            f"a cache ({type(cache).__name__}) that does not tell how many tokens it holds",
            remedy=REMEDY,
        ) from error


def require_grown(cache: Any, num_tokens: int) -> None:
    """Refuse a cache that does not hold ``num_tokens`` tokens after a pass.

    Passes that continue it could not be distinguished from those that begin new sequences.

    Raises
    ------
    InputError
        Names the class of the cache and both lengths.
    """
    if cache is not None and (length := cached_tokens(cache)) != num_tokens:
        raise Location("forward pass").error(
            f"a cache ({type(cache).__name__}) that tells {length} tokens",
            f"{num_tokens} after this pass",
            REMEDY,
        )


def returned_cache(output: Any) -> Any:
    """The cache that a decoder made in a pass and returns with its output; None if there is none.

    It is recognised by its method: its name in the output depends on the release, and with
    ``return_dict=False`` it has none.
    """
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple):
        return None
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
