"""The store of one server's experts: slots, table, arithmetic, sharing between processes."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from runtime_adapter.weights.checkpoint import Checkpoint, ExpertShape  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from runtime_adapter.weights.expert_store import Change, ExpertStore, NotHeld  # noqa: E402
from tests.limits import HANG_S  # noqa: E402
from tests.runtime_adapter.checkpoints import (  # noqa: E402
    CPU,
    TINY,
    committed,
    experts_in_memory,
    filled,
    free_slots,
    held_slots,
    reference,
    saved,
)
from tests.runtime_adapter.weights.sharing import child  # noqa: E402


def shape() -> ExpertShape:
    return committed("mixtral").experts


def parts(value: float) -> dict[str, Any]:
    return {name: torch.full(shape().part(name), value) for name in ("gate", "up", "down")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", TINY)
def test_arithmetic_is_transformers(model: str, dtype: Any) -> None:
    """It gives, to the bit, what transformers' experts module gives a token of one expert."""
    checkpoint, network = committed(model), reference(model, dtype)
    network.set_experts_implementation("eager")
    store = filled(checkpoint, dtype)
    torch.manual_seed(0)
    for at, module in enumerate(experts_in_memory(network)):
        for expert in (0, 5, checkpoint.spec.num_experts - 1):
            x = torch.randn(7, checkpoint.spec.hidden_size).to(dtype)
            chosen = torch.full((7, 1), expert)
            with torch.no_grad():
                theirs = module(x, chosen, torch.ones(7, 1))
            assert torch.equal(store.compute(at, expert, x), theirs)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_activation_is_the_configs(activation: str, tmp_path: Path) -> None:
    """Another hidden_act than silu is computed as transformers computes it."""
    from transformers import AutoModelForCausalLM

    folder = saved("mixtral", tmp_path, hidden_act=activation)
    checkpoint = Checkpoint(folder)
    store = filled(checkpoint, torch.float32)
    module = experts_in_memory(
        AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    )[1]
    x = torch.randn(3, checkpoint.spec.hidden_size)
    with torch.no_grad():
        theirs = module(x, torch.full((3, 1), 4), torch.ones(3, 1))
    assert torch.equal(store.compute(1, 4, x), theirs)


def test_unknown_activation(tmp_path: Path) -> None:
    """An activation that transformers does not have is refused by name."""
    checkpoint = Checkpoint(saved("olmoe", tmp_path, hidden_act="sillu"))
    with pytest.raises(InputError, match=r"hidden_act: unknown activation 'sillu', did you mean"):
        ExpertStore.create(checkpoint.experts, [1], [CPU], torch.float32)


def test_families_have_gated_experts_without_biases() -> None:
    """Experts modules of the families in transformers are of the one form that is computed here."""
    from tests.profiling.recording.families import tiny_model

    for family in FAMILIES:
        for module in experts_in_memory(tiny_model(family)):
            assert sorted(name for name, _ in module.named_parameters()) == [
                "down_proj",
                "gate_up_proj",
            ]
            assert (module.has_gate, module.has_bias, module.is_transposed) == (True, False, False)
            assert module.is_concatenated
            assert not module.has_post_expert_norm


def test_full_duplicate_missing_and_wrong_shape() -> None:
    """What cannot be loaded or dropped is refused, and the store is as it was."""
    store = ExpertStore.create(shape(), [1, 2], [CPU, CPU], torch.float32)
    assert store.put(9, 1, parts(1)) == Change("load", 9, 1, 0)
    with pytest.raises(InputError, match="GPU 1 holds layer 1 expert 1 already"):
        store.put(9, 1, parts(1))
    assert free_slots(store, 1) == 1
    store.put(9, 0, parts(2))
    assert store.gpu_of(9) == 0
    with pytest.raises(InputError, match=r"GPU 0: no free slot .*; expected at most 1 experts"):
        store.put(10, 0, parts(1))
    with pytest.raises(InputError, match=r"up of layer 1 expert 2: shape \[2, 2\]"):
        store.put(10, 1, parts(1) | {"up": torch.zeros(2, 2)})
    with pytest.raises(NotHeld, match="GPU 1 does not hold layer 1 expert 2"):
        store.drop(10, 1)
    with pytest.raises(NotHeld, match="layer 1 expert 2 is not held here"):
        store.compute(1, 2, torch.zeros(1, 64))
    assert held_slots(store) == [Change("load", 9, 0, 0), Change("load", 9, 1, 0)]
    store.drop(9, 0)
    assert store.gpu_of(9) == 1
    store.drop(9, 1)
    assert store.gpu_of(9) == -1
    assert not store.has(9)


STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 1)), max_size=40)


@hypothesis.given(steps=STEPS)
@hypothesis.settings(max_examples=60)
def test_table_follows_any_order_of_loads_and_drops(steps: list[tuple[bool, int, int]]) -> None:
    """Against a plain set: who holds what, no slot is used twice, weights are the pair's own.

    A second store that is told the changes has the same table.
    """
    store = ExpertStore.create(shape(), [3, 2], [CPU, CPU], torch.float32)
    follower = ExpertStore(shape(), store.pools)
    held: set[tuple[int, int]] = set()
    for load, pair, gpu in steps:
        room = sum(at == gpu for _, at in held) < (3, 2)[gpu]
        if load == ((pair, gpu) in held) or (load and not room):
            with pytest.raises(InputError):
                store.put(pair, gpu, parts(pair)) if load else store.drop(pair, gpu)
            continue
        follower.apply(store.put(pair, gpu, parts(pair)) if load else store.drop(pair, gpu))
        held ^= {(pair, gpu)}
    assert {(c.pair, c.gpu) for c in held_slots(store)} == held
    assert held_slots(follower) == held_slots(store)
    assert len({(c.gpu, c.slot) for c in held_slots(store)}) == len(held)
    for change in held_slots(store):
        assert store.pools[change.gpu][change.slot].unique().tolist() == [change.pair]
    for pair in range(6):
        assert store.has(pair) == any(p == pair for p, _ in held)
        assert store.gpu_of(pair) == min((g for p, g in held if p == pair), default=-1)


def test_too_little_memory() -> None:
    """More than there is is refused before any of it is taken."""
    with pytest.raises(InputError, match=r"bytes of experts, and [\d,]+ bytes are free"):
        ExpertStore.create(shape(), [10**10], [CPU], torch.float32)


def test_the_lowest_gpu_computes() -> None:
    """Of two copies on one server the lower GPU's is used."""
    store = ExpertStore.create(shape(), [1, 1], [CPU, CPU], torch.float32)
    store.put(0, 1, parts(1))
    one = store.compute(0, 0, torch.ones(1, 64))
    store.put(0, 0, parts(2))
    assert not torch.equal(store.compute(0, 0, torch.ones(1, 64)), one)


def test_another_process_shares_the_experts() -> None:
    """A spawned process computes with what was loaded before and after it began.

    An expert that is put later is not there until the table entry is told, and then gives the same
    numbers without having been sent: the pools are one memory.
    """
    checkpoint = committed("deepseek-v2")
    store = ExpertStore.create(checkpoint.experts, [3], [CPU], torch.float32)
    store.put(0, 0, checkpoint.expert(0, 0))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(store, there), daemon=True)
    process.start()
    there.close()  # so that a child that dies ends the wait

    def ask(change: Any, layer: int, expert: int) -> Any:
        here.send((change, layer, expert, x.tolist()))
        assert here.poll(HANG_S)
        return here.recv()

    x = torch.randn(4, checkpoint.spec.hidden_size)
    try:
        assert ask(None, 0, 0) == store.compute(0, 0, x).tolist()
        loaded = store.put(37, 0, checkpoint.expert(1, 5))
        assert "is not held here" in ask(None, 1, 5)
        assert ask(tuple(loaded), 1, 5) == store.compute(1, 5, x).tolist()
        dropped = store.drop(0, 0)
        assert "is not held here" in ask(tuple(dropped), 0, 0)
    finally:
        here.send(None)
        process.join(HANG_S)
    assert process.exitcode == 0


def test_a_plain_pickle_is_refused() -> None:
    """Only spawning shares the memory; anything else would copy the weights, and is refused."""
    with pytest.raises(RuntimeError, match="through inheritance"):
        pickle.dumps(filled(committed("mixtral"), torch.bfloat16))
