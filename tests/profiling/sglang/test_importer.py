"""Dumps of SGLang's expert distribution recorder, and its responses."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.sglang.importer import read_sglang
from prism_plan.profiling.sources import Source
from prism_plan.trace import TokenBatch, Trace

torch = pytest.importorskip("torch")

PREFILL, DECODE, UNKNOWN = 0, 1, 2
EXTEND_MODE, DECODE_MODE, MIXED_MODE, IDLE_MODE = 1, 2, 3, 4
#: Layer 0 is dense, as in DeepSeek.
MODEL = ModelSpec(
    name="toy",
    moe_layers=(1, 2, 3),
    num_experts=6,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=100,
    kv_bytes_per_token=4,
)
LAYERS, PHYSICAL = 4, 9
Selections = npt.NDArray[np.uint16]


def routing(tokens: int, seed: int = 0) -> Selections:
    """Random logical selections [T, MoE layers, K]."""
    noise = np.random.default_rng(seed).random((tokens, MODEL.num_layers, MODEL.num_experts))
    return np.argsort(noise, axis=2)[:, :, : MODEL.top_k].astype(np.uint16)


def replicas(seed: int = 7, physical: int = PHYSICAL) -> npt.NDArray[np.int64]:
    """A random physical -> logical map [L, P] with a place for each expert and random copies."""
    rng = np.random.default_rng(seed)
    spare = rng.integers(MODEL.num_experts, size=(LAYERS, physical - MODEL.num_experts))
    rows = np.concatenate([np.tile(np.arange(MODEL.num_experts), (LAYERS, 1)), spare], axis=1)
    return rng.permuted(rows, axis=1)


MAP = replicas()


def physical_ids(experts: Selections, table: npt.NDArray[np.int64] = MAP, seed: int = 3) -> Any:
    """``topk_ids_of_layer`` int32 [L, T, 8]: a random copy of each expert; -1 where nothing is."""
    rng = np.random.default_rng(seed)
    ids = np.full((LAYERS, len(experts), 8), -1, np.int32)
    for token, of_layer in enumerate(experts):
        for layer, chosen in zip(MODEL.moe_layers, of_layer, strict=True):
            ids[layer, token, : MODEL.top_k] = [
                rng.choice(np.flatnonzero(table[layer] == expert)) for expert in chosen
            ]
    return torch.from_numpy(ids)


def counted(experts: Selections) -> npt.NDArray[np.int64]:
    """Calls [MoE layers, E] of selections."""
    return np.stack(
        [np.bincount(experts[:, at].ravel(), minlength=MODEL.num_experts)
         for at in range(MODEL.num_layers)]
    )  # fmt: skip


def record(
    number: int,
    experts: Selections,
    *,
    mode: int = EXTEND_MODE,
    positions: Sequence[int] | None = None,
    pieces: Sequence[int] | None = None,
    rank: int = 0,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A record as ``_DetailAccumulator`` keeps it in mode per_token."""
    tokens = len(experts)
    ids = physical_ids(experts, seed=seed)
    if pieces is None and mode != DECODE_MODE:
        pieces = [tokens]
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [1000 * number + t for t in range(tokens)],
        "positions": list(range(tokens) if positions is None else positions),
        "extend_seq_lens": None if pieces is None else list(pieces),
        "forward_mode": mode,
        "topk_ids_of_layer": ids,
        "misc_objects": [],
        "global_physical_count": torch.from_numpy(physical_counts(ids.numpy())),
        **more,
    }


def physical_counts(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.stack([np.bincount(row[row >= 0], minlength=PHYSICAL) for row in ids]).astype("i4")


def per_pass(number: int, experts: Selections, rank: int = 0, seed: int = 0) -> dict[str, Any]:
    """A record in mode per_pass."""
    keys = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
    whole = record(number, experts, rank=rank, seed=seed)
    return {key: whole[key] for key in keys}


def save(path: Path, records: Any, table: Any = MAP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"records": records, "last_physical_to_logical_map": torch.as_tensor(table)}, str(path)
    )
    return path


