"""Which GPU executes which decoder layers of one head's requests: what engines of layers can take.

An engine of layers (llama.cpp, pipeline partitions) holds and executes a decoder layer as a whole
on one GPU, for the requests of one *head*: the server whose users ask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, InputError
from prism_plan.model_spec import ModelShape, ModelSpec
from prism_plan.placement import Placement
from prism_plan.printable_text import quantity

Ints = npt.NDArray[np.int64]
#: For each server what each of its GPUs has for experts.
Capacity = tuple[tuple[int, ...], ...]


class Stage(NamedTuple):
    """Decoder layers ``first`` to ``last`` on one GPU of a server, in the order of execution."""

    server: int
    gpu: int
    first: int
    last: int

    @property
    def num_layers(self) -> int:
        """How many decoder layers."""
        return self.last - self.first + 1


def moe_position_of(model: ModelSpec) -> Ints:
    """The MoE layer position with which each decoder layer executes, int64 [decoder layers].

    Layers without routed experts execute with the MoE layer that follows them, those after the last
    MoE layer with it (docs/design.md, section 10).
    """
    layers = np.arange(model.num_decoder_layers)
    found = np.searchsorted(np.array(model.moe_layers), layers)
    return np.minimum(found, model.num_layers - 1)


def partial_layer(plan: Placement, head: int) -> str:
    """Why an engine of layers cannot take a plan for a head, or empty.

    It can where the server that executes a layer holds all experts of it, and where every layer
    executes at the head and some server holds it whole.
    """
    row = plan.execution_table[head]
    whole = np.asarray(plan.local.all(axis=2))  # [N, L]
    name, layers = plan.servers[head], plan.model.moe_layers
    at_home = executes_at_home_of(plan, head)
    for at, layer in enumerate(layers):
        if at_home and not whole[:, at].any():
            return f"no server holds layer {layer} whole"
        if not at_home and not whole[row[at], at]:
            return (
                f"layer {layer} of {name!r} executes at {plan.servers[row[at]]!r}, which holds "
                f"{int(plan.local[row[at], at].sum())} of its {plan.model.num_experts} experts"
            )
    return ""


def executes_at_home_of(plan: Placement, head: int) -> bool:
    """Whether every layer of a head's requests executes there."""
    return bool((plan.execution_table[head] == head).all())


def stages(
    plan: Placement, model: ModelSpec, head: int, capacity: Capacity | None = None
) -> list[Stage]:
    """The stages of a head's requests, in the order in which they execute.

    ``capacity`` is what GPUs have for experts, by default what the plan says.

    On a server with several GPUs the layers of a span fill one GPU after the other, as far as each
    has room for whole layers.

    Raises
    ------
    Infeasible
        No way of taking whole layers fits the GPUs of a server, which share the experts of a layer
        in the plan.
    """
    servers = plan.execution_table[head][moe_position_of(model)]
    room = _Room(plan, model, capacity or plan.gpu_capacity)
    found: list[Stage] = []
    for layer, server in enumerate(servers.tolist()):
        last = found[-1] if found else None
        same = last is not None and last.server == server
        gpu = room.take(server, layer, last.gpu if last is not None and same else 0)
        if last is not None and same and last.gpu == gpu:
            found[-1] = last._replace(last=layer)
        else:
            found.append(Stage(server, gpu, layer, layer))
    return found


class _Room:
    """What is left of each GPU for the experts of whole layers."""

    def __init__(self, plan: Placement, model: ModelSpec, capacity: Capacity) -> None:
        self._plan = plan
        self._left = [list(gpus) for gpus in capacity]
        self._size = _sizes(plan.model, model)

    def take(self, server: int, layer: int, begin: int = 0) -> int:
        """The GPU of a server that takes a decoder layer: the first from ``begin`` with room."""
        left, needed = self._left[server], self._size[layer]
        gpus = range(len(left))
        order = [*gpus[begin:], *gpus[:begin]]
        gpu = next((g for g in order if left[g] >= needed), -1)
        if gpu < 0:
            unit = "experts" if self._plan.model.equal_expert_bytes else "bytes"
            raise Infeasible(
                f"GPUs of {self._plan.servers[server]!r} have {left} {unit} left for decoder "
                f"layer {layer}, which one of them has to hold whole",
                shortfall=needed - max(left),
                unit=unit,
                remedy="plan with one GPU a server, or with more memory",
            )
        left[gpu] -= needed
        return gpu


def _sizes(shape: ModelShape, model: ModelSpec) -> list[int]:
    """What a decoder layer's experts take, in the unit of capacities; 0 for dense layers."""
    sizes = [0] * model.num_decoder_layers
    for at, layer in enumerate(model.moe_layers):
        unit = 1 if shape.equal_expert_bytes else shape.expert_bytes_by_layer[at]
        sizes[layer] = shape.num_experts * unit
    return sizes


def gpus_of_held_layers(
    plan: Placement, model: ModelSpec, head: int, capacity: Capacity | None = None
) -> dict[int, tuple[int, int]]:
    """Decoder layer -> server and GPU of its experts, of :func:`layers_held_elsewhere`.

    The head's own layers have to be whole on its GPUs too.

    Raises
    ------
    Infeasible
        A layer fits no GPU whole.
    """
    room = _Room(plan, model, capacity or plan.gpu_capacity)
    held = layers_held_elsewhere(plan, model, head)
    for layer in model.moe_layers:
        if layer not in held:
            room.take(head, layer)
    return {layer: (server, room.take(server, layer)) for layer, server in held.items()}


def layers_held_elsewhere(plan: Placement, model: ModelSpec, head: int) -> dict[int, int]:
    """Decoder layer -> server that holds its experts whole, where the head itself does not.

    Of a plan with every layer of the head at home; of several servers the first one.
    """
    whole = np.asarray(plan.local.all(axis=2))
    found = {}
    for at, layer in enumerate(model.moe_layers):
        if not whole[head, at]:
            found[layer] = int(whole[:, at].argmax())
    return found


def head_of(plan: Placement, name: str | None) -> int:
    """The head by its name, or the only server that a plan has been made for.

    Raises
    ------
    InputError
        There is no such server, or none is named and several have users.
    """
    heads = plan.plan.extra.get("heads")
    if name is None:
        names = [str(head) for head in heads] if isinstance(heads, list) else list(plan.servers)
        if len(names) == 1 and names[0] in plan.servers:
            return plan.servers.index(names[0])
        raise InputError(
            f"{quantity(len(names), 'server')} may ask, and an engine of layers serves one head",
            parameter="home",
            expected=f"one of {', '.join(plan.servers)}",
        )
    if name not in plan.servers:
        raise InputError(
            f"unknown server {name!r:.60}",
            parameter="home",
            expected=f"one of {', '.join(plan.servers)}",
        )
    return plan.servers.index(name)
