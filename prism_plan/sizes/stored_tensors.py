"""Compute the sizes of a model from the list of its stored tensors.

One rule for all sources: a tensor whose name says so belongs to a routed expert
(:mod:`prism_plan.sizes.tensor_names`), everything else of the language model is dense. Bytes are
counted as they are stored, so every quantisation counts right without being known.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from prism_plan.input_limits import MAX_EXPERTS, require_at_most
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.sizes.model_facts import ModelFacts
from prism_plan.sizes.tensor_names import (
    ALL_EXPERTS,
    ATTENTION,
    ATTENTION_EXPERTS,
    EMBEDDING,
    HEAD,
    LAYER,
    NO_EXPERT,
    ONE_EXPERT,
    OTHER_PARTS,
    ROUTER,
    STATE,
    projection_of,
)

BY_HAND = "write the sizes by hand as a model spec (JSON) and give that file"
#: More tensors than any checkpoint has (Kimi-K2 in NVFP4: 300,000), some 300 bytes each.
MAX_TENSORS = 2**21
_AGAIN = "copy or download the checkpoint again"


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint; ``begin`` is its position in the file, where it is in one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    begin: int = 0


def spec_from_tensors(
    tensors: Iterable[StoredTensor], facts: ModelFacts, *, name: str, source: object
) -> ModelSpec:
    """Compute the model spec from the stored tensors of a model.

    Layers from ``facts.num_decoder_layers`` on are left out (multi-token prediction), and so are
    parts for images, sound and drafts. Of a multimodal checkpoint (``facts.nested``) only what is
    under the same prefix as the layers with experts counts, and the output head. A head that is
    tied to the embeddings counts once, even where it is stored.

    Raises
    ------
    InputError
        There are no routed experts; an expert is missing, or larger than others of its layer; their
        number is not that of the configuration; attention is routed to experts too.
    """
    layered, others = _language_model(tensors, facts, source, name)
    num_layers = facts.num_decoder_layers
    separate: dict[int, dict[int, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    stacked: dict[int, list[StoredTensor]] = defaultdict(list)
    dense = 0
    attention: dict[int, set[str]] = defaultdict(set)
    states = set()
    for layer, rest, tensor in layered:
        if layer >= num_layers:
            continue
        one, every = ONE_EXPERT.search(rest), ALL_EXPERTS.search(rest)
        if ATTENTION_EXPERTS.match(rest):
            raise Location(source, tensor.name).error(
                "attention is routed to experts too", remedy="there is no placement for that here"
            )
        if NO_EXPERT.search(rest) or OTHER_PARTS.search(rest) or not (one or every):
            if not OTHER_PARTS.search(rest):
                dense += tensor.num_bytes
            if STATE.search(rest):
                states.add(layer)
            elif found := ATTENTION.search(rest):
                attention[layer].add(found["copy"] or "")
        elif one:
            separate[layer][int(one["expert"] or one["gguf"])].append(tensor)
        else:
            stacked[layer].append(tensor)
    _require_layers({layer for layer, _, _ in layered}, num_layers, source)
    num_experts = _num_experts(separate, stacked, facts, source, name)
    routed = separate.keys() | stacked.keys()
    for layer, rest, tensor in layered:
        if layer < num_layers and layer not in routed and ROUTER.search(rest):
            raise Location(source, tensor.name).error(
                f"layer {layer} has a router and no experts", remedy=_AGAIN
            )
    sizes = {}
    for layer, by_expert in separate.items():
        sizes[layer] = _equal_size(by_expert, layer, num_experts, source)
    _require_same_parts(separate, stacked, source)
    for layer, stack in stacked.items():
        for tensor in stack:
            if not tensor.shape or tensor.shape[0] % num_experts:
                dense += tensor.num_bytes  # one value for all experts
            elif tensor.num_bytes % num_experts:
                raise Location(source, tensor.name).error(
                    f"{tensor.num_bytes:,} bytes",
                    f"a multiple of the {num_experts} experts stacked in it",
                )
            else:
                sizes[layer] = sizes.get(layer, 0) + tensor.num_bytes // num_experts
    heads = [tensor for tensor in others if HEAD.search(tensor.name)]
    tied = facts.tied_embeddings and any(EMBEDDING.search(tensor.name) for tensor in others)
    dense += sum(tensor.num_bytes for tensor in others)
    dense -= sum(tensor.num_bytes for tensor in heads) if tied else 0
    moe_layers = tuple(sorted(sizes))
    expert_bytes = tuple(sizes[layer] for layer in moe_layers)
    # number of KV caches of each layer
    caches = {
        layer: max(len(attention.get(layer, ())), int(not attention)) for layer in range(num_layers)
    }
    caches |= dict.fromkeys(states, 0)
    return ModelSpec(
        name=name,
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=facts.top_k_of(num_experts),
        hidden_size=facts.hidden_size,
        dtype_bytes=facts.dtype_bytes,
        expert_bytes=expert_bytes[0] if len(set(expert_bytes)) == 1 else expert_bytes,
        dense_bytes=dense,
        kv_bytes_per_token=facts.kv_bytes(caches),
        num_decoder_layers=num_layers,
        attention_flops=facts.attention_flops(caches),
        state_bytes_per_request=facts.dtype_bytes * facts.state_numbers * len(states),
    )


def _require_layers(found: set[int], num_layers: int, source: object) -> None:
    """Refuse a checkpoint in which a decoder layer has no tensors."""
    missing = next((layer for layer in range(num_layers) if layer not in found), None)
    if missing is not None:
        raise Location(source).error(
            f"layer {missing} has no tensors",
            f"the {num_layers:,} decoder layers of the configuration",
            _AGAIN,
        )


def _require_same_parts(
    separate: dict[int, dict[int, list[StoredTensor]]],
    stacked: dict[int, list[StoredTensor]],
    source: object,
) -> None:
    """Refuse experts that have a projection in some layers and not in others.

    The tensors of a projection may differ, for some layers may be quantised in another way.
    """
    parts: dict[int, set[str]] = defaultdict(set)
    for layer, by_expert in separate.items():
        for found in by_expert.values():
            parts[layer] |= {projection_of(tensor.name) for tensor in found}
    for layer, stack in stacked.items():
        parts[layer] |= {projection_of(tensor.name) for tensor in stack}
    every = set[str]().union(*parts.values())
    for layer, own in sorted(parts.items()):
        # a layer may hold gate and up in one tensor, others in two
        if own != every and not any("gate_up" in part for part in every):
            raise Location(source).error(
                f"the experts of layer {layer} have no {', '.join(sorted(every - own))}",
                "the same projections in all layers",
                _AGAIN,
            )


_LayerTensors = list[tuple[int, str, StoredTensor]]


def _language_model(
    tensors: Iterable[StoredTensor], facts: ModelFacts, source: object, name: str
) -> tuple[_LayerTensors, list[StoredTensor]]:
    """The language model's tensors of layers (layer, path below it, tensor), and its others.

    It is recognised by its layers with routed experts.
    """
    names: set[str] = set()
    stems: dict[str, _LayerTensors] = defaultdict(list)
    outside: list[StoredTensor] = []
    with_experts: dict[str, int] = defaultdict(int)
    for number, tensor in enumerate(tensors):
        if number >= MAX_TENSORS:
            require_at_most(number + 1, MAX_TENSORS, "tensors", source=source)
        if tensor.name in names:
            raise Location(source, tensor.name).error("is duplicated", "each tensor once")
        names.add(tensor.name)
        if OTHER_PARTS.search(tensor.name) and not LAYER.search(tensor.name):
            continue
        match = LAYER.search(tensor.name)
        if match is None:
            outside.append(tensor)
            continue
        stem = tensor.name[: match.start()]
        if OTHER_PARTS.search(stem):
            continue
        stems[stem].append((int(match["layer"]), match["rest"], tensor))
        if ONE_EXPERT.search(match["rest"]) or ALL_EXPERTS.search(match["rest"]):
            with_experts[stem] += 1
    if not with_experts:
        raise Location(source).error(
            f"{name} has no MoE layers",
            "tensors of routed experts",
            "give a Mixture-of-Experts model, or a model spec if its experts are elsewhere",
        )
    if len(with_experts) > 1:
        raise Location(source).error(
            f"layers with experts under {' and under '.join(map(repr, sorted(with_experts)))}",
            "one language model",
            BY_HAND,
        )
    stem = next(iter(with_experts))
    if not facts.nested:
        # such as a list of dense layers before that with experts
        outside += [item[-1] for other in stems if other != stem for item in stems[other]]
    beside = [
        tensor
        for tensor in outside
        if not facts.nested
        or not stem
        or tensor.name.startswith(f"{stem}.")
        or HEAD.search(tensor.name)
    ]
    return stems[stem], beside


def _num_experts(
    separate: dict[int, dict[int, list[StoredTensor]]],
    stacked: dict[int, list[StoredTensor]],
    facts: ModelFacts,
    source: object,
    name: str,
) -> int:
    """The number of routed experts of a layer, compared with the configuration."""
    if not separate and not stacked:
        raise Location(source).error(f"{name} has no MoE layers")
    counts = {len(by_expert) for by_expert in separate.values()}
    counts |= {
        tensor.shape[0] for found in stacked.values() for tensor in found if len(tensor.shape) > 2
    }
    stated = facts.num_experts
    if not counts and stated:
        counts = set(stated[:1])  # DBRX stacks experts in matrices
    if len(counts) > 1 and separate and max(counts) in stated:
        counts = {max(counts)}  # the missing expert is named later on
    if len(counts) != 1:
        found = " and ".join(map(str, sorted(counts))) or "an unknown number of"
        raise Location(source).error(
            f"{found} experts in a layer", "one number for all layers", BY_HAND
        )
    (count,) = counts
    if not 1 <= count <= MAX_EXPERTS:
        require_at_most(count, MAX_EXPERTS, "experts in a layer", source=source)
    if stated and count not in stated:
        raise Location(source).error(
            f"tensors of {count} experts in a layer",
            f"{' or '.join(map(str, stated))}, as the configuration says",
            _AGAIN,
        )
    return count


def _equal_size(
    by_expert: dict[int, list[StoredTensor]], layer: int, num_experts: int, source: object
) -> int:
    """The bytes of an expert of a layer whose experts are stored one by one."""
    missing = next((expert for expert in range(num_experts) if expert not in by_expert), None)
    if missing is not None:
        raise Location(source).error(
            f"expert {missing} of layer {layer} is missing", f"experts 0..{num_experts - 1}", _AGAIN
        )
    sizes = {
        expert: sum(tensor.num_bytes for tensor in found) for expert, found in by_expert.items()
    }
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[small] == sizes[large]:
        return sizes[small]
    one, other = (
        {re.sub(rf"\b{expert}\.", "*.", tensor.name.rpartition("experts.")[2], count=1): tensor.name
         for tensor in by_expert[expert]}
        for expert in (small, large)
    )  # fmt: skip
    absent = sorted(other.keys() - one.keys())
    if absent and not one.keys() - other.keys():
        name = re.sub(
            rf"(experts\.(?:expert_)?|ffn_\w+\.){large}\.", rf"\g<1>{small}.", other[absent[0]]
        )
        raise Location(source).error(
            f"tensor {name} is missing", "the same tensors of all experts of a layer", _AGAIN
        )
    raise Location(source).error(
        f"experts of layer {layer} differ in size: {small} has {sizes[small]:,} bytes, {large} has "
        f"{sizes[large]:,}",
        "experts of one size in each layer",
        BY_HAND,
    )