def save_stat(path: Path, logical: npt.NDArray[Any], rank: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dump = {
        "rank": rank,
        "logical_count": torch.from_numpy(logical),
        "average_utilization_rate_over_window": None,
    }
    torch.save(dump, str(path))
    return path


def stat_rows(*passes: Selections, unused: int = 5) -> npt.NDArray[np.int32]:
    """``logical_count`` int32 [S, L, E], with rows of zeros where the buffer was not used."""
    rows = np.zeros((len(passes) + unused, LAYERS, MODEL.num_experts), np.int32)
    for row, experts in zip(rows, passes, strict=False):
        row[list(MODEL.moe_layers)] = counted(experts)
    return rows


def batches(trace: Trace) -> list[TokenBatch]:
    assert trace.batches is not None
    return list(trace.batches())


def read(*paths: Path) -> tuple[Trace, list[str]]:
    told: list[str] = []
    return read_sglang([Source(path) for path in paths], MODEL, notify=told.append), told


def one(path: Path) -> TokenBatch:
    (batch,) = batches(read(path)[0])
    return batch


def refusal(*paths: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_sglang([Source(path) for path in paths], MODEL)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------- stat


def test_stat_gives_the_counts(tmp_path: Path) -> None:
    """Calls are those of all rows; unused rows and the dense layer's add nothing."""
    a, b = routing(5, 1), routing(3, 2)
    trace, told = read(save_stat(tmp_path / "chat.pt", stat_rows(a, b)))
    assert trace.kind == "counts"
    assert trace.tasks == ("chat",)
    assert np.array_equal(trace.counts[0], counted(a) + counted(b))
    assert trace.tokens.tolist() == [8]
    assert told == []
    write_trace(tmp_path / "t.parquet", trace)
    assert np.array_equal(read_trace(tmp_path / "t.parquet").counts, trace.counts)


def test_stat_of_two_ranks_is_read_once(tmp_path: Path) -> None:
    """Each rank's counts are the sum over all ranks, so that one of them is read."""
    rows = stat_rows(routing(5))
    save_stat(tmp_path / "chat" / "r1.pt", rows, rank=1)
    save_stat(tmp_path / "chat" / "r0.pt", rows, rank=0)
    trace, told = read(tmp_path / "chat")
    assert trace.tasks == ("chat",)
    assert np.array_equal(trace.counts[0], counted(routing(5)))
    assert told == [
        "task 'chat': read rank 0 of 2, for the counts of each rank are the sum over all"
    ]


def test_stat_dumps_of_one_rank_are_added(tmp_path: Path) -> None:
    """A dump empties the buffer, so that the next one holds other passes; a copy is refused."""
    save_stat(tmp_path / "chat" / "a.pt", stat_rows(routing(5, 1)))
    save_stat(tmp_path / "chat" / "b.pt", stat_rows(routing(4, 2)))
    trace, _ = read(tmp_path / "chat")
    assert np.array_equal(trace.counts[0], counted(routing(5, 1)) + counted(routing(4, 2)))
    save_stat(tmp_path / "chat" / "c.pt", stat_rows(routing(4, 2)))
    assert "c.pt: the same counts as in b.pt" in refusal(tmp_path / "chat")


def test_tasks_of_sources(tmp_path: Path) -> None:
    """Labels name tasks; files of one label are one run; two unnamed files of one stem are not."""
    a = save_stat(tmp_path / "a" / "x.pt", stat_rows(routing(5, 1)))
    b = save_stat(tmp_path / "b" / "x.pt", stat_rows(routing(4, 2)))
    assert read_sglang([Source(a, "law"), Source(b)], MODEL).tasks == ("law", "x")
    trace = read_sglang([Source(a, "law"), Source(b, "law")], MODEL)
    assert trace.tokens.tolist() == [9]
    assert "two sources" in refusal(a, b)
    with pytest.raises(InputError, match="no sources"):
        read_sglang([], MODEL)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.ones((2, 4, 8), "i4"), "'logical_count': 8 experts; expected 6 of toy"),
        (np.ones((2, 3, 6), "i4"), "'logical_count': 3 layers; expected 4 or more"),
        (np.ones((2, 4, 6), "i4"), "'logical_count': calls in layer 0; expected none"),
        (np.full((2, 4, 6), np.nan, "f4"), "'logical_count': float32 [2, 4, 6]"),
        (np.ones((4, 6), "i4"), "'logical_count': calls in layer 0; expected none"),
        (
            np.ones(6, "i4"),
            "'logical_count': int32 [6]; expected whole numbers [S, L, E] or [L, E]",
        ),
        (np.zeros((2, 4, 6), "i4"), "no calls in layer 1"),
        (np.zeros((0, 4, 6), "i4"), "no calls in layer 1"),
        (-stat_rows(routing(3), unused=0), "row 0 layer"),
        (stat_rows(routing(3)) * (np.arange(4) != 2)[:, None], "no calls in layer 2"),
    ],
)
def test_bad_stat_is_refused(tmp_path: Path, rows: Any, words: str) -> None:
    """Shapes, dtypes, dense layers and counts that contradict --model are named."""
    message = refusal(save_stat(tmp_path / "chat.pt", rows))
    assert words in message
    assert "chat.pt" in message


