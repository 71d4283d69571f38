"""Tests of the requests of a simulation: which prompts, when, and what changes them."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.arrival_trace import Arrival, ArrivalTrace
from prism_plan.simulate.phase_schedule import Phase, Schedule
from prism_plan.simulate.recorded_prompts import gather_prompts
from prism_plan.simulate.requests import Prompts, Requests
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.synthetic_prompts import POOL
from prism_plan.trace import PHASES, TokenBatch, Trace, concatenate_batches, trace_from_batches

MODEL = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=50,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
TASKS = ("law", "code", "chat")


def tokens_of(request: int, task: int, phases: str) -> TokenBatch:
    """Tokens whose phases are letters p, d, u; the experts tell request and position."""
    number = len(phases)
    position = np.arange(number, dtype=np.int32)
    first = np.stack([np.full(number, request % 25), 25 + position % 25], axis=1)
    return TokenBatch(
        request=np.full(number, request, np.int32),
        position=position,
        phase=np.array(["pdu".index(letter) for letter in phases], np.int8),
        task=np.full(number, task, np.int32),
        experts=np.stack([first, first], axis=1).astype(np.uint16),
    )


def mixed_trace() -> Trace:
    """24 requests of the tasks in turn, 2 to 13 tokens long, phases told."""
    batches = [tokens_of(r, r % 3, "p" * (1 + r % 5) + "d" * (1 + r % 8)) for r in range(24)]
    return trace_from_batches(MODEL, TASKS, batches, name="mixed")


def counts_only(trace: Trace) -> Trace:
    return Trace(trace.model, trace.tasks, trace.counts, trace.tokens, name="counts")


def cluster(*servers: dict[str, Any]) -> Cluster:
    gpus = (Gpu(slots=1),)
    made = (Server(f"edge-{n}", gpus, **server) for n, server in enumerate(servers))
    return Cluster("c", tuple(made))


LAW = {"tasks": {"law": 1.0}, "arrival_interval_s": 10.0}
CODE = {"tasks": {"code": 1.0}, "arrival_interval_s": 20.0}
MIXED = {"tasks": {"law": 0.5, "code": 0.2, "chat": 0.3}, "arrival_interval_s": 5.0}


def of_server(requests: Requests, n: int) -> list[tuple[float, str, int]]:
    """(time, task, id in the trace) of each request of server ``n``, in order."""
    mine = requests.home == n
    prompt = requests.prompt[mine]
    return [
        (at_s, requests.prompts.tasks[task], request)
        for at_s, task, request in zip(
            requests.arrival_s[mine].tolist(),
            requests.prompts.task[prompt].tolist(),
            requests.prompts.trace_request[prompt].tolist(),
            strict=True,
        )
    ]


def tokens(prompts: Prompts, index: int) -> np.ndarray:
    first = int(prompts.first_row[index])
    length = int(prompts.prefill_tokens[index]) + int(prompts.decode_tokens[index])
    return prompts.experts[first : first + length]


# ------------------------------------------------------------------------------------- prompts


def gather(batches: Sequence[TokenBatch], decode_tokens: int = 32) -> Prompts:
    """All requests of a trace of these batches."""
    trace = trace_from_batches(MODEL, TASKS, batches, name="few")
    listed = trace.request_lengths()
    return gather_prompts(trace, listed, np.arange(len(listed.request)), decode_tokens)


@given(seed=st.integers(0, 1000), parts=st.integers(1, 6))
@settings(max_examples=40)
def test_rows_in_any_order(seed: int, parts: int) -> None:
    """However rows and batches are mixed, each prompt has its tokens in order of position."""
    rng = np.random.default_rng(seed)
    whole = [tokens_of(r, r % 3, "p" * (1 + r % 4) + "d" * (r % 3)) for r in (3, 0, 11, 7, 5)]
    rows = concatenate_batches(whole).rows(rng.permutation(sum(map(len, whole))))
    cuts = np.array_split(np.arange(len(rows)), parts)
    prompts = gather([rows.rows(cut) for cut in cuts])
    assert prompts.trace_request.tolist() == [0, 3, 7, 5, 11]  # by task, then by id
    assert prompts.task.tolist() == [0, 0, 1, 2, 2]
    by_id = {int(batch.request[0]): batch for batch in whole}
    for index, request in enumerate(prompts.trace_request.tolist()):
        np.testing.assert_array_equal(tokens(prompts, index), by_id[request].experts)
        assert prompts.decode_tokens[index] == (by_id[request].phase == 1).sum()


@pytest.mark.parametrize(
    ("phases", "option", "prefill", "decode"),
    [
        ("ppdd", 32, 2, 2),
        ("pppp", 32, 4, 0),
        ("ddd", 32, 0, 3),
        ("uuuuuu", 2, 4, 2),
        ("uuuuuu", 32, 3, 3),
        ("uuuuu", 32, 3, 2),
        ("u", 32, 1, 0),
        ("uuuu", 0, 4, 0),
        ("pppu", 1, 3, 1),
        ("uddd", 32, 2, 2),
        ("dpu", 1, 2, 1),
    ],
)
def test_phases(phases: str, option: int, prefill: int, decode: int) -> None:
    """Told phases stand; with one unknown, the last tokens, at most half, are decode steps."""
    prompts = gather([tokens_of(0, 0, phases)], option)
    assert (prompts.prefill_tokens.tolist(), prompts.decode_tokens.tolist()) == (
        [prefill],
        [decode],
    )


def test_prefill_after_decode() -> None:
    """A prompt token after an answer token is refused, with its request and position."""
    with pytest.raises(InputError, match="request 4 position 2 is prefill after decode") as caught:
        gather([tokens_of(0, 0, "ppdd"), tokens_of(4, 0, "pdpd"), tokens_of(5, 0, "pp")])
    assert caught.value.source == "few"


def test_a_new_request_may_begin_with_prefill() -> None:
    """The order of phases is asked within a request, not between neighbours."""
    assert gather([tokens_of(0, 0, "pd"), tokens_of(1, 0, "pd")]).decode_tokens.tolist() == [1, 1]


def test_list_of_requests() -> None:
    """Ids by task and in order, lengths, also of requests that lie in two batches."""
    batches = [tokens_of(9, 0, "pp"), tokens_of(2, 2, "pdd"), tokens_of(5, 0, "p")]
    late = tokens_of(9, 0, "pppp").rows(slice(2, 4))
    listed = trace_from_batches(MODEL, TASKS, [*batches, late]).request_lengths()
    assert listed.request.tolist() == [5, 9, 2]
    assert listed.task.tolist() == [0, 0, 2]
    assert listed.tokens.tolist() == [1, 4, 3]
    assert listed.first(len(TASKS)).tolist() == [0, 2, 2, 3]


def test_only_sampled_tokens_are_kept() -> None:
    """The pool holds the rows of the sampled requests and no others."""
    trace = mixed_trace()
    requests = sample_requests(trace, cluster(LAW), requests_per_server=3)
    prompts = requests.prompts
    ids = {request for _, _, request in of_server(requests, 0)}
    assert set(prompts.trace_request.tolist()) == ids
    assert len(prompts) == len(ids) <= 3
    lengths = {r: 2 + r % 5 + r % 8 for r in ids}
    assert len(prompts.experts) == sum(lengths.values()) < trace.tokens.sum() / 5
    assert prompts.experts.base is None  # a view would keep the rest alive


def test_memory_is_that_of_the_sample() -> None:
    """Sampling three of 100 requests never holds a fifth of the trace's tokens."""
    model = dataclasses.replace(MODEL, moe_layers=tuple(range(32)), num_decoder_layers=32)
    rows = 1_000
    position = np.arange(rows, dtype=np.int32)

    def batches() -> Iterator[TokenBatch]:
        for request in range(100):
            yield TokenBatch(
                request=np.full(rows, request, np.int32),
                position=position,
                phase=np.zeros(rows, np.int8),
                task=np.zeros(rows, np.int32),
                experts=np.tile(
                    np.array([request % 50, (request + 1) % 50], np.uint16), (rows, 32, 1)
                ),
            )

    counts = np.full((1, 32, 50), 4_000)
    trace = Trace(model, ("law",), counts, np.array([100_000]), np.array([100]), batches)
    whole = 100 * rows * 32 * 2 * 2
    tracemalloc.start()
    try:
        requests = sample_requests(trace, cluster(LAW), requests_per_server=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(requests.prompts.experts) <= 3 * rows
    assert peak < whole / 5


def test_arrays_are_read_only() -> None:
    """Neither requests nor prompts can be changed by a part that uses them."""
    requests = sample_requests(mixed_trace(), cluster(LAW), requests_per_server=3)
    for owner in (requests, requests.prompts):
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if isinstance(value, np.ndarray):
                with pytest.raises(ValueError, match="read-only"):
                    value[...] = 0


# ------------------------------------------------------------------------------------ requests


def test_types_and_order() -> None:
    """Requests come by time, types are as told, each server has its number, prompts its task."""
    requests = sample_requests(mixed_trace(), cluster(LAW, {}, CODE), requests_per_server=40)
    assert len(requests) == 80
    assert np.bincount(requests.home, minlength=3).tolist() == [40, 0, 40]
    assert (np.diff(requests.arrival_s) >= 0).all()
    assert requests.servers == ("edge-0", "edge-1", "edge-2")
    types = [requests.home.dtype, requests.arrival_s.dtype, requests.prompt.dtype]
    assert types == [np.int32, np.float64, np.int32]
    assert requests.rate is not None
    np.testing.assert_allclose(requests.rate, [0.1, 0, 0.05])
    assert {task for _, task, _ in of_server(requests, 0)} == {"law"}
    assert {task for _, task, _ in of_server(requests, 2)} == {"code"}
    assert requests.prompts.co_activation
    trace = mixed_trace()
    assert trace.batches is not None
    by_id = {int(batch.request[0]): batch for batch in trace.batches()}
    for index, request in enumerate(requests.prompts.trace_request.tolist()):
        np.testing.assert_array_equal(tokens(requests.prompts, index), by_id[request].experts)


def test_ties_go_by_server() -> None:
    """At equal times requests come in order of their server."""
    at = [(2.0, 1), (1.0, 1), (1.0, 0), (2.0, 0), (1.0, 1)]
    fixed = ArrivalTrace(tuple(Arrival(f"edge-{n}", at_s) for at_s, n in at))
    requests = sample_requests(mixed_trace(), cluster(LAW, CODE), arrivals=fixed)
    assert requests.arrival_s.tolist() == [1, 1, 1, 2, 2]
    assert requests.home.tolist() == [0, 1, 1, 0, 1]


def test_shares_and_uniform_prompts() -> None:
    """Tasks come by their shares and prompts of a task equally often, within five errors."""
    number = 20_000
    requests = sample_requests(mixed_trace(), cluster(MIXED), requests_per_server=number)
    counts = np.bincount(requests.prompts.trace_request[requests.prompt], minlength=24)
    for task, share in enumerate((0.5, 0.2, 0.3)):
        mine = counts[task::3]  # eight requests of each task
        assert abs(mine.sum() - number * share) < 5 * np.sqrt(number * share * (1 - share))
        chance = share / 8
        error = np.sqrt(number * chance * (1 - chance))
        assert (np.abs(mine - number * chance) < 5 * error).all()


def test_duration() -> None:
    """All arrivals before the time and none after; they begin like those by number."""
    sites = cluster(LAW, MIXED)
    timed = sample_requests(mixed_trace(), sites, duration_s=300.0)
    assert timed.arrival_s[-1] < 300
    counted = sample_requests(mixed_trace(), sites, requests_per_server=500)
    for n in range(2):
        early = [request for request in of_server(counted, n) if request[0] < 300]
        assert of_server(timed, n) == early


# ------------------------------------------------------------------------------ random streams


@given(
    short=st.integers(1, 60),
    more=st.integers(0, 60),
    burst=st.integers(1, 4),
    seed=st.integers(0, 3),
    kind=st.sampled_from(["tokens", "counts"]),
)
@settings(max_examples=30)
def test_more_requests_extend(short: int, more: int, burst: int, seed: int, kind: str) -> None:
    """A longer run begins with all the requests of a shorter one."""
    trace = mixed_trace() if kind == "tokens" else counts_only(mixed_trace())
    sites = cluster(MIXED, {}, LAW)
    options: dict[str, Any] = {"burst": burst, "seed": seed, "prompt_tokens": 2, "decode_tokens": 1}
    first = sample_requests(trace, sites, requests_per_server=short, **options)
    both = sample_requests(trace, sites, requests_per_server=short + more, **options)
    for n in range(3):
        assert of_server(both, n)[:short] == of_server(first, n)


def test_servers_do_not_change_each_other() -> None:
    """Another server, or other tasks and intervals of one, leave the requests of the others."""
    trace = mixed_trace()
    alone = of_server(sample_requests(trace, cluster(MIXED)), 0)
    for other in ({}, LAW, CODE, {**MIXED, "arrival_interval_s": 1.0}):
        assert of_server(sample_requests(trace, cluster(MIXED, other)), 0) == alone


def test_sources_do_not_change_each_other() -> None:
    """Bursts change only times; tasks and intervals change no other source."""
    trace = mixed_trace()
    plain = of_server(sample_requests(trace, cluster(MIXED)), 0)
    burst = of_server(sample_requests(trace, cluster(MIXED), burst=5), 0)
    assert [request[1:] for request in burst] == [request[1:] for request in plain]
    assert [request[0] for request in burst] != [request[0] for request in plain]
    slow = of_server(sample_requests(trace, cluster({**MIXED, "arrival_interval_s": 10.0})), 0)
    np.testing.assert_allclose([r[0] for r in slow], [2 * r[0] for r in plain], rtol=1e-12)
    assert [request[1:] for request in slow] == [request[1:] for request in plain]
    law = of_server(sample_requests(trace, cluster({**LAW, "arrival_interval_s": 5.0})), 0)
    assert [request[0] for request in law] == [request[0] for request in plain]
    # each task has eight requests 3 i + task: the same choice of i, whatever the task
    assert [request[2] // 3 for request in law] == [request[2] // 3 for request in plain]


def test_seed() -> None:
    """The same seed gives the same requests, another seed others."""
    trace = mixed_trace()
    runs = [of_server(sample_requests(trace, cluster(MIXED), seed=seed), 0) for seed in (4, 4, 5)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_servers_differ() -> None:
    """Two servers of the same description do not get the same requests."""
    requests = sample_requests(mixed_trace(), cluster(MIXED, MIXED))
    first, second = of_server(requests, 0), of_server(requests, 1)
    for part in range(3):
        assert [request[part] for request in first] != [request[part] for request in second]


# ------------------------------------------------------------------------------------- counts


def test_counts_only_pool() -> None:
    """Prompts of a counts-only trace come from a pool of each task and have the lengths asked."""
    trace = counts_only(mixed_trace())
    requests = sample_requests(
        trace, cluster(LAW), requests_per_server=2_000, prompt_tokens=3, decode_tokens=2
    )
    prompts = requests.prompts
    assert not prompts.co_activation
    assert prompts.trace_request.tolist() == list(range(POOL))
    assert set(prompts.prefill_tokens.tolist()) == {3}
    assert set(prompts.decode_tokens.tolist()) == {2}
    assert prompts.experts.shape == (POOL * 5, 2, 2)
    law = set(np.flatnonzero(trace.counts[0, 0]).tolist())
    assert set(prompts.experts[:, 0].ravel().tolist()) <= law


def test_mixtral_requests(mixtral_trace: Trace) -> None:
    """Mixtral's real counts serve a cluster: default lengths, different experts in each layer."""
    task = mixtral_trace.tasks[0]
    sites = cluster({"tasks": {task: 1.0}, "arrival_interval_s": 1.0})
    prompts = sample_requests(mixtral_trace, sites, requests_per_server=4).prompts
    assert prompts.experts.shape == (len(prompts) * 160, 32, 2)
    assert (prompts.experts[..., 0] != prompts.experts[..., 1]).all()


# ----------------------------------------------------------------------------------- schedules


def test_phases_by_number() -> None:
    """Request number i of a server is of the phase that holds i, also where others are slower."""
    schedule = Schedule((Phase(30), Phase(20, {"edge-0": {"chat": 1.0}}), Phase()))
    sites = cluster(LAW, {**CODE, "arrival_interval_s": 1.0})
    requests = sample_requests(mixed_trace(), sites, requests_per_server=60, schedule=schedule)
    assert [r[1] for r in of_server(requests, 0)] == ["law"] * 30 + ["chat"] * 30
    assert [r[1] for r in of_server(requests, 1)] == ["code"] * 60
    assert requests.rate is not None
    plain = sample_requests(mixed_trace(), sites, requests_per_server=60)
    assert [r[0] for r in of_server(requests, 0)] == [r[0] for r in of_server(plain, 0)]


def test_interval_by_phase() -> None:
    """A phase's interval scales the gaps of its requests; the rate is then not told."""
    trace, sites = mixed_trace(), cluster(LAW)
    schedule = Schedule((Phase(3), Phase(None, {}, 1.0)))
    plain = sample_requests(trace, sites, requests_per_server=10)
    shifted = sample_requests(trace, sites, requests_per_server=10, schedule=schedule)
    gaps = np.diff(plain.arrival_s, prepend=0.0) * np.where(np.arange(10) < 3, 1.0, 0.1)
    np.testing.assert_allclose(shifted.arrival_s, np.cumsum(gaps), rtol=1e-12)
    assert shifted.rate is None


def test_schedule_gives_the_times() -> None:
    """A server without interval is served where the first phase gives one."""
    schedule = Schedule((Phase(None, {"edge-0": {"law": 1.0}}, 2.0),))
    requests = sample_requests(mixed_trace(), cluster({}), requests_per_server=5, schedule=schedule)
    assert len(requests) == 5
    assert requests.rate is not None
    assert requests.rate.tolist() == [0.5]


@pytest.mark.parametrize(
    ("number", "source", "message"),
    [
        (30, "requests_per_server", "30 requests of each server end before phase\\[1\\]"),
        (41, "shift.toml", "the phases hold 40 requests of a server, and 'edge-0' has 41"),
    ],
)
def test_schedule_and_number(number: int, source: str, message: str) -> None:
    """Neither a phase that is never reached nor requests beyond the last are passed over."""
    schedule = Schedule((Phase(30), Phase(10)), "shift.toml")
    with pytest.raises(InputError, match=message) as caught:
        sample_requests(mixed_trace(), cluster(LAW), requests_per_server=number, schedule=schedule)
    assert (caught.value.source or caught.value.parameter) == source


@pytest.mark.parametrize("number", [31, 40])
def test_bounded_schedule(number: int) -> None:
    """A last phase that tells its requests may be used in part or in full."""
    schedule = Schedule((Phase(30), Phase(10)))
    requests = sample_requests(
        mixed_trace(), cluster(LAW), requests_per_server=number, schedule=schedule
    )
    assert len(requests) == number


# --------------------------------------------------------------------------------- fixed times

LINES = (
    Arrival("edge-1", 4.0, "chat", 5, 1),
    Arrival("edge-0", 3.0, None, None, 2),
    Arrival("edge-1", 1.0, "code", None, 3),
    Arrival("edge-0", 0.0, None, 7, 4),
    Arrival("edge-0", 3.0, "law", None, 5),
    Arrival("edge-1", 4.0, "chat", None, 6),
)


def test_fixed_times() -> None:
    """Times, tasks and requests of the file are kept, what it leaves out is drawn."""
    sites = cluster(LAW, {})
    requests = sample_requests(mixed_trace(), sites, arrivals=ArrivalTrace(LINES))
    first, second = of_server(requests, 0), of_server(requests, 1)
    assert [r[:2] for r in first] == [(0.0, "code"), (3.0, "law"), (3.0, "law")]
    assert first[0][2] == 7
    assert [r[:2] for r in second] == [(1.0, "code"), (4.0, "chat"), (4.0, "chat")]
    assert 5 in [r[2] for r in second[1:]]
    assert requests.rate is None
    assert requests.prompts.trace_request[0] % 3 == 0


@given(st.permutations(LINES))
@settings(max_examples=25)
def test_order_of_lines(lines: list[Arrival]) -> None:
    """The order of the lines changes nothing."""
    sites = cluster(LAW, {})
    here = sample_requests(mixed_trace(), sites, arrivals=ArrivalTrace(tuple(lines)))
    there = sample_requests(mixed_trace(), sites, arrivals=ArrivalTrace(LINES))
    for n in range(2):
        assert of_server(here, n) == of_server(there, n)


@pytest.mark.parametrize(
    ("arrival", "place", "message"),
    [
        (Arrival("edge0", 1.0, None, None, 8), "line 8: server", "did you mean 'edge-0'"),
        (Arrival("edge-0", 1.0, "lav", None, 8), "line 8: task", "did you mean 'law'"),
        (Arrival("edge-0", 1.0, None, 99, 8), "line 8: request", "unknown request 99; .*0 to 23"),
        (Arrival("edge-0", 1.0, "law", 7, 8), "line 8: request", "request 7 is of task 'code'"),
        (Arrival("edge-1", 1.0, None, None, 8), "line 8", "'edge-1' has no tasks"),
    ],
)
def test_unknown_in_fixed_times(arrival: Arrival, place: str, message: str) -> None:
    """Names and ids that cluster or trace do not have are told with file and line."""
    fixed = ArrivalTrace((*LINES, arrival), "times.jsonl")
    with pytest.raises(InputError, match=message) as caught:
        sample_requests(mixed_trace(), cluster(LAW, {}), arrivals=fixed)
    assert (caught.value.source, caught.value.place) == ("times.jsonl", place)


def test_counts_have_no_request_ids() -> None:
    """An id means nothing in a counts-only trace; times and tasks do."""
    trace = counts_only(mixed_trace())
    with pytest.raises(InputError, match="a counts-only trace has none"):
        sample_requests(trace, cluster(LAW, {}), arrivals=ArrivalTrace(LINES))
    without = tuple(dataclasses.replace(line, request=None) for line in LINES)
    assert len(sample_requests(trace, cluster(LAW, {}), arrivals=ArrivalTrace(without))) == 6


def test_fixed_times_follow_a_schedule() -> None:
    """Tasks that the file leaves out are those of the phase of the request's number."""
    fixed = ArrivalTrace(tuple(Arrival("edge-0", float(at)) for at in range(6)))
    schedule = Schedule((Phase(2), Phase(None, {"edge-0": {"chat": 1.0}})))
    requests = sample_requests(mixed_trace(), cluster(LAW), arrivals=fixed, schedule=schedule)
    assert [r[1] for r in of_server(requests, 0)] == ["law"] * 2 + ["chat"] * 4


@pytest.mark.parametrize(
    ("options", "source", "place"),
    [
        ({"duration_s": 5.0}, "duration_s", ""),
        ({"burst": 2}, "burst", ""),
        (
            {"schedule": Schedule((Phase(None, {}, 2.0),), "shift.toml")},
            "shift.toml",
            "phase[0].arrival_interval_s",
        ),
    ],
)
def test_fixed_times_leave_nothing_to_draw(
    options: dict[str, Any], source: str, place: str
) -> None:
    """What says when requests arrive contradicts a file that says it too."""
    with pytest.raises(InputError, match="fixed times") as caught:
        sample_requests(mixed_trace(), cluster(LAW, {}), arrivals=ArrivalTrace(LINES), **options)
    assert (caught.value.source or caught.value.parameter, caught.value.place) == (source, place)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"requests_per_server": 0}, "requests_per_server"),
        ({"requests_per_server": True}, "requests_per_server"),
        ({"requests_per_server": 10**9}, "requests_per_server"),
        ({"requests_per_server": 1.5}, "requests_per_server"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"duration_s": -1.0}, "duration_s"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"duration_s": float("inf")}, "duration_s"),
        ({"duration_s": 1e-9}, "duration_s"),
        ({"burst": 0}, "burst"),
        ({"decode_tokens": -1}, "decode_tokens"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"prompt_tokens": 10**9}, "prompt_tokens"),
        ({"prompt_tokens": 0, "decode_tokens": 0}, "prompt_tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options(options: dict[str, Any], parameter: str) -> None:
    """Options out of range, and a time before the first arrival, are told by their names."""
    with pytest.raises(InputError) as caught:
        sample_requests(counts_only(mixed_trace()), cluster(LAW), **options)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("servers", "place", "message"),
    [
        (
            ({}, {"tasks": {"law": 1.0}, "weight": 1.0}),
            "server[1].arrival_interval_s",
            "`weight` is for planning, the simulator needs times",
        ),
        (
            ({"tasks": {"law": 1.0}, "arrival_interval_s": float("nan")},),
            "server[0].arrival_interval_s",
            "nan; expected mean seconds",
        ),
        (
            ({"tasks": {"law": 1.0}, "arrival_interval_s": 0.0},),
            "server[0].arrival_interval_s",
            "0.0; expected mean seconds",
        ),
        (({}, {"tasks": {"law": 0.0}}), "server", "no server has tasks"),
        (({"tasks": {"lav": 1.0}},), "server[0].tasks", "did you mean 'law'"),
    ],
    ids=["no-interval", "nan", "zero", "nobody", "unknown-task"],
)
def test_wrong_servers(servers: tuple[dict[str, Any], ...], place: str, message: str) -> None:
    """What the cluster lacks is told with its place."""
    with pytest.raises(InputError, match=message) as caught:
        sample_requests(mixed_trace(), cluster(*servers))
    assert caught.value.place == place


def test_impossible_prompts_and_requests() -> None:
    """Types refuse prompts without tokens or beyond the rows, and requests out of order."""
    good = gather([tokens_of(0, 0, "pd")])
    for change in (
        {"decode_tokens": np.array([2], np.int32)},
        {"prefill_tokens": np.array([-1], np.int32)},
        {"prefill_tokens": np.zeros(1, np.int32), "decode_tokens": np.zeros(1, np.int32)},
        {"first_row": np.array([-1])},
    ):
        with pytest.raises(ValueError, match="prompt"):
            dataclasses.replace(good, **change)
    index = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="not in order"):
        Requests(("a",), good, index, np.array([2.0, 1.0]), index)
    assert PHASES == ("prefill", "decode", "unknown")  # as the letters p, d, u stand
