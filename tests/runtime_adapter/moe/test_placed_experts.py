"""Placed experts: the sums of the parts, and equality of a split model with the whole one."""

from __future__ import annotations

import functools
import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from prism_plan.instance import Instance  # noqa: E402
from prism_plan.io.cluster import parse_cluster  # noqa: E402
from prism_plan.io.trace_reader import read_trace  # noqa: E402
from prism_plan.profiling.recording.recorder import record  # noqa: E402
from prism_plan.solvers import SOLVER_NAMES, Options, solve  # noqa: E402
from runtime_adapter.moe.placed_experts import weighted_sum  # noqa: E402
from runtime_adapter.moe.placed_model import load_placed_model  # noqa: E402
from tests.runtime_adapter.checkpoints import (  # noqa: E402
    TINY,
    TRACES,
    committed,
    filled,
    reference,
)
from tests.runtime_adapter.moe.local_backend import LocalBackend  # noqa: E402
from tests.runtime_adapter.moe.split_backend import SplitBackend, stores_of  # noqa: E402

TASKS = ("arithmetic", "ascii-word", "narrative")
#: Slots of the GPUs of each server, by checkpoint and number of servers.
SLOTS = {
    "mixtral": {2: [[18], [12, 10]], 3: [[12], [14], [8, 9]], 4: [[9], [9], [5, 6], [10]]},
    "deepseek-v2": {
        2: [[70], [45, 50]],
        3: [[42], [42], [42, 53]],
        4: [[40], [36], [20, 25], [40]],
    },
}


@functools.cache
def instance(model: str, servers: int) -> Instance:
    text = ['name = "test"']
    for n, gpus in enumerate(SLOTS[model][servers]):
        task = TASKS[n % len(TASKS)]
        text.append(f'[[server]]\nname = "edge-{n}"\nweight = 1.0\ntasks = {{ {task} = 1.0 }}')
        text.extend(f"[[server.gpu]]\nslots = {slots}" for slots in gpus)
    trace = read_trace(TRACES / f"tiny-{model}.parquet")
    return Instance.build(trace, parse_cluster("\n".join(text)))


