"""One line of a file of selections; see :mod:`prism_plan.profiling.selections.reader`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prism_plan.errors import InputError
from prism_plan.model import ModelSpec
from prism_plan.profiling.common.extra_layers import decoder_end
from prism_plan.profiling.common.json_fields import CHECK_MODEL, json_object, task_of_line
from prism_plan.profiling.sources import Source
from prism_plan.trace import PHASES, UNKNOWN_PHASE

#: Names of the four things that a line has.
NAMES = {
    "request": ("request", "request_id", "req_id", "rid", "seq_id", "sequence_id"),
    "token": ("position", "pos", "token", "token_idx", "token_index", "token_pos"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index"),
    "experts": ("experts", "expert_ids", "topk_ids", "topk_experts", "selected_experts"),
}
_NAME_SETS = {what: set(names) for what, names in NAMES.items()}
#: Positions of a token, which are int32 in traces.
MAX_POSITION = 2**31 - 1


class Line(NamedTuple):
    """A line that is one of the model, as far as it can be told alone."""

    task: str
    request: str | int
    position: int
    layer: int
    experts: list[int]
    phase: int


@dataclass(frozen=True)
class LineParser:
    """Reads lines of one model."""

    model: ModelSpec

    def parse(self, value: Any, source: Source, place: str) -> Line | None:
        """What a line says, or nothing where it is one of a header."""
        path = source.path
        values = json_object(value, path, place)
        if values.get("type") == "meta":
            self._check_header(values, path, place)
            return None
        found = [self._value(values, what, path, place) for what in NAMES]
        request, position, layer, experts = found
        if isinstance(request, bool) or not isinstance(request, str | int):
            raise _wrong(request, "request", "a text or a whole number", path, place)
        for number, what, most in (
            (position, "token", MAX_POSITION),
            (layer, "layer", MAX_POSITION),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
                raise _wrong(number, what, f"a whole number of 0 to {most:,}", path, place)
        if layer not in self.model.moe_layers and layer < decoder_end(self.model):
            raise self.foreign_layer(layer, path, place)
        phase = values.get("phase", PHASES[UNKNOWN_PHASE])
        if phase not in PHASES:
            raise _wrong(phase, "phase", ", ".join(PHASES), path, place)
        return Line(
            task_of_line(values, source.task, path, place),
            request,
            position,
            layer,
            self._ids(experts, layer, path, place),
            PHASES.index(phase),
        )

    def _value(self, values: Mapping[str, Any], what: str, path: Path, place: str) -> Any:
        """The value under the one name of a thing."""
        names = _NAME_SETS[what] & values.keys()
        if len(names) != 1:
            shown = ", ".join(map(repr, sorted(names)))
            shown = shown or f"keys {', '.join(values)!s:.80}"
            raise InputError(
                shown,
                source=path,
                place=place,
                expected=f"the {what} under one of {', '.join(NAMES[what])}",
            )
        return values[names.pop()]

    def _ids(self, experts: Any, layer: int, path: Path, place: str) -> list[int]:
        model = self.model
        whole = isinstance(experts, list) and all(type(one) is int for one in experts)
        if not whole or len(experts) != model.top_k:
            raise _wrong(
                experts, "experts", f"{model.top_k} ids, top-k of {model.name}", path, place
            )
        ids: list[int] = experts
        if not all(0 <= one < model.num_experts for one in ids):
            bad = next(one for one in ids if not 0 <= one < model.num_experts)
            raise InputError(
                f"expert {bad}",
                source=path,
                place=f"{place} layer {layer}",
                expected=f"ids 0..{model.num_experts - 1} of {model.name}",
                remedy=CHECK_MODEL,
            )
        if len(set(ids)) != len(ids):
            raise InputError(
                f"experts {ids} name one expert twice",
                source=path,
                place=f"{place} layer {layer}",
                expected=f"{model.top_k} different experts",
            )
        return ids

    def _check_header(self, values: Mapping[str, Any], path: Path, place: str) -> None:
        top_k = values.get("top_k")
        if isinstance(top_k, int) and top_k != self.model.top_k:
            raise InputError(
                f"top_k {top_k}",
                source=path,
                place=place,
                expected=f"{self.model.top_k} of {self.model.name}",
                remedy=CHECK_MODEL,
            )

    def foreign_layer(self, layer: int, path: Path, place: str) -> InputError:
        return InputError(
            f"layer {layer}",
            source=path,
            place=place,
            expected=f"a MoE layer of {self.model.name}, {self.model.layers_text()}",
            remedy=CHECK_MODEL,
        )


def _wrong(value: Any, what: str, expected: str, path: Path, place: str) -> InputError:
    return InputError(f"{value!r:.60}", source=path, place=f"{place} {what}", expected=expected)


def example(model: ModelSpec) -> str:
    """A line as it is read, for messages."""
    ids = list(range(min(model.top_k, 3)))
    return f'{{"request": 0, "token": 0, "layer": {model.moe_layers[0]}, "experts": {ids}}}'
