"""What a cluster of the trials serves: placements, prompts, and the tokens of right answers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import prism_plan as pp
from prism_plan.io.cluster import parse_cluster
from studies.faults.trials import SERVERS

TRACES = Path(__file__).resolve().parents[2] / "traces"
#: Tasks of the committed traces, and prompts of each that are asked.
TASKS = ("arithmetic", "ascii-word", "narrative")
PROMPTS_OF_TASK = 4
NEW_TOKENS = 16


def checkpoint(model: str) -> Path:
    """The folder of a tiny checkpoint."""
    return TRACES / f"tiny-{model}"


@functools.cache
def prompts() -> tuple[str, ...]:
    """Some prompts of each task, one task after the other."""
    lines = (TRACES / "tiny-prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts: dict[str, list[str]] = {task: [] for task in TASKS}
    for line in map(json.loads, lines):
        texts[line["task"]].append(line["prompt"])
    chosen = [texts[task][:PROMPTS_OF_TASK] for task in TASKS]
    return tuple(text for together in zip(*chosen, strict=True) for text in together)


@functools.cache
def placements(model: str, replicas: int, roomy: bool) -> tuple[pp.Placement, pp.Placement]:
    """Two placements of the same slots in which each expert is on so many servers.

    In the second one each server holds what its neighbour holds in the first. All slots are full,
    unless they are ``roomy``: then two servers have room for as many replicas as three hold.
    """
    spec = pp.load_model_spec(str(checkpoint(model)))
    pairs = spec.num_pairs
    spare = max(2, pairs // 20)
    slots = math.ceil(replicas * pairs / len(SERVERS)) + spare
    lines = ['name = "three"']
    for name, task in zip(SERVERS, TASKS, strict=True):
        lines += ["[[server]]", f'name = "{name}"', "weight = 1.0", f"tasks = {{ {task} = 1.0 }}"]
        lines += ["[[server.gpu]]", f"slots = {slots}"]
    trace = pp.read_trace(TRACES / f"tiny-{model}.parquet")
    instance = pp.Instance.build(trace, parse_cluster("\n".join(lines)), min_replicas=replicas)
    first = pp.solve(instance, "exact")
    if roomy:
        room = min(math.ceil(replicas * pairs / (len(SERVERS) - 1)) + spare, pairs)
        first = first.replace(gpu_capacity=((room,),) * len(SERVERS))
    return first, first.replace(on_gpu=np.roll(first.on_gpu, 1, axis=0))


def with_tables(targets: Sequence[pp.Placement], seed: int) -> list[pp.Placement]:
    """The placements with execution tables drawn from a seed, another one each."""
    generator = np.random.default_rng(seed)
    found = []
    for target in targets:
        shape = (target.num_servers, target.model.num_layers)
        found.append(target.replace(execution=generator.integers(0, target.num_servers, shape)))
    return found


class GreedyReference:
    """Plain transformers: the tokens that greedy decoding adds to a prompt, in float32."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint(model))
        self._network: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint(model), dtype=torch.float32
        ).eval()
        self._known: dict[tuple[str, int], list[int]] = {}

    def tokens(self, prompt: str, new_tokens: int = NEW_TOKENS) -> list[int]:
        """The tokens of a prompt's answer."""
        import torch

        if (prompt, new_tokens) not in self._known:
            ids = torch.tensor([self._tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                found = self._network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                )
            self._known[prompt, new_tokens] = found[0, ids.shape[1] :].tolist()
        return self._known[prompt, new_tokens]


@functools.cache
def reference(model: str) -> GreedyReference:
    """The reference of a checkpoint, loaded once."""
    return GreedyReference(model)
