"""The shape that engines with expert maps have: ranks of equally many slots in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_plan.errors import Infeasible, InputError
from prism_plan.printable_text import quantity


@dataclass(frozen=True)
class EqualSlots:
    """``ranks`` are the servers of the ranks, in order; each has ``slots`` in every MoE layer."""

    ranks: tuple[int, ...]
    slots: int

    @property
    def physical(self) -> int:
        """Slots of all ranks together in a layer."""
        return self.slots * len(self.ranks)

    def of_server(self, server: int) -> list[int]:
        """The ranks of a server."""
        return [rank for rank, own in enumerate(self.ranks) if own == server]


def equal_slots(
    gpu_capacity: Sequence[Sequence[int]], num_layers: int, num_experts: int,
    asked: int | None = None,
) -> EqualSlots:  # fmt: skip
    """A rank a GPU, with the slots that the smallest one has, or those that are ``asked`` for.

    ``gpu_capacity`` are experts by server and GPU. A rank never has more slots than there are
    experts, for it would hold one twice.

    Raises
    ------
    InputError
        More slots are asked for than the smallest GPU has, or fewer than hold all experts.
    Infeasible
        All slots together are fewer than the experts of a layer.
    """
    ranks = tuple(n for n, gpus in enumerate(gpu_capacity) for _ in gpus)
    smallest = min(capacity for gpus in gpu_capacity for capacity in gpus)
    slots = min(smallest // num_layers, num_experts)
    least = -(-num_experts // len(ranks))
    if asked is not None and slots >= least:
        if not least <= asked <= slots:
            raise InputError(
                f"{asked}",
                parameter="slots",
                expected=f"{least} to {slots}: {quantity(len(ranks), 'rank')} have to hold "
                f"{num_experts} experts a layer, and the smallest GPU has room for {smallest:,} "
                f"experts of {quantity(num_layers, 'layer')}",
            )
        slots = asked
    if slots * len(ranks) < num_experts:
        raise Infeasible(
            f"{quantity(len(ranks), 'rank')} of {quantity(slots, 'slot')} a layer hold "
            f"{slots * len(ranks)} of {num_experts} experts; the smallest GPU needs "
            f"{least * num_layers:,}",
            shortfall=num_experts - slots * len(ranks),
            unit="slots",
            remedy="add memory to it, or leave it out",
        )
    return EqualSlots(ranks, slots)
