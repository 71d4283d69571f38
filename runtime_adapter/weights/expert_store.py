"""The experts that one server holds, in the slots of its GPUs.

Every GPU of the placement has a pool, a tensor [slots, numbers of an expert]; a slot holds
gate and up, one below the other, and then down. Pools are in shared memory (CPU) or can be opened
by another process (CUDA), so that all processes of a server compute with one copy of the weights: a
store that is pickled to a spawned process is the same memory there. Each process has a table of its
own of which pair is in which slot; the process that loads and drops sends the others each
:class:`Change`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.context import assert_spawning
from typing import Any, Literal, NamedTuple, Self

import torch
from torch.nn import functional

from prism_plan.errors import InputError, did_you_mean
from runtime_adapter.weights.checkpoint import ExpertShape
from runtime_adapter.weights.checkpoint_families import PARTS

SHARED_MEMORY = "/dev/shm"


class NotHeld(InputError):
    """An expert was called on a server that does not hold it."""


class Change(NamedTuple):
    """An expert that was loaded into a slot or dropped from it."""

    kind: Literal["load", "drop"]
    pair: int
    gpu: int
    slot: int


class ExpertStore:
    """Experts of one server, by (layer, expert) pair ``l * E + e`` and GPU of the server.

    Made by :meth:`create`. One process loads and drops; any number of threads may compute. A slot
    is written before its expert is in the table. Drop an expert only when nothing computes with it
    any more (:mod:`runtime_adapter.control.slot_release`).
    """

    def __init__(self, shape: ExpertShape, pools: Sequence[torch.Tensor]) -> None:
        self.shape = shape
        self.pools = tuple(pools)
        self._lock = threading.Lock()
        self._free = [list(range(len(pool)))[::-1] for pool in self.pools]
        self._table: dict[int, tuple[tuple[int, int], ...]] = {}  # pair -> (gpu, slot), ascending
        self._prepare()

    @classmethod
    def create(
        cls,
        shape: ExpertShape,
        gpu_slots: Sequence[int],
        devices: Sequence[torch.device],
        dtype: torch.dtype,
    ) -> Self:
        """Create an empty store with so many slots on each GPU; all memory is allocated now.

        Raises
        ------
        InputError
            The memory is not there, or transformers has no such activation.
        """
        size = shape.numbers * dtype.itemsize
        shared = sum(
            slots * size
            for slots, device in zip(gpu_slots, devices, strict=True)
            if device.type == "cpu"
        )
        _require_free_memory(shared)
        pools = []
        for gpu, (slots, device) in enumerate(zip(gpu_slots, devices, strict=True)):
            try:
                pool = torch.empty(slots, shape.numbers, dtype=dtype, device=device)
                pools.append(pool.share_memory_() if slots else pool)
            except (RuntimeError, MemoryError) as error:
                raise InputError(
                    f"no memory for {slots:,} experts of {size:,} bytes on {device}",
                    source=f"GPU {gpu}",
                    remedy="give the server fewer slots in the cluster file and plan again",
                ) from error
        return cls(shape, pools)

    def _prepare(self) -> None:
        self._activation = _activation(self.shape.activation)
        self._views = [[self._split(row) for row in pool] for pool in self.pools]

    def _split(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2·W, H] and down [H, W] of a slot."""
        into = 2 * self.shape.width * self.shape.hidden_size
        return row[:into].view(-1, self.shape.hidden_size), row[into:].view(-1, self.shape.width)

    # ----------------------------------------------------------------------------------- sharing

    def __getstate__(self) -> dict[str, Any]:
        assert_spawning(self)  # anything else would copy the weights
        with self._lock:
            return {"shape": self.shape, "pools": self.pools, "_table": dict(self._table)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        # by the table, for a process that only applies changes takes no slots itself
        used = {place for places in self._table.values() for place in places}
        self._free = [
            [slot for slot in reversed(range(len(pool))) if (gpu, slot) not in used]
            for gpu, pool in enumerate(self.pools)
        ]
        self._prepare()

    # ------------------------------------------------------------------------------------- table

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the experts are held and computed."""
        dtype: torch.dtype = self.pools[0].dtype
        return dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of a slot."""
        return int(self.shape.numbers * self.dtype.itemsize)

    def put(self, pair: int, gpu: int, parts: Mapping[str, torch.Tensor]) -> Change:
        """Copy an expert into a free slot of a GPU, in the store's dtype.

        Raises
        ------
        InputError
            The GPU is full or holds the expert already, or a part has another shape.
        """
        for part in PARTS:
            found = tuple(parts[part].shape)
            if found != self.shape.part(part):
                raise InputError(
                    f"shape {list(found)}",
                    source=f"{part} of {self._text(pair)}",
                    expected=f"{list(self.shape.part(part))}",
                )
        with self._lock:
            if any(held_on == gpu for held_on, _ in self._table.get(pair, ())):
                raise InputError(f"GPU {gpu} holds {self._text(pair)} already")
            if not self._free[gpu]:
                raise InputError(
                    f"no free slot for {self._text(pair)}",
                    source=f"GPU {gpu}",
                    expected=f"at most {len(self.pools[gpu]):,} experts on it",
                )
            slot = self._free[gpu].pop()
        gate_up, down = self._views[gpu][slot]
        width = self.shape.width
        gate_up[:width].copy_(parts["gate"])
        gate_up[width:].copy_(parts["up"])
        down.copy_(parts["down"])
        if gate_up.is_cuda:  # the copy is only queued; others must not compute with a part of it
            torch.cuda.current_stream(gate_up.device).synchronize()
        change = Change("load", pair, gpu, slot)
        self.apply(change)
        return change

    def parts(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of gate, up and down of an expert whose weights are laid out as in a slot."""
        gate_up, down = self._split(weights)
        gate, up = gate_up.chunk(2)
        return {"gate": gate, "up": up, "down": down}

    def copy(self, pair: int, target: torch.Tensor) -> bool:
        """Copy an expert's weights from its slot; False if it is not held, or dropped meanwhile.

        Another thread may drop it during the copy, and load another expert into the slot.
        """
        held = self._table.get(pair)
        if held is None:
            return False
        gpu, slot = held[0]
        target.copy_(self.pools[gpu][slot])
        return held[0] in self._table.get(pair, ())

    def drop(self, pair: int, gpu: int) -> Change:
        """Take an expert out of the table and free its slot.

        Raises
        ------
        NotHeld
            The GPU does not hold it.
        """
        slot = dict(self._table.get(pair, ())).get(gpu)
        if slot is None:
            raise NotHeld(f"GPU {gpu} does not hold {self._text(pair)}")
        change = Change("drop", pair, gpu, slot)
        self.apply(change)
        with self._lock:
            self._free[gpu].append(slot)
        return change

    def apply(self, change: Change) -> None:
        """Update the table by what a process of the server has loaded or dropped."""
        with self._lock:
            held = dict(self._table.get(change.pair, ()))
            if change.kind == "load":
                held[change.gpu] = change.slot
            else:
                held.pop(change.gpu, None)
            # one assignment of a new tuple: threads that compute see either the old or the new one
            if held:
                self._table[change.pair] = tuple(sorted(held.items()))
            else:
                self._table.pop(change.pair, None)

    def held(self) -> list[tuple[int, int, int]]:
        """(GPU, pair, slot) of every expert that is in the table, in order."""
        with self._lock:
            return sorted(
                (gpu, pair, slot) for pair, places in self._table.items() for gpu, slot in places
            )

    def has(self, pair: int) -> bool:
        """Whether any GPU holds the expert."""
        return pair in self._table

    def gpu_of(self, pair: int) -> int:
        """The lowest GPU that holds the expert, or -1."""
        held = self._table.get(pair)
        return held[0][0] if held else -1

    def _text(self, pair: int) -> str:
        return self.shape.spec.pair_text(pair)

    # --------------------------------------------------------------------------------- computing

    def compute(self, layer_position: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """``down(act(gate(x)) · up(x))`` of one expert, x and result [t, H] on x's device.

        The arithmetic is that of transformers' experts modules.

        Raises
        ------
        NotHeld
            No GPU holds the expert.
        """
        pair = layer_position * self.shape.spec.num_experts + expert
        held = self._table.get(pair)
        if held is None:
            raise NotHeld(f"{self._text(pair)} is not held here")
        gpu, slot = held[0]
        gate_up, down = self._views[gpu][slot]
        device = x.device
        if device != gate_up.device:
            x = x.to(gate_up.device)
        gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
        result: torch.Tensor = functional.linear(self._activation(gate) * up, down)
        return result if result.device == device else result.to(device)


def _activation(name: str) -> Any:
    if name == "silu":  # equal to transformers' own, whose import takes a worker seconds
        return torch.nn.SiLU()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise InputError(
            f"unknown activation {name!r}{did_you_mean(name, ACT2FN)}",
            source="config.json",
            place="hidden_act",
            expected="an activation of transformers",
        )
    return ACT2FN[name]


def _require_free_memory(shared_bytes: int) -> None:
    """Refuse too large a store: using shared memory that does not exist ends the process."""
    import psutil

    free = psutil.virtual_memory().available
    place, remedy = "memory", "give the server fewer slots in the cluster file and plan again"
    if os.path.isdir(SHARED_MEMORY):
        system = os.statvfs(SHARED_MEMORY)
        shared_free = system.f_bavail * system.f_frsize
        if shared_free < free:
            free, place = shared_free, SHARED_MEMORY
            remedy = f"make {SHARED_MEMORY} larger, or give the server fewer slots"
    if shared_bytes > free:
        raise InputError(
            f"{shared_bytes:,} bytes of experts, and {free:,} bytes are free",
            source=place,
            remedy=remedy,
        )
