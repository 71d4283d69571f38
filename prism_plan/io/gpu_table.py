"""The shipped table of GPUs: figures of common GPUs by name, each with its source.

The table is ``prism_plan/gpu_table/gpus.toml``, whose head states the conventions. It is read when
a name is looked up, and checked as any file is.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prism_plan.errors import InputError, did_you_mean
from prism_plan.io.pydantic_base import (
    ABSENT,
    DictOf,
    ListOf,
    Name,
    NonEmpty,
    Positive,
    TomlTable,
    short_repr,
    validate,
    validation_error,
)
from prism_plan.io.toml import parse_toml

#: GB/s of one lane of PCI Express in one direction, by generation: 8, 16 and 32 GT/s, of which 128
#: bits in 130 are data.
PCIE_LANE_GBS = {3: 8 / 8 * 128 / 130, 4: 16 / 8 * 128 / 130, 5: 32 / 8 * 128 / 130}
#: The share of that rate at which experts load. Copies from pinned memory reach 80 to 85 %, for
#: packets have headers; from memory that is not pinned about half of it.
PCIE_SHARE = 0.8
#: The share of the memory bandwidth at which experts load where CPU and GPU share the memory: a
#: copy reads each byte and writes it.
SHARED_MEMORY_SHARE = 0.5
#: No copy within shared memory is taken to be faster, in GB/s: that of a link of PCIe 5.0 x16.
MAX_SHARED_MEMORY_LOAD_GBS = 50.0
#: Characters of a name that is compared with those of the table: the time grows with the length.
MAX_COMPARED_LENGTH = 80

Figure = Annotated[float, Field(gt=0, le=1e6)]
#: Lower-case letters and digits, in words that hyphens join.
GpuName = Annotated[str, Field(pattern="^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]


class SourcePart(TomlTable):
    """A publication of the vendor."""

    title: NonEmpty
    url: Annotated[str, Field(pattern="^https://[^ ]+$")] = ""


class GpuPart(TomlTable):
    """A GPU as it stands in the table."""

    name: GpuName
    vendor: NonEmpty
    title: NonEmpty
    memory_gib: Figure
    memory_bandwidth_gbs: Figure
    bus_width_bits: Positive = ABSENT
    memory_rate_gbps: Figure = ABSENT
    tflops: Figure
    dtype: Literal["bf16", "fp16"]
    cores: Positive = ABSENT
    boost_mhz: Positive = ABSENT
    flops_per_core_clock: Positive = ABSENT
    launch_overhead_us: Figure = ABSENT
    pcie: Literal[3, 4, 5] = ABSENT
    lanes: Literal[4, 8, 16] = ABSENT
    source: NonEmpty
    note: NonEmpty = ABSENT

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        groups = (
            ("bus_width_bits", "memory_rate_gbps"),
            ("cores", "boost_mhz", "flops_per_core_clock"),
            ("pcie", "lanes"),
        )
        for keys in groups:
            given = [key for key in keys if key in self.model_fields_set]
            if given and len(given) < len(keys):
                raise validation_error(f"{', '.join(given)} alone", f"all of {', '.join(keys)}")
        return self


class GpuTableFile(TomlTable):
    """The table: GPUs, and the publications that they name as their source."""

    gpu: ListOf[GpuPart]
    source: DictOf[Name, SourcePart]


@dataclass(frozen=True)
class GpuFigures:
    """What a vendor publishes of a GPU, in the units of a cluster file.

    Attributes
    ----------
    name : str
        What cluster files call it, such as ``"rtx-4090"``.
    vendor, title : str
        Whose it is, and what they call it.
    memory_gib : float
        Memory in units of 2**30 bytes.
    memory_bandwidth_gbs : float
        Memory bandwidth in units of 1e9 bytes a second.
    tflops : float
        1e12 operations a second in ``dtype``: dense, accumulated in fp32.
    dtype : str
        ``"bf16"``, or ``"fp16"`` where it has no bf16.
    load_gbs : float
        1e9 bytes a second from the host's memory, a share of the link's rate.
    host_link : str
        That link, such as ``"PCIe 4.0 x16"`` or ``"shared memory"``.
    launch_overhead_us : float, optional
        Microseconds to start a kernel, where they are known.
    source_title, source_url : str
        The publication that the figures come from; ``source_url`` may be empty.
    note : str
        What to know about the figures; may be empty.
    """

    name: str
    vendor: str
    title: str
    memory_gib: float
    memory_bandwidth_gbs: float
    tflops: float
    dtype: str
    load_gbs: float
    host_link: str
    launch_overhead_us: float | None
    source_title: str
    source_url: str
    note: str

    def to_json(self) -> dict[str, Any]:
        """The fields in their order, without those that are not known."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}

    def cluster_keys(self) -> dict[str, float]:
        """The keys that it stands for in a cluster file's table of a GPU, with their values."""
        keys = ("memory_gib", "memory_bandwidth_gbs", "tflops", "launch_overhead_us", "load_gbs")
        values = {key: getattr(self, key) for key in keys}
        return {key: value for key, value in values.items() if value is not None}


