"""Upper bounds on the sizes that files may have or declare, checked before memory is allocated.

A file can be hostile, and a few bytes of it can declare sizes that no machine has. Every bound is
defined here, with its unit and its reason. They lie far above what planning needs (the
largest models known have some 25,000 experts in all, the largest clusters planned for a thousand
servers) and keep reading a file within about 1 GiB of memory and ten seconds.
"""

from __future__ import annotations

import math
from numbers import Integral

from prism_plan.errors import InputError

MIB = 2**20

# --------------------------------------------------------------------------------- bytes of files

#: Bytes of a JSON, TOML, CSV or other text file: its bytes, its text and the parsed values are in
#: memory at once.
MAX_TEXT_BYTES = 256 * MIB
#: Bytes of one line of a JSON Lines file. The files may be longer, since their lines are
#: read one by one. A response of 131,072 tokens of a model with 61 layers, top-8, has 85 MB.
MAX_LINE_BYTES = 128 * MIB
#: Characters of a line of numbers, each of which becomes a string while it is parsed: a request of
#: 131,072 tokens of a model with top-8 has 12 million.
MAX_LINE_OF_NUMBERS = 16 * MIB
#: Bytes that the values of a JSON or TOML file would take in memory, estimated from its text.
MAX_VALUE_BYTES = 512 * MIB
#: Levels of lists and tables inside each other: parsers, checks and messages recurse.
MAX_NESTING = 64

# -------------------------------------------------------------------------------- names and lists

#: Entries of a list: of servers, of tasks, of a server's pins or forbidden experts.
MAX_NAMES = 10_000
#: Characters of one name: of a server, a task, a model.
MAX_NAME_LENGTH = 1_000
#: GPUs of one server.
MAX_GPUS = 1_024
#: Columns of a table; unknown ones are ignored.
MAX_COLUMNS = 1_000

# ----------------------------------------------------------------------------------------- models

#: MoE layers of a model.
MAX_LAYERS = 10_000
#: Experts of a layer: ids are stored as uint16 in traces.
MAX_EXPERTS = 65_536
#: (layer, expert) pairs of a model: arrays of 8 bytes a pair are made for each server and task.
MAX_PAIRS = 2**22
#: Servers (or GPUs) × layers × experts: one byte each in a placement.
MAX_PLACEMENT_SIZE = 2**28

# ----------------------------------------------------------------------------------------- tables

#: Tasks × layers × experts of a trace: 8 bytes each, and the same again for calls per token.
MAX_TASK_PAIRS = 2**25
#: Tokens of a trace: 8 bytes each in the search for duplicates, twice that while sorting.
MAX_TOKENS = 2**25
#: Tokens × layers × top-k of a trace. Equal rows take hardly any space in the file, but each
#: selection is checked, some hundreds of millions a second.
MAX_SELECTIONS = 2**32
#: Selections decoded at a time, 2 bytes each: they stay in a processor's cache until they are
#: counted, which decodes and counts a seventh faster than batches sixteen times as large.
MAX_BATCH_SELECTIONS = 2**19
#: Bytes of a trace's tokens that are kept in memory for further passes; larger traces are decoded
#: anew in each. 1.2 million tokens of V2-Lite, 420,000 of V3.
MAX_KEPT_BYTES = 192 * MIB
#: Arrivals at fixed times, some 150 bytes each.
MAX_ARRIVALS = 2**21
#: Rows of a sweep table, some 3 kB each; a sweep has no more runs.
MAX_RUNS = 100_000
#: Characters of a cell of a sweep table, which may hold an error message.
MAX_CELL = 10_000
#: Required replicas of an expert: more than any cluster has servers.
MAX_REPLICAS = 2**31
#: Seeds of random generators: what fits into an int64.
MAX_SEED = 2**63 - 1
#: Bytes of the footer of a Parquet file, which is parsed whole.
MAX_FOOTER_BYTES = 16 * MIB
#: Bytes of a Parquet row group, all columns decompressed: a page of it is decompressed whole.
MAX_ROW_GROUP_BYTES = 512 * MIB


def require_integer(
    value: object,
    minimum: int,
    maximum: int | None = None,
    parameter: str = "",
    *,
    place: str = "",
    kind: type = Integral,
) -> None:
    """Refuse a value that is no integer of this ``kind`` from ``minimum`` to ``maximum``.

    ``parameter`` or ``place`` names it in the error.

    Raises
    ------
    InputError
        Names the bounds.
    """
    top = math.inf if maximum is None else maximum
    if isinstance(value, bool) or not isinstance(value, kind) or not minimum <= value <= top:  # type: ignore[operator]
        bounds = f"of at least {minimum}" if maximum is None else f"from {minimum:,} to {maximum:,}"
        raise InputError(
            f"{value!r:.60}", parameter=parameter, place=place, expected=f"a whole number {bounds}"
        )


def require_at_most(
    found: int, maximum: int, unit: str, *, source: object = "", place: str = "", remedy: str = ""
) -> None:
    """Refuse a size beyond its bound; ``unit`` is what it counts, such as ``"servers"``.

    Raises
    ------
    InputError
        ``found`` is larger than ``maximum``.
    """
    if found > maximum:
        raise InputError(
            f"{found:,} {unit}",
            source=source,
            place=place,
            expected=f"at most {maximum:,}",
            remedy=remedy,
        )


def require_name(name: str, *, source: object = "", place: str = "") -> None:
    """Refuse a name of more than :data:`MAX_NAME_LENGTH` characters.

    Raises
    ------
    InputError
        Gives its length.
    """
    if len(name) > MAX_NAME_LENGTH:
        raise InputError(
            f"a name of {len(name):,} characters",
            source=source,
            place=place,
            expected=f"at most {MAX_NAME_LENGTH:,}",
        )


def require_array_size(
    count: int,
    layers: int,
    experts: int,
    unit: str,
    *,
    maximum: int | None = None,
    source: object = "",
    place: str = "",
) -> None:
    """Refuse a too large array [count, layers, experts]; ``unit`` is what ``count`` counts.

    ``maximum`` bounds the product; by default it is :data:`MAX_PLACEMENT_SIZE`.

    Raises
    ------
    InputError
        Names the three sizes and the bound on their product.
    """
    maximum = MAX_PLACEMENT_SIZE if maximum is None else maximum
    if count * layers * experts > maximum:
        raise InputError(
            f"{count:,} {unit} × {layers:,} layers × {experts:,} experts",
            source=source,
            place=place,
            expected=f"a product of at most {maximum:,}",
        )


def require_task_pairs(tasks: int, layers: int, experts: int, *, source: object = "") -> None:
    """Refuse more than :data:`MAX_TASK_PAIRS` (task, layer, expert) triples, by an InputError."""
    require_array_size(tasks, layers, experts, "tasks", maximum=MAX_TASK_PAIRS, source=source)
