"""Generate the sizes in ``prism_plan/presets`` from the configurations in it.

    python -m tools.make_preset mixtral-8x7b ...

The model is built on the meta device. Where the configuration is that of a checkpoint in block-wise
fp8, transformers lays the model out as it does before it loads the stored tensors. MXFP4 (gpt-oss)
is laid out here, for transformers needs its kernels for that, and holds biases in float32 that are
stored in bfloat16. Both are tested against the tensor counts that the Hub publishes.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import prism_plan
from prism_plan.model_spec import ModelSpec
from prism_plan.sizes.loaded_model import facts_of_model, tensors_of_model
from prism_plan.sizes.meta_device import build_meta_model
from prism_plan.sizes.model_facts import config_levels, dtype_name
from prism_plan.sizes.stored_tensors import StoredTensor, spec_from_tensors

FOLDER = Path(prism_plan.__file__).parent / "presets"


def make_spec(name: str, config: dict[str, Any]) -> ModelSpec:
    """Compute the spec of a configuration, also of a quantised one."""
    chain = config_levels(config, name)
    model = build_meta_model(chain, dtype_name(chain), name)
    quantisation = config.get("quantization_config") or {}
    if quantisation.get("quant_method") == "fp8":
        from transformers.quantizers import AutoHfQuantizer

        model.config.quantization_config = quantisation
        quantiser = AutoHfQuantizer.from_config(quantisation, pre_quantized=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantiser._process_model_before_weight_loading(model)
    facts = facts_of_model(model, chain[-1].values, source=name)
    tensors = tensors_of_model(model, facts)
    if quantisation.get("quant_method") == "mxfp4":
        tensors = map(_mxfp4, tensors)
    return spec_from_tensors(tensors, facts, name=name, source=name)


def _mxfp4(tensor: StoredTensor) -> StoredTensor:
    """Store the matrices of experts in 4 bits a number and a byte of scale for each 32."""
    if not tensor.name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return tensor
    numbers = math.prod(tensor.shape)
    return tensor._replace(dtype="uint8", num_bytes=numbers // 2 + numbers // 32)


def main() -> None:
    """Write the sizes of the presets that are named."""
    for name in sys.argv[1:]:
        path = FOLDER / f"{name}.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        command = f"python -m tools.make_preset {name}"
        values |= {"command": command, "model": make_spec(name, values["config"]).to_json()}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        path.write_text("{" + ",\n ".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
