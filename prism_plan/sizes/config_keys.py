"""Keys of a Hugging Face ``config.json`` and their spellings, read one by one.

Families spell the same thing in different ways. The spellings follow the ``attribute_map`` of the
configurations of transformers 5.24 and the checkpoints on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from prism_plan.io.location import Location
from prism_plan.printable_text import shown

LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
EXPERTS = (
    *("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    *("num_moe_experts", "ffn_config.moe_num_experts"),
)
TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    *("top_k_experts", "experts_per_token", "ffn_config.moe_top_k", "n_activated_experts"),
)
HEADS = ("num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_attention_groups", "attn_config.kv_n_heads")
HEAD_DIM = ("head_dim", "kv_channels")

#: No model has more of anything; a larger value is a slip.
MAX_SIZE = 2**31 - 1


class Config:
    """The values of a configuration; every error names file, key and value."""

    def __init__(self, values: Mapping[str, Any], source: object, place: str = "") -> None:
        self.values = values
        self.source = source
        self._place = place

    def place(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def refuse(self, key: str, value: object, expected: str, remedy: str = "") -> NoReturn:
        place = self.place(key)
        raise Location(self.source, place).error(shown(value), expected, remedy)

    def present(self, spellings: Iterable[str]) -> list[str]:
        """Those of the spellings that have a value other than null."""
        return [key for key in spellings if self.get(key) is not None]

    def get(self, key: str) -> Any:
        """The value of a key, or of a key in an object, ``OUTER.INNER``."""
        outer, _, inner = key.partition(".")
        value = self.values.get(outer)
        if not inner:
            return value
        return value.get(inner) if isinstance(value, Mapping) else None

    def integer(self, *spellings: str, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """Read a required whole number from the first spelling that is present."""
        found = self.present(spellings)
        if not found:
            raise Location(self.source, self._place).error(
                f"key {spellings[0]!r} is missing",
                "a config.json with every key that the sizes depend on",
            )
        return self.require_integer(found[0], self.get(found[0]), minimum, maximum)

    def require_integer(
        self, key: str, value: object, minimum: int = 1, maximum: int = MAX_SIZE
    ) -> int:
        """Refuse a value that is not a whole number within bounds, else return it."""
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            self.refuse(key, value, f"a whole number from {minimum} to {maximum}")
        return value

    def integer_or(self, default: int, *spellings: str, minimum: int = 1) -> int:
        """Read an optional whole number."""
        return self.integer(*spellings, minimum=minimum) if self.present(spellings) else default

    def flag(self, key: str) -> bool | None:
        """Read true or false; None where it is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value