# ---------------------------------------------------------------------------------------- per_pass


def test_per_pass_maps_physical_to_logical(tmp_path: Path) -> None:
    """Calls of copies come back to their expert, over passes, ranks and files."""
    parts = [routing(5, 1), routing(4, 2), routing(3, 3), routing(2, 4)]
    save(tmp_path / "chat" / "0.pt", [per_pass(1, parts[0]), per_pass(2, parts[1])])
    save(tmp_path / "chat" / "1.pt", [per_pass(1, parts[2], 1), per_pass(2, parts[3], 1)])
    trace, told = read(tmp_path / "chat")
    assert trace.kind == "counts"
    assert np.array_equal(trace.counts[0], sum(map(counted, parts)))
    assert trace.tokens.tolist() == [14]
    assert told == []


def test_per_pass_of_equal_ranks_is_read_once(tmp_path: Path) -> None:
    """Ranks that selected for the same tokens, on other copies of the experts, count once."""
    part = routing(5)
    for rank in range(3):
        save(tmp_path / "chat" / f"{rank}.pt", [per_pass(1, part, rank, seed=rank)])
    trace, told = read(tmp_path / "chat")
    assert np.array_equal(trace.counts[0], counted(part))
    assert told == ["task 'chat': left out ranks 1, 2, which recorded the same as another"]


def test_a_pass_read_twice_is_refused(tmp_path: Path) -> None:
    """Two runs in one folder would be mixed up."""
    save(tmp_path / "chat" / "0.pt", [per_pass(1, routing(5, 1))])
    save(tmp_path / "chat" / "1.pt", [per_pass(1, routing(5, 2))])
    assert "1.pt: record 0: forward pass 1 of rank 0 was read already" in refusal(tmp_path / "chat")


# --------------------------------------------------------------------------------------- per_token


def test_per_token_gives_the_selections(tmp_path: Path) -> None:
    """Prefill of two requests and their decode steps: every token as it was routed."""
    first, second = routing(6, 1), routing(5, 2)
    records = [
        record(1, np.concatenate([first[:4], second[:3]]), positions=[0, 1, 2, 3, 0, 1, 2],
               pieces=[4, 3]),
        record(2, np.stack([first[4], second[3]]), mode=DECODE_MODE, positions=[4, 3]),
        record(3, np.stack([first[5], second[4]]), mode=DECODE_MODE, positions=[5, 4]),
    ]  # fmt: skip
    trace, told = read(save(tmp_path / "chat.pt", records))
    (batch,) = batches(trace)
    assert np.array_equal(batch.experts, np.concatenate([first, second]))
    assert batch.request.tolist() == [0] * 6 + [1] * 5
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.phase.tolist() == [PREFILL] * 4 + [DECODE] * 2 + [PREFILL] * 3 + [DECODE] * 2
    assert np.array_equal(trace.counts[0], counted(np.concatenate([first, second])))
    assert trace.provenance["requests"] == "told apart by positions"
    assert trace.provenance["swappable_requests"] == 0
    assert len(told) == 1
    assert told[0].startswith("told 2 requests apart by their positions")
    write_trace(tmp_path / "t.parquet", trace)
    (again,) = batches(read_trace(tmp_path / "t.parquet"))
    assert np.array_equal(again.experts, batch.experts)


