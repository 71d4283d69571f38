"""The state that a layer without a KV cache keeps for a request.

Linear attention, Mamba and short convolutions keep a state whose size does not depend on the length
of the request: the recurrent state and the last inputs of the convolution (kernel − 1 of each
channel), as the serving engines hold them.
"""

from __future__ import annotations

from prism_plan.sizes.config_keys import HEADS, HIDDEN, Config


def recurrent_state_numbers(config: Config) -> int:
    """Count the numbers in the state of one such layer; 0 where the configuration gives none."""

    def number(default: int, *keys: str) -> int:
        return config.integer_or(default, *keys, minimum=0)

    kernel = number(4, "linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel")
    if config.present(["linear_num_value_heads"]):  # gated delta rule: Qwen3-Next, Qwen3.5
        key = number(0, "linear_key_head_dim")
        value = number(0, "linear_value_head_dim")
        heads, key_heads = number(0, "linear_num_value_heads"), number(0, "linear_num_key_heads")
        return heads * key * value + (2 * key_heads * key + heads * value) * (kernel - 1)
    own = "linear_attn_config."
    if config.present(["linear_num_heads", f"{own}num_heads"]):  # Kimi Linear
        heads = number(0, "linear_num_heads", f"{own}num_heads")
        width = number(0, "linear_head_dim", f"{own}head_dim")
        kernel = number(kernel, f"{own}short_conv_kernel_size")
        return heads * width * width + 3 * heads * width * (kernel - 1)
    if config.present(["mamba_num_heads", "mamba_n_heads"]):  # Mamba 2: Nemotron-H, Granite 4
        channels = number(0, "mamba_num_heads", "mamba_n_heads")
        channels *= number(0, "mamba_head_dim", "mamba_d_head")
        state = number(0, "ssm_state_size", "mamba_d_state")
        groups = number(1, "n_groups", "mamba_n_groups")
        return channels * state + (channels + 2 * groups * state) * (kernel - 1)
    if config.present(["mamba_d_state"]):  # Mamba: Jamba
        channels = number(2, "mamba_expand") * number(0, *HIDDEN)
        return channels * (number(0, "mamba_d_state") + kernel - 1)
    if config.present(["conv_L_cache"]):  # LFM2
        return number(0, *HIDDEN) * (number(1, "conv_L_cache") - 1)
    if config.present(["attn_type_list", "linear_attn_alpha_factor"]):  # MiniMax-01
        heads = number(1, *HEADS)
        width = number(number(0, *HIDDEN) // max(heads, 1), "head_dim")
        return heads * width * width
    return 0
