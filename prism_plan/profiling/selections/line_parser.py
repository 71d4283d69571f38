"""Parse one line of a file of selections; see :mod:`.reader`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.common.extra_layers import foreign_layer
from prism_plan.profiling.common.json_fields import json_object, task_of
from prism_plan.profiling.common.messages import CHECK_MODEL
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
    """The selection of one token in one layer, valid as far as a line by itself can show."""

    task: str
    request: str | int
    position: int
    layer: int
    experts: list[int]
    phase: int


@dataclass(frozen=True)
class LineParser:
    """Parses lines of recordings of one model."""

    model: ModelSpec

    def parse(self, value: Any, source: Source, at: Location) -> Line | None:
        """The selection in a line, or None for a header line."""
        values = json_object(value, at)
        if values.get("type") == "meta":
            self._check_header(values, at)
            return None
        found = [self._value(values, what, at) for what in NAMES]
        request, position, layer, experts = found
        if isinstance(request, bool) or not isinstance(request, str | int):
            raise _invalid(request, "request", "a text or a whole number", at)
        for number, what in ((position, "token"), (layer, "layer")):
            if type(number) is not int or not 0 <= number <= MAX_POSITION:
                raise _invalid(number, what, f"a whole number of 0 to {MAX_POSITION:,}", at)
        if layer not in self.model.moe_layers and layer < self.model.num_decoder_layers:
            raise foreign_layer(layer, self.model, at)
        phase = values.get("phase", PHASES[UNKNOWN_PHASE])
        if phase not in PHASES:
            raise _invalid(phase, "phase", ", ".join(PHASES), at)
        return Line(
            task_of(values, source.task, source.path, at),
            request,
            position,
            layer,
            self._ids(experts, layer, at),
            PHASES.index(phase),
        )

    def _value(self, values: Mapping[str, Any], what: str, at: Location) -> Any:
        """The value under the one name of ``what`` that the line has."""
        names = _NAME_SETS[what] & values.keys()
        if len(names) != 1:
            shown = ", ".join(map(repr, sorted(names)))
            shown = shown or f"keys {', '.join(values)!s:.80}"
            raise at.error(shown, f"the {what} under one of {', '.join(NAMES[what])}")
        return values[names.pop()]

    def _ids(self, experts: Any, layer: int, at: Location) -> list[int]:
        model = self.model
        integers = isinstance(experts, list) and all(type(one) is int for one in experts)
        if not integers or len(experts) != model.top_k:
            raise _invalid(experts, "experts", f"{model.top_k} ids, top-k of {model.name}", at)
        ids: list[int] = experts
        for expert in ids:
            if not 0 <= expert < model.num_experts:
                expected = f"ids 0..{model.num_experts - 1} of {model.name}"
                raise at.within(f"layer {layer}").error(f"expert {expert}", expected, CHECK_MODEL)
        if len(set(ids)) != len(ids):
            found = f"experts {ids} name one expert twice"
            raise at.within(f"layer {layer}").error(found, f"{model.top_k} different experts")
        return ids

    def _check_header(self, values: Mapping[str, Any], at: Location) -> None:
        top_k = values.get("top_k")
        if isinstance(top_k, int) and top_k != self.model.top_k:
            expected = f"{self.model.top_k} of {self.model.name}"
            raise at.error(f"top_k {top_k}", expected, CHECK_MODEL)


def _invalid(value: Any, what: str, expected: str, at: Location) -> InputError:
    return at.within(what).error(f"{value!r:.60}", expected)


def example_line(model: ModelSpec) -> str:
    """An example of a line, for messages."""
    ids = list(range(min(model.top_k, 3)))
    return f'{{"request": 0, "token": 0, "layer": {model.moe_layers[0]}, "experts": {ids}}}'