@functools.cache
def prompts() -> Any:
    """One prompt of each task as token ids of one length [3, S]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TRACES / "tiny-mixtral")
    lines = (TRACES / "tiny-prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {one["task"]: one["prompt"] for one in map(json.loads, lines)}
    ids = [tokenizer.encode(texts[task]) for task in TASKS]
    return torch.tensor([row[: min(map(len, ids))] for row in ids])


def generated(model: Any, ids: Any, tokens: int = 8) -> Any:
    """Greedy tokens and the scores they were taken from."""
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


@functools.cache
def expected(model: str, dtype: Any) -> Any:
    network = reference(model, dtype)
    network.set_experts_implementation("grouped_mm")
    return generated(network, prompts())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", TINY)
def test_one_store_is_the_model(model: str, dtype: Any) -> None:
    """With all experts in one store, greedy tokens and logits are those of from_pretrained."""
    checkpoint = committed(model)
    network = load_placed_model(checkpoint, LocalBackend(filled(checkpoint, dtype)), dtype)
    mine, theirs = generated(network, prompts()), expected(model, dtype)
    assert torch.equal(mine.sequences, theirs.sequences)
    for a, b in zip(mine.logits, theirs.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("servers", [2, 3, 4])
@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("model", TINY)
def test_split_model_equals_the_whole(model: str, solver: str, servers: int) -> None:
    """Under every solver's placement the servers together give the single process's tokens.

    Requests arrive at every server; logits agree within float32 tolerance; something was remote.
    """
    placement = solve(instance(model, servers), solver, Options(seed=1))
    checkpoint = committed(model)
    stores = stores_of(checkpoint, placement, torch.float32)
    theirs = expected(model, torch.float32)
    messages = 0
    for home in range(servers):
        split = SplitBackend(stores, home)
        mine = generated(load_placed_model(checkpoint, split, torch.float32), prompts())
        assert torch.equal(mine.sequences, theirs.sequences)
        for a, b in zip(mine.logits, theirs.logits, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
        messages += split.messages.total()
    assert messages > 0


def test_bfloat16_stays_near() -> None:
    """In bfloat16, partial sums are rounded once each: logits stay within its precision."""
    checkpoint = committed("deepseek-v2")
    stores = stores_of(checkpoint, solve(instance("deepseek-v2", 3), "exact"), torch.bfloat16)
    network = load_placed_model(checkpoint, SplitBackend(stores, 0), torch.bfloat16)
    whole = load_placed_model(checkpoint, LocalBackend(filled(checkpoint, torch.bfloat16)))
    with torch.no_grad():
        difference = (network(prompts()).logits - whole(prompts()).logits).float().abs()
    # a token whose gate is nearly tied may be sent to another expert, hence the mean
    assert 0 < difference.mean() < 0.1


def test_messages_of_a_pass() -> None:
    """A pass sends one message to each server and layer that is needed, each token once.

    Counted by hand from the recorded selections: a token goes to a server once, however many of
    its experts are there.
    """
    checkpoint = committed("deepseek-v2")
    placement = solve(instance("deepseek-v2", 3), "uniform")
    split = SplitBackend(stores_of(checkpoint, placement, torch.float32), 0)
    network = load_placed_model(checkpoint, split, torch.float32)
    seen: list[Any] = []
    for module in network.modules():
        if hasattr(module, "backend"):
            module.register_forward_hook(lambda m, a, out: seen.append((m.layer_position, a[1])))
    with torch.no_grad():
        network(prompts())
    local = placement.local
    messages, tokens = 0, np.zeros(3, int)
    for layer, chosen in seen:
        goes = np.zeros((len(chosen), 3), bool)
        for token, row in enumerate(chosen.tolist()):
            for expert in row:
                goes[token, next(n for n in range(3) if local[n, layer, expert])] = True
        messages += int(goes[:, 1:].any(axis=0).sum())
        tokens += goes.sum(axis=0)
    assert split.messages.total() == messages
    assert dict(split.tokens) == {1: tokens[1], 2: tokens[2]}


def test_recording_works_on_placed_experts(tmp_path: Any) -> None:
    """A split model can be recorded, and its trace is that of the whole model."""
    checkpoint = committed("mixtral")
    stores = stores_of(checkpoint, solve(instance("mixtral", 2), "eplb"), torch.float32)
    traces = []
    for at, network in enumerate(
        (
            load_placed_model(checkpoint, SplitBackend(stores, 1), torch.float32),
            reference("mixtral", torch.float32),
        )
    ):
        path = tmp_path / f"{at}.parquet"
        # the routed experts of a split model are elsewhere, so it does not tell their size
        with record(network, path, spec=checkpoint.spec):
            generated(network, prompts(), tokens=4)
        traces.append(next(iter(read_trace(path).batches())).experts)  # type: ignore[misc]
    assert np.array_equal(np.sort(traces[0]), np.sort(traces[1]))


def test_training_is_refused() -> None:
    """Experts elsewhere have no gradients: a backward pass would be wrong, so it is refused."""
    checkpoint = committed("mixtral")
    network = load_placed_model(checkpoint, LocalBackend(filled(checkpoint, torch.float32)))
    inputs = torch.zeros(1, 2, 64, dtype=checkpoint.dtype, requires_grad=True)
    with pytest.raises(InputError, match="cannot be trained"):
        network(inputs_embeds=inputs)


class Scales:
    """An expert e multiplies by e + 1; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def compute(self, layer_position: int, expert: int, x: Any) -> Any:
        """Note the call."""
        self.calls.append((expert, len(x)))
        return x * (expert + 1)


@hypothesis.given(data=st.data(), tokens=st.integers(1, 6))
@hypothesis.settings(max_examples=60)
def test_weighted_sum(data: st.DataObject, tokens: int) -> None:
    """Equal to the sum written out; every expert is called once, with its tokens and no others."""
    named = [
        (token, expert)
        for token in range(tokens)
        for expert in sorted(data.draw(st.sets(st.integers(0, 4), max_size=3)))
    ]
    weights = torch.arange(1.0, len(named) + 1) / 8
    hidden = torch.arange(1.0, 2 * tokens + 1).view(tokens, 2)
    store = Scales()
    token, expert = (torch.tensor([pair[at] for pair in named], dtype=int) for at in (0, 1))
    total = weighted_sum(store, 0, hidden, token, expert, weights)
    by_hand = torch.zeros(tokens, 2)
    for (t, e), weight in zip(named, weights, strict=True):
        by_hand[t] += hidden[t] * (e + 1) * weight
    assert torch.equal(total, by_hand)
    called = {e for _, e in named}
    assert sorted(store.calls) == [(e, sum(x == e for _, x in named)) for e in sorted(called)]
