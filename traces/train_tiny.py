"""Train a tiny Mixtral or DeepSeek-V2 on three small tasks, on a CPU.

    train_tiny.py --model mixtral --out DIR [--steps N] [--seed S]
    train_tiny.py --prompts FILE
    train_tiny.py --routing DIR

The first form leaves a checkpoint in bf16, its tokenizer and ``training.json``: held-out loss
and unigram baseline per task, steps, seconds, seed, versions. Same machine, same PyTorch, same
seed: same weights. The second writes held-out prompts; the third prints how a checkpoint routes
them. TINY.md tells what came out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_tasks import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    TASKS,
    VOCABULARY,
    Example,
    distinct,
    examples,
    make_tokenizer,
    write_prompts,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV2Config, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 512
ROW = 384
ROWS = 10
PEAK_RATE = 3e-3
WARMUP = 40
#: Weight of the load-balancing loss: enough to keep experts alive, too little to make all alike.
BALANCE = 0.01
STEPS = {"mixtral": 900, "deepseek-v2": 600}
#: Held-out examples per task: for the loss, and written as prompts.
TEST_EXAMPLES = 120
PROMPTS = 40
#: Training examples per task that the unigram baseline counts.
BASELINE_EXAMPLES = 2000
NOT_SCORED = -100


def config_of(name: str) -> MixtralConfig | DeepseekV2Config:
    """The architecture of a tiny model; about a million parameters each."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
    }
    if name == "mixtral":
        return MixtralConfig(
            hidden_size=64,
            intermediate_size=144,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
            router_aux_loss_coef=BALANCE,
            **common,
        )
    return DeepseekV2Config(
        hidden_size=64,
        intermediate_size=192,
        moe_intermediate_size=32,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        n_routed_experts=32,
        n_shared_experts=2,
        num_experts_per_tok=6,
        routed_scaling_factor=4.0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        **common,
    )


def new_model(name: str, seed: int) -> PreTrainedModel:
    """A model of random weights; experts are run one after the other, which is repeatable."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(
        config_of(name), experts_implementation="eager", dtype=torch.float32
    )


@contextmanager
def recorded_routes(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect what every gate answers: logits [T, E] and chosen experts [T, K], layer by layer."""
    routes: list[tuple[Tensor, Tensor]] = []

    def keep(_gate: nn.Module, _inputs: object, answer: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _weights, chosen = answer
        routes.append((logits, chosen))

    gates = [part for name, part in model.named_modules() if name.endswith(".mlp.gate")]
    hooks = [gate.register_forward_hook(keep) for gate in gates]
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(routes: Sequence[tuple[Tensor, Tensor]], real: Tensor) -> Tensor:
    """Mean over layers of E · Σ_e (share of the calls) · (mean probability); 1 if all are alike.

    `real` [T] marks the tokens that count. Tasks share a batch: experts may part by task.
    """
    losses = []
    for logits, chosen in routes:
        number = logits.shape[-1]
        calls = functional.one_hot(chosen[real], number).sum((0, 1)).float()
        probability = logits[real].float().softmax(-1).mean(0)
        losses.append(number * (calls / calls.sum() * probability).sum())
    return torch.stack(losses).mean()


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and positions [ROWS, ROW] without end; whole examples are packed into rows.

    Positions start again with every example, which keeps examples from attending to each other.
    """
    streams = [examples(task, held_out=False, seed=seed) for task in TASKS]
    coming = itertools.cycle(streams)
    waiting: list[int] = []
    while True:
        ids = torch.full((ROWS, ROW), PAD_ID)
        positions = torch.zeros((ROWS, ROW), dtype=torch.long)
        for row in range(ROWS):
            at = 0
            while True:
                waiting = waiting or [*tokenizer.encode(next(next(coming)).text), EOS_ID]
                end = at + len(waiting)
                if end > ROW:
                    break
                ids[row, at:end] = torch.tensor(waiting)
                positions[row, at:end] = torch.arange(len(waiting))
                at, waiting = end, []
            positions[row, at:] = torch.arange(ROW - at)
        yield ids, positions


def next_token_loss(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Cross entropy in nats; neither padding nor the start of an example is scored."""
    labels = ids[:, 1:].clone()
    labels[(labels == PAD_ID) | (labels == BOS_ID)] = NOT_SCORED
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), labels.reshape(-1), ignore_index=NOT_SCORED
    )


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short rise, then a half cosine down to 2 %."""
    rise = min(1.0, (step + 1) / WARMUP)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(name: str, *, steps: int, seed: int, log_every: int = 0) -> PreTrainedModel:
    """Train a new model for some steps; repeatable once `be_repeatable` was called."""
    model = new_model(name, seed).train()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    scales = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    started = time.perf_counter()
    for step, (ids, positions) in enumerate(
        itertools.islice(batches(make_tokenizer(CONTEXT), seed), steps)
    ):
        with recorded_routes(model) as routes:
            loss = next_token_loss(model, ids, positions)
        balance = balance_loss(routes, ids.reshape(-1) != PAD_ID)
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if log_every and (step % log_every == 0 or step == steps - 1):
            print(
                f"step {step:4d}  loss {loss.item():.3f}  balance {balance.item():.3f}"
                f"  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return model.eval()


def be_repeatable(threads: int) -> None:
    """Fix what makes two runs differ: the number of threads and inexact orders of addition."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tests: Sequence[Example]
) -> dict[str, float]:
    """Nats per token on the whole text and on the answer alone (its end counts, too).

    ``exact_answers`` is the share of answers that the model would write, each token its likeliest.
    """
    total, answer_total, tokens, answer_tokens, exact = 0.0, 0.0, 0, 0, 0
    for example in tests:
        ids = torch.tensor([[*tokenizer.encode(example.text), EOS_ID]])
        start = len(tokenizer.encode(example.prompt)) - 1
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        nats = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total, tokens = total + nats.sum().item(), tokens + len(nats)
        answer_total += nats[start:].sum().item()
        answer_tokens += len(nats) - start
        exact += bool((logits[start:].argmax(-1) == ids[0, start + 1 :]).all())
    return {
        "loss": total / tokens,
        "answer_loss": answer_total / answer_tokens,
        "exact_answers": exact / len(tests),
    }


