"""What requests ask of GPUs and links, layer by layer, at the servers that execute their layers.

Added up over prompts by the rules of the simulator for a request on its own; how long requests of
others make it wait follows from these sums (:mod:`prism_plan.latency.contention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from prism_plan.kernel_types import int64
from prism_plan.latency.idle_layers import Problem, Record, Scratch, step_s

Array = Any
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


#: Phases of a request: the pass over its prompt, and the passes of one token each.
PREFILL, DECODE = 0, 1


@dataclass(frozen=True, eq=False)
class LayerWork:
    """Sums of a mean request of a class, for Q triples of class, layer and executing server.

    The second axis of all but the last is the phase, :data:`PREFILL` or :data:`DECODE`.
    ``seconds`` [Q, 2, 4] for a request on its own: dense work without attention, attention, experts
    of the executing server, and what calls to other servers add. ``gpus`` [Q, 2, G]: seconds on
    each GPU. ``visits`` [Q, 2, N, 3]: visits to the GPUs of each server, by dense parts and by
    batches of experts, their seconds and the sum of squares. ``sent`` and ``returned``
    [Q, 2, N, 3]: messages to and from each server, the seconds for which they hold a link, the sum
    of squares. ``trains`` [Q, 2, 2]: what the squares of a step's messages together are more, at
    the uplink and at the downlink of the executing server. ``prompt_s`` [Q, P] are the seconds of
    each prompt of the class, zero for others.
    """

    seconds: Floats
    gpus: Floats
    visits: Floats
    sent: Floats
    returned: Floats
    trains: Floats
    prompt_s: Floats


def layer_work(problem: Problem, scratch: Scratch, members: Floats, triples: Ints) -> LayerWork:
    """The work of triples (class, layer, executing server), int64 [Q, 3].

    ``members`` [classes, P] is the share of each prompt in the requests of a class, each row of
    sum 1.
    """
    number, servers, gpus = len(triples), len(problem.dense_gpu), len(problem.kind)
    work = LayerWork(
        seconds=np.zeros((number, 2, 4)),
        gpus=np.zeros((number, 2, gpus)),
        visits=np.zeros((number, 2, servers, 3)),
        sent=np.zeros((number, 2, servers, 3)),
        returned=np.zeros((number, 2, servers, 3)),
        trains=np.zeros((number, 2, 2)),
        prompt_s=np.zeros((number, members.shape[1])),
    )
    found = np.zeros(2)
    _layer_work(
        problem, scratch, as_constant(members), as_constant(triples.astype(np.int64)),
        work.seconds, work.gpus, work.visits, work.sent, work.returned, work.trains,
        work.prompt_s, found,
    )  # fmt: skip
    return work


@kernel
def _layer_work(  # pragma: no cover - compiled
    p: Problem, s: Scratch, members: Array, triples: Array, seconds: Array, gpus: Array,
    visits: Array, sent: Array, returned: Array, trains: Array, prompt_s: Array,
    experts_and_calls: Array,
) -> None:  # fmt: skip
    """Fill the arrays of a :class:`LayerWork`; ``experts_and_calls`` [2] is working memory."""
    for q in range(len(triples)):
        group, layer, at = triples[q, 0], triples[q, 1], triples[q, 2]
        g = p.dense_gpu[at]
        kind, dense_class = p.kind[g], p.dense_class[layer]
        first_s = p.decode_s[kind, dense_class, 0]
        for phase in range(2):
            record = Record(
                gpus[q, phase], visits[q, phase], sent[q, phase], returned[q, phase],
                trains[q, phase], experts_and_calls,
            )  # fmt: skip
            experts_and_calls[:] = 0.0
            for prompt in range(members.shape[1]):
                weight = members[group, prompt]
                prefill = int64(p.prefill_tokens[prompt])
                steps = int64(min(prefill, 1)) if phase == 0 else int64(p.decode_tokens[prompt])
                if weight == 0.0:
                    continue
                row, context = p.first_row[prompt], int64(0)
                tokens = prefill
                if phase == 1:
                    row, context, tokens = row + prefill, prefill, int64(1)
                for _ in range(steps):
                    if phase == 0:
                        dense_s = p.prefill_s[kind, dense_class, tokens]
                        attention_s = p.attention_s[kind, dense_class, tokens]
                    else:
                        dense_s = p.decode_s[kind, dense_class, context]
                        attention_s = dense_s - first_s
                    seconds[q, phase, 0] += weight * (dense_s - attention_s)
                    seconds[q, phase, 1] += weight * attention_s
                    gpus[q, phase, g] += weight * dense_s
                    visits[q, phase, at, 0] += weight
                    visits[q, phase, at, 1] += weight * dense_s
                    visits[q, phase, at, 2] += weight * dense_s**2
                    step = step_s(p, s, record, at, layer, int64(prompt), row, tokens, weight)
                    prompt_s[q, prompt] += dense_s + step
                    row += 1
                    context += 1
            seconds[q, phase, 2] = experts_and_calls[0]
            seconds[q, phase, 3] = experts_and_calls[1]
