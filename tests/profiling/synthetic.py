"""A synthetic trace, for demonstrations and tests. It is no measurement of any model.

Routing is drawn from a simple model of what real traces show: experts differ in popularity, tasks
prefer different experts, requests of one task differ, and a token picks its top K. The logit of
expert e in layer l for a token of request r of task t is

    popularity[l, e] + task[t, l, e] + request[r, l, e] + noise,

all independent normal (noise: Gumbel, which makes the choice a softmax sample without
replacement), with the standard deviations of :class:`SyntheticSpread`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prism_plan.model_spec import ModelSpec
from prism_plan.trace import PHASES, TokenBatch, Trace, trace_from_batches


@dataclass(frozen=True)
class SyntheticSpread:
    """Standard deviations of the parts of a logit.

    The defaults give, for DeepSeek-V2-Lite, a mean entropy of 5.6 of 6 bits and a divergence
    between tasks of 0.14 bits (its real traces: 5.3 to 5.8, and 0.16).
    """

    popularity: float = 0.3
    task: float = 0.7
    request: float = 0.3


def synthetic_trace(
    model: ModelSpec,
    tasks: Sequence[str],
    *,
    requests: int = 16,
    prompt_tokens: int = 48,
    decode_tokens: int = 16,
    spread: SyntheticSpread | None = None,
    seed: int = 0,
) -> Trace:
    """A token-level trace of ``requests`` requests a task, each of prompt and decode tokens."""
    spread = spread or SyntheticSpread()

    def batches() -> Iterator[TokenBatch]:
        rng = np.random.default_rng(seed)
        shape = (model.num_layers, model.num_experts)
        popularity = rng.normal(0, spread.popularity, shape)
        by_task = [popularity + rng.normal(0, spread.task, shape) for _ in tasks]
        tokens = prompt_tokens + decode_tokens
        phase = np.repeat([PHASES.index("prefill"), PHASES.index("decode")],
                          [prompt_tokens, decode_tokens]).astype(np.int8)  # fmt: skip
        number = 0
        for code, base in enumerate(by_task):
            for _ in range(requests):
                logits = base + rng.normal(0, spread.request, shape)
                noisy = logits + rng.gumbel(size=(tokens, *shape))
                chosen = np.argsort(-noisy, axis=2)[:, :, : model.top_k]
                yield TokenBatch(
                    request=np.full(tokens, number, np.int32),
                    position=np.arange(tokens, dtype=np.int32),
                    phase=phase,
                    task=np.full(tokens, code, np.int32),
                    experts=chosen.astype(np.uint16),
                )
                number += 1

    return trace_from_batches(
        model,
        tasks,
        batches(),
        provenance={"source": "synthetic", "seed": seed, "spread": vars(spread)},
        name="synthetic",
    )
