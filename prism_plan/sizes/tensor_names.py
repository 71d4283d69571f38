"""What the name of a stored tensor says: layer, routed expert, attention, output head, and so on.

Names are those of checkpoints (``layers.3.mlp.experts.5.…``), of stacked experts
(``experts.gate_up_proj``), of MLX (``switch_mlp``) and of GGUF (``ffn_up_exps``).
"""

from __future__ import annotations

import re

#: A tensor of a layer: the number of the layer, and the path of the tensor below it.
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|blk|h)\.(?P<layer>\d{1,9})\.(?P<rest>.+)$")

#: A tensor of one expert.
ONE_EXPERT = re.compile(
    r"(?:^|\.)experts\.(?:expert_)?(?P<expert>\d{1,9})\."
    r"|^ffn_(?:gate|up|down)\.(?P<gguf>\d{1,9})\."  # GGUF of the first Mixtrals
)
#: A tensor of all routed experts of a layer.
ALL_EXPERTS = re.compile(
    r"(?:^|\.)experts\."
    r"|(?:^|\.)switch_mlp\."  # MLX
    r"|^ffn_(?:gate|up|down|gate_up)_exps\."  # GGUF
    r"|(?:^|\.)block_sparse_moe\.(?:input|output)_linear\."  # Granite
    r"|(?:^|\.)moe\.(?:gate|up|down)_proj\."  # Step
)
#: Below the experts, but not weights of theirs: what routes to them, and metadata of a quantiser
#: that is read once and kept by no GPU.
NO_EXPERT = re.compile(r"correction_bias|(?:^|[._])router|quant_state\.")
#: An attention of experts (JetMoe) has a router of its own, whose calls are in no trace.
ATTENTION_EXPERTS = re.compile(r"^self_attention\.experts\.")

#: Parts of a checkpoint that ordinary decoding of text does not use.
OTHER_PARTS = re.compile(
    r"(?:^|\.)(?:mtp|nextn|eagle|vision|visual|image|video|audio|speech|talker|token2wav|code2wav|"
    r"sam_model|projector|multi_modal|mm_)"
)
#: What routes tokens to the experts of a layer.
ROUTER = re.compile(
    r"(?:^|\.)(?:mlp|block_sparse_moe|moe|feed_forward)\.(?:gate|router)\.(?:wg\.)?weight$"
    r"|^ffn_gate_inp\.weight$"
)
#: Suffixes of a projection that is stored in several tensors.
SUFFIX = re.compile(r"_(?:blocks|scales|bias|packed|scale|qweight|qzeros|scale_inv)$")

#: The output head, wherever it stands.
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output|head)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|token_embd|tok_embeddings|wte|embed)\.")

#: Layers that keep a state of one size in place of keys and values: linear attention, Mamba,
#: short convolutions.
STATE = re.compile(
    r"(?:^|\.)(?:linear_attn|mamba|conv|short_conv|shortconv)\."
    r"|A_log|dt_bias|(?:^|\.)ssm_|slope_rate|self_attn\.output_gate"
)
#: Attention with keys and values; some layers hold several (LongCat).
ATTENTION = re.compile(
    r"(?:^|\.)(?:self_attn|attn|self_attention|attention|norm_attn_norm)\.(?P<copy>\d+)?"
    r"|^attn_(?:q|k|kv|qkv|output)|(?:^|\.)(?:[qk]_proj|qkv_proj|Wqkv|kv_a_proj)"
)


def projection_of(name: str) -> str:
    """The projection of an expert that a tensor is of."""
    rest = LAYER.search(name)
    words = (rest["rest"] if rest else name).split(".")
    if words[0].startswith("ffn_"):
        return words[0]
    at = next((i for i, word in enumerate(words) if word in ("experts", "switch_mlp")), None)
    below = words[-2:-1] if at is None else words[at + 1 :]
    below = [word for word in below if not word.removeprefix("expert_").isdigit()]
    return SUFFIX.sub("", below[0]) if below else ""