def gpu_figures(name: str) -> GpuFigures:
    """The published figures of a GPU by its name, as ``gpu = "..."`` in a cluster file gives them.

    >>> gpu_figures("rtx-4090").memory_gib
    24.0

    Raises
    ------
    InputError
        No GPU of the table has this name; names the most similar one.
    """
    found = gpu_table().get(name)
    if found is None:
        raise InputError(
            short_repr(name),
            expected=f"a GPU of the table{similar_gpu(name)}",
            remedy="prism-plan gpus lists them",
        )
    return found


@functools.cache
def gpu_table() -> Mapping[str, GpuFigures]:
    """All GPUs of the table by their names, in its order."""
    file = read_gpu_table()
    return {part.name: _figures(part, file.source[part.source]) for part in file.gpu}


def read_gpu_table() -> GpuTableFile:
    """The table as it stands in the package, with what its figures are checked with."""
    path = importlib.resources.files("prism_plan") / "gpu_table" / "gpus.toml"
    values = parse_toml(path.read_text(encoding="utf-8"), path)
    return validate(GpuTableFile, values, source=path)


def matching_gpus(text: str) -> tuple[GpuFigures, ...]:
    """GPUs whose name, or whose vendor and title, contain a text; in the order of the table."""
    word = text.strip().lower()
    name = _as_name(text)
    return tuple(
        gpu
        for gpu in gpu_table().values()
        if (name and name in gpu.name) or (word and word in f"{gpu.vendor} {gpu.title}".lower())
    )


def similar_gpu(name: str) -> str:
    """``", did you mean 'rtx-4090'?"``, or nothing; spaces and capitals are no difference."""
    if len(name) > MAX_COMPARED_LENGTH:
        return ""
    word = _as_name(name)
    longer = [repr(known) for known in gpu_table() if word and known.startswith(f"{word}-")]
    if longer:  # "a100" means one of these, though it is more similar to "a10"
        return f", did you mean {' or '.join(longer[:3])}?"
    return did_you_mean(word, gpu_table())


def _as_name(text: str) -> str:
    """A text as names are spelt: ``"GeForce RTX 4090"`` is ``"rtx-4090"``."""
    words = text.lower().replace("_", " ").replace("-", " ").split()
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "amd", "radeon"))


def _figures(part: GpuPart, source: SourcePart) -> GpuFigures:
    if part.pcie is None:
        load_gbs = part.memory_bandwidth_gbs * SHARED_MEMORY_SHARE
        load_gbs, host_link = min(load_gbs, MAX_SHARED_MEMORY_LOAD_GBS), "shared memory"
    else:
        load_gbs = PCIE_LANE_GBS[part.pcie] * part.lanes * PCIE_SHARE
        host_link = f"PCIe {part.pcie}.0 x{part.lanes}"
    return GpuFigures(
        name=part.name,
        vendor=part.vendor,
        title=part.title,
        memory_gib=part.memory_gib,
        memory_bandwidth_gbs=part.memory_bandwidth_gbs,
        tflops=part.tflops,
        dtype=part.dtype,
        load_gbs=round(load_gbs, 1),
        host_link=host_link,
        launch_overhead_us=part.launch_overhead_us,
        source_title=source.title,
        source_url=source.url,
        note=part.note or "",
    )
