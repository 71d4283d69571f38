"""The baseline `offload` in the compiled engine: least recently used slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import jit
from prism_plan.simulate.compiled.engine_state import LOADED_BYTES, LOADS, Fixed, State

Array = Any


@jit
def offloaded(  # pragma: no cover - compiled
    f: Fixed, s: State, at: int, layer: int
) -> float:
    """Compute resident experts, then load and compute the others; see the reference engine."""
    now = s.now[0]
    first = layer * f.sizes[0]
    end_s = 0.0
    for missing in range(2):
        for i in range(s.touched[at]):
            e = s.order[at, i]
            tokens = s.count[at, e]
            if tokens == 0:  # it was resident, and is done
                continue
            slot = s.slot_of[at, first + e]
            if missing == 0:
                if slot < 0:
                    continue
                s.count[at, e] = 0
                g = s.slot_gpu[slot]
                work_s = f.expert_s[f.kind[g], f.size[layer], tokens]
                done_s = max(now, s.gpu_free[g]) + work_s
            else:
                slot = np.int32(s.slot_first[at])
                for other in range(s.slot_first[at] + 1, s.slot_first[at + 1]):
                    if s.slot_end[other] < s.slot_end[slot]:
                        slot = np.int32(other)
                g = s.slot_gpu[slot]
                load_s = f.load_s[g, layer]
                begin_s = max(now, s.load_free[g], s.slot_end[slot])
                if f.blocks[g]:
                    begin_s = max(begin_s, s.gpu_free[g])
                    s.gpu_free[g] = begin_s + load_s
                    s.gpu_busy_s[g] += load_s
                loaded_s = begin_s + load_s
                s.load_free[g] = loaded_s
                work_s = f.expert_s[f.kind[g], f.size[layer], tokens]
                done_s = max(loaded_s, s.gpu_free[g]) + work_s
                if s.slot_pair[slot] >= 0:
                    s.slot_of[at, s.slot_pair[slot]] = -1
                s.slot_pair[slot] = first + e
                s.slot_of[at, first + e] = slot
                s.number[LOADS] += 1
                s.number[LOADED_BYTES] += f.expert_bytes[layer]
            s.gpu_free[g] = done_s
            s.gpu_busy_s[g] += work_s
            s.served[g] += tokens
            s.slot_end[slot] = done_s
            end_s = max(end_s, done_s)
    return end_s
