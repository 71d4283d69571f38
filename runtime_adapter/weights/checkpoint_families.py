"""How each MoE family names the experts in its checkpoints.

All families here have experts of one form, ``down(act(gate(x)) · up(x))`` without biases; in memory
transformers 5 packs them as ``gate_up_proj`` [E, 2·W, H] and ``down_proj`` [E, H, W].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prism_plan.errors import InputError, did_you_mean

#: The parts of an expert, in the order in which a slot holds them.
PARTS = ("gate", "up", "down")

_BLOCK = r"model\.layers\.(?P<layer>[0-9]{1,9})\.(?:mlp|block_sparse_moe)\.experts"
#: A tensor of one expert, and a tensor of all experts of a layer.
ONE_EXPERT = re.compile(rf"^{_BLOCK}\.(?P<expert>[0-9]{{1,9}})\.(?P<part>.+)$")
ALL_EXPERTS = re.compile(rf"^{_BLOCK}\.(?P<part>[^.]+)$")


@dataclass(frozen=True)
class CheckpointFamily:
    """The naming of one ``model_type``.

    ``width_key`` is the key of ``config.json`` that holds an expert's width; ``parts`` are the
    modules of an expert as stored, by :data:`PARTS`; ``block`` is the stored name of what
    transformers 5 calls ``mlp`` in MoE layers.
    """

    width_key: str = "moe_intermediate_size"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    block: str = "mlp"

    def part_of(self, stored: str) -> str:
        """The part that a stored tensor ``<module>.weight`` holds; empty if it is no part."""
        for part, module in zip(PARTS, self.parts, strict=True):
            if stored == f"{module}.weight":
                return part
        return ""

    def name_in_memory(self, stored: str) -> str:
        """What transformers 5 calls a stored tensor of the dense part."""
        return stored.replace(f".{self.block}.", ".mlp.")

    def expert_names(self, layer: int, expert: int) -> Mapping[str, str]:
        """Stored name of each part of one expert."""
        module = f"model.layers.{layer}.{self.block}.experts.{expert}"
        return {
            part: f"{module}.{name}.weight" for part, name in zip(PARTS, self.parts, strict=True)
        }


FAMILIES: dict[str, CheckpointFamily] = {
    "mixtral": CheckpointFamily("intermediate_size", ("w1", "w3", "w2"), "block_sparse_moe"),
    "deepseek_v2": CheckpointFamily(),
    "deepseek_v3": CheckpointFamily(),
    "qwen2_moe": CheckpointFamily(),
    "qwen3_moe": CheckpointFamily(),
    "olmoe": CheckpointFamily("intermediate_size"),
    "glm4_moe": CheckpointFamily(),
    "dots1": CheckpointFamily(),
}


def family_of(model_type: object, source: object) -> CheckpointFamily:
    """The family of a ``model_type``.

    Raises
    ------
    InputError
        It cannot be run here.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise InputError(
        f"experts of {model_type!r:.60} cannot be run{did_you_mean(str(model_type), FAMILIES)}",
        source=source,
        place="model_type",
        expected=f"one of {', '.join(FAMILIES)}",
        remedy="other families can be planned and simulated",
    )