@pytest.mark.parametrize("seed", range(20))
def test_requests_of_a_scheduler_are_told_apart(tmp_path: Path, seed: int) -> None:
    """A scheduler with chunked prefill, cached prefixes and mixed passes: all tokens right.

    Prompts have different lengths, so that no two requests can be taken for each other.
    """
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.permutation(np.arange(2, 300, 23))[:8]]
    plans = [
        {"at": int(rng.integers(n)) if rng.random() < 0.3 else 0, "prompt": n,
         "end": n + int(rng.integers(0, 20))} for n in lengths
    ]  # fmt: skip
    selections = [routing(plan["end"], 100 + i) for i, plan in enumerate(plans)]
    wanted = [range(plan["at"], plan["end"]) for plan in plans]
    waiting, running, chunk = list(range(8)), [], None
    records: list[dict[str, Any]] = []
    while waiting or running or chunk is not None:
        pieces: list[tuple[int, int, int]] = []
        mode = DECODE_MODE
        ready = []
        if waiting or chunk is not None:
            mode = MIXED_MODE if running and rng.random() < 0.5 else EXTEND_MODE
            budget = 40
            while budget and (chunk is not None or waiting):
                number = chunk if chunk is not None else waiting.pop(0)
                plan = plans[number]
                size = min(budget, plan["prompt"] - plan["at"])
                if plan["prompt"] - plan["at"] - size == 1:
                    size += 1  # a last chunk of one token looks like a decode step
                pieces.append((number, plan["at"], size))
                plan["at"] += size
                budget = max(budget - size, 0)
                chunk = number if plan["at"] < plan["prompt"] else None
                if chunk is None:
                    ready.append(number)
        if mode != EXTEND_MODE:
            for number in running:
                pieces.append((number, plans[number]["at"], 1))
                plans[number]["at"] += 1
        records.append(
            record(
                len(records) + 1,
                np.concatenate([selections[n][at : at + size] for n, at, size in pieces]),
                mode=mode,
                positions=[at + i for _, at, size in pieces for i in range(size)],
                pieces=None if mode == DECODE_MODE else [size for *_, size in pieces],
            )
        )
        running = ready + running if mode == MIXED_MODE else running + ready
        running = [n for n in running if plans[n]["at"] < plans[n]["end"]]
    (batch,) = batches(read(save(tmp_path / "chat.pt", records))[0])
    found = {}
    for number in np.unique(batch.request):
        part = batch.rows(batch.request == number)
        found[tuple(part.position.tolist())] = part
    assert len(found) == 8
    for plan, span, experts in zip(plans, wanted, selections, strict=True):
        part = found[tuple(span)]
        assert np.array_equal(part.experts, experts[list(span)])
        prefill = plan["prompt"] - span.start
        if prefill > 1:
            assert part.phase.tolist() == [PREFILL] * prefill + [DECODE] * (len(span) - prefill)


def test_requests_of_equal_length(tmp_path: Path) -> None:
    """Three equal prompts; the first ends: a request of its length may be swapped, and is told."""
    records = [
        record(1, routing(9), positions=[0, 1, 2] * 3, pieces=[3, 3, 3]),
        record(2, routing(3, 1), mode=DECODE_MODE, positions=[3, 3, 3]),
        record(3, routing(2, 2), mode=DECODE_MODE, positions=[4, 4]),
    ]
    trace, told = read(save(tmp_path / "chat.pt", records))
    assert trace.provenance["swappable_requests"] == 1
    assert "1 may be swapped" in told[0]
    assert trace.tokens.tolist() == [14]


def test_requests_that_ran_before_recording(tmp_path: Path) -> None:
    """A decode row of no known request starts one at its position."""
    records = [
        record(1, routing(2, 1), mode=DECODE_MODE, positions=[40, 7]),
        record(2, routing(2, 2), mode=DECODE_MODE, positions=[41, 8]),
    ]
    batch = one(save(tmp_path / "chat.pt", records))
    assert batch.request.tolist() == [0, 0, 1, 1]
    assert batch.position.tolist() == [40, 41, 7, 8]


