"""What the routers of a model themselves put out, and prompts to run them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.io.trace_reader import read_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.recording.expert_modules import find_experts
from prism_plan.profiling.recording.recorder import record
from prism_plan.trace import PHASES
from tests.profiling.recording.families import SIZES, VOCABULARY, family_model

PREFILL, DECODE = PHASES.index("prefill"), PHASES.index("decode")

#: (request, position) → phase and the sorted experts of each layer.
Rows = dict[tuple[int, int], tuple[int, list[list[int]]]]


def prompts(batch: int, side: str = "left", seed: int = 0) -> tuple[Any, Any]:
    """Random prompts of different lengths, padded on one side: ids and mask [B, S]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (5 * row) % 7 for row in range(batch)]
    longest = max(lengths)
    ids = torch.zeros((batch, longest), dtype=torch.long)
    mask = torch.zeros((batch, longest), dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(3, VOCABULARY, (length,), generator=generator)
        at = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, at], mask[row, at] = words, 1
    return ids, mask


def recorded(path: Path) -> Rows:
    """The rows of a trace file."""
    trace = read_trace(path)
    found: Rows = {}
    assert trace.batches is not None
    for batch in trace.batches():
        for r, p, phase, experts in zip(
            batch.request, batch.position, batch.phase, batch.experts, strict=True
        ):
            assert (int(r), int(p)) not in found
            found[int(r), int(p)] = (int(phase), np.sort(experts, axis=1).tolist())
    return found


class RouterWitness:
    """What each router puts out in each pass, taken without a look at the experts modules' inputs.

    A router is a module beside the experts whose output holds ids, else the layer's method
    ``route_tokens_to_experts``. ``passes`` holds for each pass of the decoder and each MoE layer
    the sorted ids [B·S, K].
    """

    def __init__(self, model: Any) -> None:
        self.passes: list[dict[int, Any]] = []
        self._undo: list[Any] = []
        for layer, experts in find_experts(model).items():
            parent = model.get_submodule(experts.name.rpartition(".")[0])
            for name, module in parent.named_children():
                if module is not experts.module and "shared" not in name:
                    handle = module.register_forward_hook(self._hook(layer))
                    self._undo.append(handle.remove)
            if hasattr(parent, "route_tokens_to_experts"):
                self._wrap(parent, layer)
        decoder = model.get_decoder()
        handle = decoder.register_forward_pre_hook(lambda *_: self.passes.append({}))
        self._undo.append(handle.remove)

    def _hook(self, layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._keep(layer, output)

        return hook

    def _wrap(self, parent: Any, layer: int) -> None:
        original = parent.route_tokens_to_experts

        def route(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self._keep(layer, output)
            return output

        parent.route_tokens_to_experts = route
        self._undo.append(lambda: delattr(parent, "route_tokens_to_experts"))

    def _keep(self, layer: int, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        for part in parts:
            if hasattr(part, "dtype") and not part.dtype.is_floating_point:
                ids = part.reshape(-1, part.shape[-1])
                self.passes[-1].setdefault(layer, ids.sort(dim=-1).values.numpy())

    def remove(self) -> None:
        """Take the hooks off."""
        for undo in self._undo:
            undo()

    def rows(self, mask: Any, new: Any, ends: set[int]) -> Rows:
        """What should be recorded of a left-padded batch: its prompts, then its decode steps.

        ``new`` [B, steps] are the generated tokens; what is fed from one of ``ends`` on is not
        recorded.
        """
        batch, width = mask.shape
        found: Rows = {}
        for step, by_layer in enumerate(self.passes):
            ids = np.stack([by_layer[layer] for layer in sorted(by_layer)], axis=1)
            for row in range(batch):
                length = int(mask[row].sum())
                if step and not ends & set(new[row, :step].tolist()):
                    found[row, length + step - 1] = (DECODE, ids[row].tolist())
                for position in range(0 if step else length):
                    column = row * width + width - length + position
                    found[row, position] = (PREFILL, ids[column].tolist())
        return found


def spec_for(family: str, model: Any) -> ModelSpec:
    """A spec written by hand: only its layers are looked up in the model."""
    return ModelSpec(
        name=family,
        moe_layers=tuple(find_experts(model)),
        num_experts=SIZES["num_experts"],
        top_k=SIZES["num_experts_per_tok"],
        hidden_size=SIZES["hidden_size"],
        dtype_bytes=4,
        expert_bytes=1000,
        dense_bytes=1000,
        kv_bytes_per_token=8,
    )


def require_right_recording(family: str, path: Path, steps: int = 4) -> None:
    """Record prompts and decode steps of a family's tiny model, and compare every row.

    Three left-padded prompts run together; one of them ends after its first new token. Rows must be
    what the routers put out. So that an order of tokens which router and experts share is found
    too, the rows must also be those of each sequence run alone, without padding and cache.
    """
    import torch

    model = family_model(family)
    spec = spec_for(family, model)
    ids, mask = prompts(3)
    settings = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        plain = model.generate(input_ids=ids, attention_mask=mask, **settings)
        end = int(plain[0, ids.shape[1]])
        witness = RouterWitness(model)
        try:
            with record(model, path, spec=spec, end_tokens=[end]):
                output = model.generate(input_ids=ids, attention_mask=mask, **settings)
        finally:
            witness.remove()
        assert torch.equal(plain, output), "recording changed the output"
        rows = recorded(path)
        assert len(witness.passes) == steps
        assert rows == witness.rows(mask, output[:, ids.shape[1] :], {end})
        for row in range(len(ids)):
            whole = output[row, ids.shape[1] - int(mask[row].sum()) : -1][None]
            with record(model, path, spec=spec):
                model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False)
            alone = {at: experts for (_, at), (_, experts) in recorded(path).items()}
            mine = {at: experts for (r, at), (_, experts) in rows.items() if r == row}
            assert mine == {at: alone[at] for at in mine}
