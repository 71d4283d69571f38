"""From a list of stored tensors to the sizes of a model.

The one rule for all sources: a tensor whose name says so belongs to a routed expert, everything
else of the language model is dense. Names are those of checkpoints (``layers.3.mlp.experts.5.…``),
of stacked experts (``experts.gate_up_proj``), of MLX (``switch_mlp``) and of GGUF
(``ffn_up_exps``), so every quantisation is counted as it is stored, without being known.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from prism_plan.errors import InputError
from prism_plan.limits import MAX_EXPERTS, require_at_most
from prism_plan.model import ModelSpec
from prism_plan.sizes.config import Facts

BY_HAND = "write the sizes by hand as a model spec (JSON) and give that file"
#: More tensors than any checkpoint has (Kimi-K2 in NVFP4: 300,000), some 300 bytes each.
MAX_TENSORS = 2**21


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint: its name, the kind of its numbers, shape and size in bytes.

    ``begin`` is its position in the file, where it is in one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    begin: int = 0


#: What stands before the number of a layer, and the path of a tensor below the layer.
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|blk|h)\.(?P<layer>\d{1,9})\.(?P<rest>.+)$")

#: A tensor of one expert.
_ONE_EXPERT = re.compile(
    r"(?:^|\.)experts\.(?:expert_)?(?P<expert>\d{1,9})\."
    r"|^ffn_(?:gate|up|down)\.(?P<gguf>\d{1,9})\."  # GGUF of the first Mixtrals
)
#: A tensor of all routed experts of a layer.
_ALL_EXPERTS = re.compile(
    r"(?:^|\.)experts\."
    r"|(?:^|\.)switch_mlp\."  # MLX
    r"|^ffn_(?:gate|up|down|gate_up)_exps\."  # GGUF
    r"|(?:^|\.)block_sparse_moe\.(?:input|output)_linear\."  # Granite
    r"|(?:^|\.)moe\.(?:gate|up|down)_proj\."  # Step
)
#: Below the experts, and none of theirs: what routes to them, and notes of a quantiser that are
#: read once and kept by no GPU.
_NO_EXPERT = re.compile(r"correction_bias|(?:^|[._])router|quant_state\.")
#: An attention of experts (JetMoe) has a router of its own, whose calls no trace tells.
_ATTENTION_EXPERTS = re.compile(r"^self_attention\.experts\.")

#: Parts of a checkpoint that ordinary decoding of text does not use, by a part of the name.
_OTHER_PARTS = re.compile(
    r"(?:^|\.)(?:mtp|nextn|eagle|vision|visual|image|video|audio|speech|talker|token2wav|code2wav|"
    r"sam_model|projector|multi_modal|mm_)"
)
#: What routes tokens to the experts of a layer.
_ROUTER = re.compile(
    r"(?:^|\.)(?:mlp|block_sparse_moe|moe|feed_forward)\.(?:gate|router)\.(?:wg\.)?weight$"
    r"|^ffn_gate_inp\.weight$"
)
#: What the name of a projection ends with where it is stored in several tensors.
_SUFFIX = re.compile(r"_(?:blocks|scales|bias|packed|scale|qweight|qzeros|scale_inv)$")
_AGAIN = "copy or download the checkpoint again"

#: The output head, wherever it stands.
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output|head)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|token_embd|tok_embeddings|wte|embed)\.")

#: Layers that keep a state of one size in place of keys and values: linear attention, Mamba,
#: short convolutions.
_STATE = re.compile(
    r"(?:^|\.)(?:linear_attn|mamba|conv|short_conv|shortconv)\."
    r"|A_log|dt_bias|(?:^|\.)ssm_|slope_rate|self_attn\.output_gate"
)
#: Attention with keys and values; some layers hold several (LongCat).
_ATTENTION = re.compile(
    r"(?:^|\.)(?:self_attn|attn|self_attention|attention|norm_attn_norm)\.(?P<copy>\d+)?"
    r"|^attn_(?:q|k|kv|qkv|output)|(?:^|\.)(?:[qk]_proj|qkv_proj|Wqkv|kv_a_proj)"
)


def spec_from_tensors(
    tensors: Iterable[StoredTensor], facts: Facts, *, name: str, source: object
) -> ModelSpec:
    """Add up the stored tensors of a model.

    Layers from ``facts.num_decoder_layers`` on are left out (multi-token prediction), and so are
    images, sound and drafts; of a multimodal checkpoint (``facts.part_of_a_whole``) everything
    counts that stands beside the layers with experts, and the output head. A head that is tied to
    the embeddings counts once, also where it is stored.

    Raises
    ------
    InputError
        There are no routed experts; an expert is missing, or larger than others of its layer; their
        number is not that of the configuration; attention is routed to experts too.
    """
    main, others = _language_model(tensors, facts, source, name)
    last = facts.num_decoder_layers
    one_by_one: dict[int, dict[int, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    stacked: dict[int, list[StoredTensor]] = defaultdict(list)
    dense = 0
    attention: dict[int, set[str]] = defaultdict(set)
    states = set()
    for layer, rest, tensor in main:
        if layer >= last:
            continue
        one, every = _ONE_EXPERT.search(rest), _ALL_EXPERTS.search(rest)
        if _ATTENTION_EXPERTS.match(rest):
            raise InputError(
                "attention is routed to experts too",
                source=source,
                place=tensor.name,
                remedy="there is no placement for that here",
            )
        if _NO_EXPERT.search(rest) or _OTHER_PARTS.search(rest) or not (one or every):
            if not _OTHER_PARTS.search(rest):
                dense += tensor.num_bytes
            if _STATE.search(rest):
                states.add(layer)
            elif found := _ATTENTION.search(rest):
                attention[layer].add(found["copy"] or "")
        elif one:
            one_by_one[layer][int(one["expert"] or one["gguf"])].append(tensor)
        else:
            stacked[layer].append(tensor)
    _require_layers({layer for layer, _, _ in main}, last, source)
    num_experts = _num_experts(one_by_one, stacked, facts, source, name)
    routed = one_by_one.keys() | stacked.keys()
    for layer, rest, tensor in main:
        if layer < last and layer not in routed and _ROUTER.search(rest):
            raise InputError(
                f"layer {layer} has a router and no experts",
                source=source,
                place=tensor.name,
                remedy=_AGAIN,
            )
    sizes = {}
    for layer, by_expert in one_by_one.items():
        sizes[layer] = _equal_size(by_expert, layer, num_experts, source)
    _require_same_parts(one_by_one, stacked, source)
    for layer, stack in stacked.items():
        for tensor in stack:
            if not tensor.shape or tensor.shape[0] % num_experts:
                dense += tensor.num_bytes  # one number for all of them
            elif tensor.num_bytes % num_experts:
                raise InputError(
                    f"{tensor.num_bytes:,} bytes",
                    source=source,
                    place=tensor.name,
                    expected=f"a multiple of the {num_experts} experts stacked in it",
                )
            else:
                sizes[layer] = sizes.get(layer, 0) + tensor.num_bytes // num_experts
    heads = [tensor for tensor in others if _HEAD.search(tensor.name)]
    tied = facts.tied and any(_EMBEDDING.search(tensor.name) for tensor in others)
    dense += sum(tensor.num_bytes for tensor in others)
    dense -= sum(tensor.num_bytes for tensor in heads) if tied else 0
    moe_layers = tuple(sorted(sizes))
    expert_bytes = tuple(sizes[layer] for layer in moe_layers)
    # How many caches of keys and values each layer has.
    caching = {
        layer: max(len(attention.get(layer, ())), int(not attention)) for layer in range(last)
    }
    caching |= dict.fromkeys(states, 0)
    return ModelSpec(
        name=name,
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=facts.top_k_of(num_experts),
        hidden_size=facts.hidden_size,
        dtype_bytes=facts.dtype_bytes,
        expert_bytes=expert_bytes[0] if len(set(expert_bytes)) == 1 else expert_bytes,
        dense_bytes=dense,
        kv_bytes_per_token=facts.kv_bytes(caching),
        num_decoder_layers=last,
        attention_flops=facts.attention_flops(caching),
        state_bytes_per_request=facts.dtype_bytes * facts.state_numbers * len(states),
    )


def _require_layers(found: set[int], last: int, source: object) -> None:
    """Refuse a checkpoint in which a decoder layer has no tensors."""
    missing = next((layer for layer in range(last) if layer not in found), None)
    if missing is not None:
        raise InputError(
            f"layer {missing} has no tensors",
            source=source,
            expected=f"the {last:,} decoder layers of the configuration",
            remedy=_AGAIN,
        )


def _require_same_parts(
    one_by_one: dict[int, dict[int, list[StoredTensor]]],
    stacked: dict[int, list[StoredTensor]],
    source: object,
) -> None:
    """Refuse experts that have a projection in some layers and not in others.

    The tensors of a projection may differ, for some layers may be quantised in another way.
    """
    parts: dict[int, set[str]] = defaultdict(set)
    for layer, by_expert in one_by_one.items():
        for found in by_expert.values():
            parts[layer] |= {_part(tensor.name) for tensor in found}
    for layer, stack in stacked.items():
        parts[layer] |= {_part(tensor.name) for tensor in stack}
    every = set[str]().union(*parts.values())
    for layer, own in sorted(parts.items()):
        # a layer may hold gate and up in one tensor, others in two
        if own != every and not any("gate_up" in part for part in every):
            raise InputError(
                f"the experts of layer {layer} have no {', '.join(sorted(every - own))}",
                source=source,
                expected="the same projections in all layers",
                remedy=_AGAIN,
            )


def _part(name: str) -> str:
    """The projection of an expert that a tensor is of."""
    rest = _LAYER.search(name)
    words = (rest["rest"] if rest else name).split(".")
    if words[0].startswith("ffn_"):
        return words[0]
    at = next((i for i, word in enumerate(words) if word in ("experts", "switch_mlp")), None)
    below = words[-2:-1] if at is None else words[at + 1 :]
    below = [word for word in below if not word.removeprefix("expert_").isdigit()]
    return _SUFFIX.sub("", below[0]) if below else ""


_Main = list[tuple[int, str, StoredTensor]]


def _language_model(
    tensors: Iterable[StoredTensor], facts: Facts, source: object, name: str
) -> tuple[_Main, list[StoredTensor]]:
    """Tell the tensors of decoder layers, and the others, of the language model apart.

    Layers with routed experts tell the language model from others in the checkpoint.
    """
    names: set[str] = set()
    stems: dict[str, _Main] = defaultdict(list)
    outside: list[StoredTensor] = []
    with_experts: dict[str, int] = defaultdict(int)
    for number, tensor in enumerate(tensors):
        if number >= MAX_TENSORS:
            require_at_most(number + 1, MAX_TENSORS, "tensors", source=source)
        if tensor.name in names:
            raise InputError(
                "stands twice", source=source, place=tensor.name, expected="each tensor once"
            )
        names.add(tensor.name)
        if _OTHER_PARTS.search(tensor.name) and not _LAYER.search(tensor.name):
            continue
        match = _LAYER.search(tensor.name)
        if match is None:
            outside.append(tensor)
            continue
        stem = tensor.name[: match.start()]
        if _OTHER_PARTS.search(stem):
            continue
        stems[stem].append((int(match["layer"]), match["rest"], tensor))
        if _ONE_EXPERT.search(match["rest"]) or _ALL_EXPERTS.search(match["rest"]):
            with_experts[stem] += 1
    if not with_experts:
        raise InputError(
            f"{name} has no MoE layers",
            source=source,
            expected="tensors of routed experts",
            remedy="give a Mixture-of-Experts model, or a model spec if its experts are elsewhere",
        )
    if len(with_experts) > 1:
        raise InputError(
            f"layers with experts under {' and under '.join(map(repr, sorted(with_experts)))}",
            source=source,
            expected="one language model",
            remedy=BY_HAND,
        )
    stem = next(iter(with_experts))
    if not facts.part_of_a_whole:
        # such as a dense stack of layers before the one with experts
        outside += [item[-1] for other in stems if other != stem for item in stems[other]]
    beside = [
        tensor
        for tensor in outside
        if not facts.part_of_a_whole
        or not stem
        or tensor.name.startswith(f"{stem}.")
        or _HEAD.search(tensor.name)
    ]
    return stems[stem], beside


def _num_experts(
    one_by_one: dict[int, dict[int, list[StoredTensor]]],
    stacked: dict[int, list[StoredTensor]],
    facts: Facts,
    source: object,
    name: str,
) -> int:
    """Count the routed experts of a layer, and compare with the configuration."""
    if not one_by_one and not stacked:
        raise InputError(f"{name} has no MoE layers", source=source)
    counts = {len(by_expert) for by_expert in one_by_one.values()}
    counts |= {
        tensor.shape[0] for found in stacked.values() for tensor in found if len(tensor.shape) > 2
    }
    stated = facts.num_experts
    if not counts and stated:
        counts = set(stated[:1])  # DBRX stacks experts in matrices
    if len(counts) > 1 and one_by_one and max(counts) in stated:
        counts = {max(counts)}  # the expert that is missing is named further on
    if len(counts) != 1:
        found = " and ".join(map(str, sorted(counts))) or "an unknown number of"
        raise InputError(
            f"{found} experts in a layer",
            source=source,
            expected="one number for all layers",
            remedy=BY_HAND,
        )
    (count,) = counts
    if not 1 <= count <= MAX_EXPERTS:
        require_at_most(count, MAX_EXPERTS, "experts in a layer", source=source)
    if stated and count not in stated:
        raise InputError(
            f"tensors of {count} experts in a layer",
            source=source,
            expected=f"{' or '.join(map(str, stated))}, as the configuration says",
            remedy="copy or download the checkpoint again",
        )
    return count


def _equal_size(
    by_expert: dict[int, list[StoredTensor]], layer: int, num_experts: int, source: object
) -> int:
    """Give the size of an expert of a layer whose experts are stored one by one."""
    remedy = _AGAIN
    missing = next((expert for expert in range(num_experts) if expert not in by_expert), None)
    if missing is not None:
        raise InputError(
            f"expert {missing} of layer {layer} is missing",
            source=source,
            expected=f"experts 0..{num_experts - 1}",
            remedy=remedy,
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
        raise InputError(
            f"tensor {name} is missing",
            source=source,
            expected="the same tensors of all experts of a layer",
            remedy=remedy,
        )
    raise InputError(
        f"experts of layer {layer} differ in size: {small} has {sizes[small]:,} bytes, {large} has "
        f"{sizes[large]:,}",
        source=source,
        expected="experts of one size in each layer",
        remedy=BY_HAND,
    )