def test_one_row_never_continues_another_of_its_pass(tmp_path: Path) -> None:
    """Neighbouring positions in one decode pass are different requests."""
    records = [record(1, routing(3), mode=DECODE_MODE, positions=[5, 6, 7])]
    assert one(save(tmp_path / "chat.pt", records)).request.tolist() == [0, 1, 2]


def test_padding_and_idle_passes_are_dropped(tmp_path: Path) -> None:
    """Rows without any selection, and passes of an idle rank, are no tokens."""
    padded = record(1, routing(5), pieces=[3], positions=[0, 1, 2, 0, 0])
    padded["topk_ids_of_layer"][:, 3:] = -1
    step = record(2, routing(3, 1), mode=DECODE_MODE, positions=[3, 0, 0])
    step["topk_ids_of_layer"][:, 1:] = -1
    idle = record(3, routing(2, 2), mode=IDLE_MODE, positions=[0, 0])
    empty = record(4, routing(0), mode=IDLE_MODE, positions=[])
    trace, told = read(save(tmp_path / "chat.pt", [padded, step, idle, empty]))
    (batch,) = batches(trace)
    assert np.array_equal(batch.experts, np.concatenate([routing(5)[:3], routing(3, 1)[:1]]))
    assert batch.request.tolist() == [0] * 4
    assert told[0] == "left out 6 rows of padding"


def test_repeated_rows_are_told(tmp_path: Path) -> None:
    """Rows of one request that repeat in every layer are kept and counted; of others they are not.

    With three layers 50 bits are 17 repetitions; two requests of 9 equal tokens are no run of 18.
    """
    rows = np.repeat(routing(1), 18, axis=0)
    two = save(tmp_path / "two.pt", [record(1, rows, positions=[*range(9)] * 2, pieces=[9, 9])])
    assert len(read(two)[1]) == 1
    whole = save(tmp_path / "one.pt", [record(1, rows)])
    trace, told = read(whole)
    assert trace.tokens.tolist() == [18]
    assert told[0].startswith("17 rows in 1 runs repeat the row before them in every layer")
    assert "one.pt rank 0 after token 0" in told[0]


def test_zeros_were_not_recorded(tmp_path: Path) -> None:
    """Ids that are all 0 are told from experts that moved."""
    message = refusal(save(tmp_path / "chat.pt", [with_ids(2, 1, [0, 0])]))
    assert "layer 2 token 1: nothing was recorded (all ids are 0)" in message


def test_two_ranks_of_different_tokens(tmp_path: Path) -> None:
    """Data-parallel ranks have requests of their own, numbered apart."""
    save(tmp_path / "chat" / "0.pt", [record(1, routing(4, 1))])
    save(tmp_path / "chat" / "1.pt", [record(1, routing(3, 2), rank=1)])
    trace, _ = read(tmp_path / "chat")
    parts = batches(trace)
    assert [part.request.tolist() for part in parts] == [[0] * 4, [1] * 3]
    assert np.array_equal(parts[1].experts, routing(3, 2))


def test_two_ranks_of_equal_tokens(tmp_path: Path) -> None:
    """Tensor-parallel ranks recorded the same tokens, on copies of the experts: read once."""
    for rank in (0, 1):
        save(tmp_path / "chat" / f"{rank}.pt", [record(1, routing(4), rank=rank, seed=rank)])
    trace, told = read(tmp_path / "chat")
    assert trace.tokens.tolist() == [4]
    assert told[0] == "task 'chat': left out ranks 1, which recorded the same as another"


def test_ranks_that_contradict_each_other(tmp_path: Path) -> None:
    """Equal tokens with other experts, or other tokens with equal experts, cannot be both true."""
    save(tmp_path / "a" / "0.pt", [record(1, routing(20, 1))])
    save(tmp_path / "a" / "1.pt", [record(1, routing(20, 2), rank=1)])
    assert "ranks 0 and 1 recorded the same tokens, but not the same experts" in refusal(
        tmp_path / "a"
    )
    save(tmp_path / "b" / "0.pt", [record(1, routing(20, 1))])
    save(tmp_path / "b" / "1.pt", [record(1, routing(20, 1), rank=1, input_ids=[5] * 20)])
    assert "ranks 0 and 1 recorded the same experts, but not the same tokens" in refusal(
        tmp_path / "b"
    )