def unigram_loss(
    tokenizer: PreTrainedTokenizerFast, known: Sequence[Example], tests: Sequence[Example]
) -> dict[str, float]:
    """The same two losses of a model that only knows how often each token stands in `known`.

    For the answers it counts the tokens of answers alone. Every count starts at one.
    """

    def ids(example: Example, answer: bool) -> list[int]:
        whole = [*tokenizer.encode(example.text)[1:], EOS_ID]
        return whole[len(tokenizer.encode(example.prompt)) - 1 :] if answer else whole

    losses = {}
    for name, answer in (("loss", False), ("answer_loss", True)):
        counts = np.ones(VOCABULARY)
        np.add.at(counts, [i for example in known for i in ids(example, answer)], 1)
        nats = -np.log(counts / counts.sum())
        losses[name] = float(np.mean(nats[[i for ex in tests for i in ids(ex, answer)]]))
    return losses


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Loss, baseline and exact answers per task, all on held-out examples."""
    result = {}
    for task in TASKS:
        tests = distinct(task, TEST_EXAMPLES, held_out=True)
        known = list(itertools.islice(examples(task, held_out=False), BASELINE_EXAMPLES))
        mine, baseline = (
            held_out_loss(model, tokenizer, tests),
            unigram_loss(tokenizer, known, tests),
        )
        result[task] = {
            **{key: round(value, 4) for key, value in mine.items()},
            **{f"unigram_{key}": round(value, 4) for key, value in baseline.items()},
        }
    return result


@torch.no_grad()
def expert_calls(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Calls [tasks, layers, experts] that the held-out prompts cause, by the model's own gates."""
    calls = []
    for task in TASKS:
        layers: np.ndarray | int = 0
        for example in distinct(task, PROMPTS, held_out=True):
            with recorded_routes(model) as routes:
                model(input_ids=torch.tensor([tokenizer.encode(example.prompt)]), use_cache=False)
            layers = layers + np.stack(
                [
                    np.bincount(chosen.reshape(-1).numpy(), minlength=logits.shape[-1])
                    for logits, chosen in routes
                ]
            )
        calls.append(layers)
    return np.stack(calls)


def entropy_bits(p: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in bits."""
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def routing(calls: np.ndarray) -> dict[str, Any]:
    """Entropy and divergence of expert usage, in bits, from calls [tasks, layers, experts].

    The divergence is Jensen-Shannon's, the mean over all pairs of tasks.
    """
    p = calls / calls.sum(-1, keepdims=True)
    pairs = [
        entropy_bits((p[a] + p[b]) / 2) - (entropy_bits(p[a]) + entropy_bits(p[b])) / 2
        for a, b in itertools.combinations(range(len(p)), 2)
    ]
    pooled = calls.sum(0) / calls.sum((0, 2))[:, None]
    return {
        "entropy_by_task": dict(
            zip(TASKS, entropy_bits(p).mean(-1).round(3).tolist(), strict=True)
        ),
        "entropy_by_layer": entropy_bits(p).mean(0).round(3).tolist(),
        "divergence_by_layer": np.mean(pairs, axis=0).round(3).tolist(),
        "divergence": round(float(np.mean(pairs)), 3),
        "least_used_share": round(float((pooled * pooled.shape[-1]).min()), 3),
    }


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A saved checkpoint, its bf16 weights widened to fp32, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=STEPS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="write held-out prompts")
    parser.add_argument("--routing", type=Path, metavar="DIR", help="how a checkpoint routes")
    options = parser.parse_args(arguments)
    if not (options.model or options.prompts or options.routing):
        parser.error("one of --model, --prompts, --routing is needed")
    be_repeatable(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.prompts:
        write_prompts(options.prompts, PROMPTS)
    if options.model:
        if not options.out:
            parser.error("--model needs --out")
        steps = options.steps or STEPS[options.model]
        started = time.perf_counter()
        model = train(options.model, steps=steps, seed=options.seed, log_every=20)
        seconds = time.perf_counter() - started
        model.to(torch.bfloat16).save_pretrained(options.out)
        make_tokenizer(CONTEXT).save_pretrained(options.out)
        record = {
            "model": options.model,
            "parameters": model.num_parameters(),
            "steps": steps,
            "seed": options.seed,
            "threads": options.threads,
            "seconds": round(seconds),
            "versions": {
                "python": ".".join(map(str, sys.version_info[:3])),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "held_out_nats_per_token": scores(*load(options.out)),
        }
        text = json.dumps(record, indent=2)
        (options.out / "training.json").write_text(text + "\n", encoding="utf-8")
        print(text)
    if folder := options.routing or options.out:
        print(json.dumps(routing(expert_calls(*load(folder))), indent=2))


if __name__ == "__main__":
    main()