def test_successive_dumps_of_a_rank(tmp_path: Path) -> None:
    """A request that goes on in the next dump is one request, whatever the files are called."""
    experts = routing(5)
    save(tmp_path / "chat" / "b.pt", [record(1, experts[:3])])
    steps = [
        record(2, experts[3:4], mode=DECODE_MODE, positions=[3]),
        record(3, experts[4:], mode=DECODE_MODE, positions=[4]),
    ]
    save(tmp_path / "chat" / "a.pt", steps)
    batch = one(tmp_path / "chat")
    assert batch.request.tolist() == [0] * 5
    assert np.array_equal(batch.experts, experts)


def changed(key: str, value: Any) -> dict[str, Any]:
    return record(1, routing(3)) | {key: value}


def with_ids(layer: int, token: int, ids: Sequence[int]) -> dict[str, Any]:
    """A record in which one token's ids in a layer are others."""
    whole = record(1, routing(3))
    whole["topk_ids_of_layer"][layer, token] = torch.tensor(list(ids) + [-1] * (8 - len(ids)))
    return whole


COPIES = np.flatnonzero(MAP[1] == np.bincount(MAP[1]).argmax()).tolist()[:2]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (changed("forward_mode", 5), "record 0: forward_mode 5; expected 1 extend, 2 decode"),
        (changed("forward_mode", None), "record 0: 'forward_mode' is missing"),
        (changed("rank", "0"), "record 0 'rank': '0'"),
        (changed("forward_pass_id", -1), "record 0 'forward_pass_id': -1"),
        (changed("positions", [0, 1]), "'positions': 2 numbers; expected 3"),
        (changed("positions", [0, 1, -2]), "'positions': [0, 1, -2]"),
        (changed("positions", [0, 1, 5]), "positions [0, 1, 5]; expected the consecutive"),
        (changed("positions", [0.0, 1.0, float("nan")]), "expected a list of whole numbers"),
        (changed("positions", [[0], [1, 2]]), "expected a list of whole numbers"),
        (changed("positions", [2**40, 1, 2]), "expected numbers below 2^31"),
        (changed("positions", None), "'positions': null"),
        (changed("input_ids", ["a", "b", "c"]), "'input_ids': ['a', 'b', 'c']"),
        (changed("extend_seq_lens", None), "'extend_seq_lens': null"),
        (changed("extend_seq_lens", [2]), "lengths of 2 tokens together; expected 3"),
        (changed("extend_seq_lens", [4]), "lengths of 4 tokens together; expected 3"),
        (changed("topk_ids_of_layer", None), "'topk_ids_of_layer': nothing"),
        (changed("topk_ids_of_layer", [1]), "'topk_ids_of_layer': [1]; expected a tensor"),
        (changed("topk_ids_of_layer", torch.zeros(4, 3, 8)), "float32 [4, 3, 8]"),
        (changed("topk_ids_of_layer", torch.zeros(3, 3, 8, dtype=torch.int32)), "3 layers"),
        (changed("topk_ids_of_layer", torch.zeros(4, 3, 1, dtype=torch.int32)), "1 columns"),
        (with_ids(0, 1, [2, 3]), "selections in layer 0; expected none, for toy has its MoE"),
        (with_ids(2, 1, [2, 9]), "layer 2 token 1: physical experts [2, 9, -1"),
        (with_ids(2, 1, [2, 3, 4]), "--disable-shared-experts-fusion"),
        (with_ids(2, 1, [2]), "layer 2 token 1: physical experts [2, -1"),
        (with_ids(2, 1, []), "layer 2 token 1: physical experts [-1, -1"),
        (with_ids(2, 1, [-7, 1]), "layer 2 token 1: physical experts [-7, 1"),
        (with_ids(1, 2, COPIES), "layer 1 token 2: experts"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, bad: Any, words: str) -> None:
    """Every field that contradicts the model or the others is named by record, layer and token."""
    message = refusal(save(tmp_path / "chat.pt", [bad]))
    assert words in message
    assert "chat.pt: " in message


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (torch.zeros(4, 8, dtype=torch.int32), "8 physical experts; expected 9, as in the map"),
        (torch.zeros(3, 9, dtype=torch.int32), "3 layers; expected 4 or more"),
        (torch.ones(4, 9, dtype=torch.int32), "calls in layer 0; expected none"),
        (-torch.ones(4, 9, dtype=torch.int32), "layer 0 physical expert 0: -1"),
        (torch.zeros(4, 9), "float32 [4, 9]"),
        (torch.zeros(4, 9, dtype=torch.int32), "no tokens in it"),
        (None, "'global_physical_count': nothing"),
    ],
)
def test_bad_physical_counts_are_named(tmp_path: Path, counts: Any, words: str) -> None:
    """Counts that contradict the map or the model are refused."""
    bad = per_pass(1, routing(3)) | {"global_physical_count": counts}
    assert words in refusal(save(tmp_path / "chat.pt", [bad]))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (MAP[:3], "3 layers; expected 4 or more"),
        (MAP % 5, "layer 1: 5 experts, 0..4; expected each of 0..5 of toy"),
        (MAP - 1, "layer 1: 6 experts, -1..4; expected each of 0..5"),
        (replicas(physical=9) * 1.0, "float64 [4, 9]; expected whole numbers [L, P]"),
        (MAP[0], "int64 [9]"),
        (MAP[:, :0], "layer 1: 0 experts, 0..-1"),
    ],
)
def test_bad_maps_are_named(tmp_path: Path, table: Any, words: str) -> None:
    """The map must place every expert of the model in every MoE layer."""
    message = refusal(save(tmp_path / "chat.pt", [record(1, routing(3))], table))
    assert words in message
    assert "'last_physical_to_logical_map'" in message


@pytest.mark.parametrize(
    ("dump", "words"),
    [
        ([1, 2], "list; expected a dump of SGLang's"),
        ({"model": torch.zeros(2)}, "keys model; expected 'logical_count'"),
        ({"records": []}, "no records in it"),
        ({"records": [3]}, "a record is no dictionary"),
        ({"records": [{"rank": 0}]}, "'last_physical_to_logical_map': nothing"),
        ({"records": [{"rank": 0}, {"topk_ids_of_layer": 1}]}, "record 0: 'topk_ids_of_layer' is"),
        ({"logical_count": 3}, "'logical_count': 3; expected a tensor [S, L, E]"),
        ({"logical_count": torch.zeros(1, 4, 6).to_sparse()}, "expected a tensor [S, L, E]"),
    ],
)
def test_other_dumps_are_refused(tmp_path: Path, dump: Any, words: str) -> None:
    """A PyTorch file of another kind is told by what is in it."""
    path = tmp_path / "chat.pt"
    torch.save(dump, str(path))
    assert words in refusal(path)


def test_modes_are_not_mixed(tmp_path: Path) -> None:
    """Counts, tokens and responses make traces of their own."""
    stat = save_stat(tmp_path / "a.pt", stat_rows(routing(3)))
    tokens = save(tmp_path / "b.pt", [record(1, routing(3))])
    lines = tmp_path / "c.jsonl"
    lines.write_text("")
    assert "b.pt: per_token; expected stat, as in" in refusal(stat, tokens)
    assert "a.pt: a recorder's dump; expected responses" in refusal(lines, stat)


def test_a_recording_without_tokens(tmp_path: Path) -> None:
    """Only idle passes are no recording."""
    empty = record(1, routing(0), mode=IDLE_MODE, positions=[])
    assert "no tokens in it" in refusal(save(tmp_path / "chat.pt", [empty]))


# -------------------------------------------------------------------------------- untrusted files


class Bomb:
    """Makes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_never_runs(tmp_path: Path, form: str) -> None:
    """A pickle with code in it is refused in one line, and its code does not run."""
    marker, path = tmp_path / "ran", tmp_path / "chat.pt"
    dump = {"rank": 0, "logical_count": Bomb(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(dump))
    else:
        torch.save(dump, str(path), _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert "not opened: it holds code or objects" in message or "not a readable" in message
    assert "weights_only" not in message
    assert not marker.exists()


@pytest.mark.parametrize("mode", ["stat", "per_token"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_is_refused(tmp_path: Path, mode: str, legacy: bool) -> None:
    """At every length that is tried, a cut file is refused without a traceback."""
    path = tmp_path / "chat.pt"
    if mode == "stat":
        save_stat(path, stat_rows(routing(3)))
    else:
        save(path, [record(1, routing(3))])
    if legacy:
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 61), *range(20), *range(len(whole) - 20, len(whole))}:
        path.write_bytes(whole[:length])
        assert "chat.pt" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_changed_bytes_never_end_in_a_traceback(tmp_path: Path, legacy: bool) -> None:
    """With bytes changed at random a file is read, or refused."""
    path = save(tmp_path / "chat.pt", [record(1, routing(3))])
    if legacy:
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged)
        message = ""
        try:
            counts = read(path)[0].counts
        except InputError as error:
            message = str(error)
        assert message or counts.min() >= 0
        assert "\n" not in message


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """A missing file and a folder without dumps are named."""
    assert "gone.pt: no such file" in refusal(tmp_path / "gone.pt")
    assert "no .pt files in it" in refusal(tmp_path)


def test_without_pytorch_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch is missing the message says what to install."""
    path = save_stat(tmp_path / "chat.pt", stat_rows(routing(3)))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'prism-plan[hf]'" in refusal(path)


# --------------------------------------------------------------------------------------- responses


def raw(experts: Selections) -> str:
    """``meta_info.routed_experts``: base64 of raw int32 [T, L, K], zeros in dense layers."""
    array = np.zeros((len(experts), LAYERS, MODEL.top_k), np.int32)
    array[:, list(MODEL.moe_layers)] = experts
    return base64.b64encode(array.tobytes()).decode()


def response(experts: Selections, prompt: int, start: int = 0) -> dict[str, Any]:
    meta = {
        "routed_experts": raw(experts[start:]),
        "prompt_tokens": prompt,
        "completion_tokens": len(experts) + 1 - prompt,
    }
    return {"text": "x", "meta_info": meta}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_responses_give_the_recorded_experts(tmp_path: Path) -> None:
    """Responses one a line, a list of them, and the OpenAI form: each a request."""
    a, b, c = routing(7, 1), routing(6, 2), routing(5, 3)
    openai = {
        "choices": [{"text": "x"}],
        "sglext": {"routed_experts": raw(c)},
        "usage": {"prompt_tokens": 2, "completion_tokens": 4},
        "task": "law",
    }
    path = write(tmp_path / "chat.jsonl", [response(a, 3), response(b, 6)], openai)
    trace, told = read(path)
    parts = batches(trace)
    assert trace.tasks == ("chat", "law")
    assert all(np.array_equal(p.experts, e) for p, e in zip(parts, (a, b, c), strict=True))
    assert [p.phase.tolist().count(DECODE) for p in parts] == [4, 0, 3]
    assert [p.request[0] for p in parts] == [0, 1, 2]
    assert told == []


def test_responses_from_a_start(tmp_path: Path) -> None:
    """With routed_experts_start_len, positions are counted from the end."""
    experts = routing(9)
    batch = one(write(tmp_path / "chat.jsonl", response(experts, 5, start=3)))
    assert batch.position.tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.phase.tolist() == [PREFILL] * 2 + [DECODE] * 4
    assert np.array_equal(batch.experts, experts[3:])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"choices": []}, "line 1: neither 'meta_info' nor 'sglext'"),
        ([{"meta_info": 3}], "line 1 item 0 'meta_info': 3"),
        ({"meta_info": {"routed_experts": [1]}}, "'routed_experts': [1]; expected base64 text"),
        ({"meta_info": {"routed_experts": "AAAA"}}, "3 bytes; expected a multiple of 32"),
        ({"meta_info": {"routed_experts": "A"}}, "is not base64"),
        ({"meta_info": {"prompt_tokens": -1}}, "'prompt_tokens': -1"),
        ({"meta_info": {}}, "no token has routed experts"),
        ({"meta_info": {"routed_experts": raw(routing(2) + 6)}}, "token 0 layer 1: expert"),
        (5, "line 1: 5; expected a JSON object"),
    ],
)
def test_bad_responses_are_refused(tmp_path: Path, line: Any, words: str) -> None:
    """A response of another form or model is one line of error that names the line."""
    assert words in refusal(write(tmp_path / "chat.jsonl", line))
