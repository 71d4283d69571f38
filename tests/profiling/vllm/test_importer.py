"""Routed experts in responses of vLLM."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.sources import Source
from prism_plan.profiling.vllm.importer import read_vllm
from prism_plan.trace import TokenBatch, Trace

PREFILL, DECODE, UNKNOWN = 0, 1, 2


def toy(num_experts: int = 8, moe_layers: tuple[int, ...] = (1, 2, 3), top_k: int = 2) -> ModelSpec:
    """A model whose layer 0 is dense."""
    return ModelSpec(
        name="toy",
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=8,
        dtype_bytes=2,
        expert_bytes=100,
        dense_bytes=100,
        kv_bytes_per_token=4,
    )


MODEL = toy()


def routing(tokens: int, model: ModelSpec = MODEL, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Random selections [T, MoE layers, K]."""
    noise = np.random.default_rng(seed).random((tokens, model.num_layers, model.num_experts))
    return np.argsort(noise, axis=2)[:, :, : model.top_k].astype(np.uint16)


def with_dense(
    experts: npt.NDArray[Any], model: ModelSpec = MODEL, dtype: Any = np.uint8
) -> npt.NDArray[Any]:
    """The array as the engine returns it: zeros in the columns of dense layers."""
    layers = model.moe_layers[-1] + 1
    array = np.zeros((len(experts), layers, model.top_k), dtype)
    array[:, list(model.moe_layers)] = experts
    return array


def npy(array: npt.NDArray[Any], *, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def encoded(array: npt.NDArray[Any]) -> str:
    """As ``vllm.utils.serial_utils.numpy2base64`` does it."""
    return base64.b64encode(npy(array)).decode("ascii")


def response(array: npt.NDArray[Any], prompt: int | None = None, **more: Any) -> dict[str, Any]:
    """An OpenAI-style response of one choice."""
    line: dict[str, Any] = {"id": "x", "choices": [{"index": 0, "routed_experts": encoded(array)}]}
    if prompt is not None:
        line["usage"] = {"prompt_tokens": prompt, "completion_tokens": len(array) + 1 - prompt}
    return line | more


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batches(trace: Trace) -> list[TokenBatch]:
    assert trace.batches is not None
    return list(trace.batches())


def read_one(path: Path, model: ModelSpec = MODEL) -> TokenBatch:
    (batch,) = batches(read_vllm([Source(path)], model))
    return batch


def refusal(path: Path, model: ModelSpec = MODEL) -> str:
    with pytest.raises(InputError) as caught:
        read_vllm([Source(path)], model)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(8, np.uint8), (256, np.uint8), (300, np.uint16), (300, np.int32), (8, ">i8")],
)
def test_responses_give_the_recorded_experts(tmp_path: Path, num_experts: int, dtype: Any) -> None:
    """For every dtype the trace has each token's experts, without the dense layer's column."""
    model = toy(num_experts)
    experts = [routing(9, model, 1), routing(5, model, 2)]
    lines = [response(with_dense(e, model, dtype), prompt=4) for e in experts]
    path = write(tmp_path / "chat.jsonl", *lines)
    trace = read_vllm([Source(path)], model)
    assert trace.kind == "tokens"
    assert trace.tasks == ("chat",)
    assert trace.requests is not None
    assert trace.requests.tolist() == [2]
    for number, (batch, wanted) in enumerate(zip(batches(trace), experts, strict=True)):
        assert np.array_equal(batch.experts, wanted)
        assert batch.experts.dtype == np.uint16
        assert batch.request.tolist() == [number] * len(wanted)
        assert batch.position.tolist() == list(range(len(wanted)))
        assert batch.phase.tolist() == [PREFILL] * 4 + [DECODE] * (len(wanted) - 4)


def test_the_trace_can_be_written_and_read(tmp_path: Path) -> None:
    """Through a trace file, nothing of the recording changes."""
    experts = routing(9)
    trace = read_vllm(
        [Source(write(tmp_path / "a.jsonl", response(with_dense(experts), 4)))], MODEL
    )
    write_trace(tmp_path / "t.parquet", trace)
    (batch,) = batches(read_trace(tmp_path / "t.parquet"))
    assert np.array_equal(batch.experts, experts)
    assert batch.phase.tolist() == [PREFILL] * 4 + [DECODE] * 5


def test_a_model_without_dense_layers(tmp_path: Path) -> None:
    """Where every layer is MoE, every column is kept."""
    model = toy(moe_layers=(0, 1, 2, 3))
    experts = routing(6, model)
    path = write(tmp_path / "a.jsonl", response(experts.astype(np.uint8)))
    assert np.array_equal(read_one(path, model).experts, experts)


def test_dense_columns_between_and_after_moe_layers(tmp_path: Path) -> None:
    """Dense layers may stand anywhere; their columns are dropped by the model's layers."""
    model = toy(moe_layers=(1, 3))
    experts = routing(6, model)
    array = np.zeros((6, 6, 2), np.uint8)
    array[:, [1, 3]] = experts
    path = write(tmp_path / "a.jsonl", response(array))
    assert np.array_equal(read_one(path, model).experts, experts)


def test_columns_dropped_already(tmp_path: Path) -> None:
    """An array of as many layers as the model has MoE layers is taken as those."""
    experts = routing(6)
    path = write(tmp_path / "a.jsonl", response(experts.astype(np.uint8)))
    assert np.array_equal(read_one(path).experts, experts)


def test_plain_objects_and_npy_files(tmp_path: Path) -> None:
    """Base64, nested lists, a named .npy file and a .npy file alone all give the same experts."""
    experts = routing(6)
    array = with_dense(experts)
    (tmp_path / "one.npy").write_bytes(npy(array))
    path = write(
        tmp_path / "a.jsonl",
        {"routed_experts": encoded(array), "task": "law", "prompt_tokens": 2},
        {"routed_experts": array.tolist(), "task": "intent"},
        {"routed_experts": "one.npy", "task": "law"},
    )
    trace = read_vllm([Source(path), Source(tmp_path / "one.npy")], MODEL)
    assert trace.tasks == ("law", "intent", "one")
    parts = batches(trace)
    assert [int(part.task[0]) for part in parts] == [0, 1, 0, 2]
    assert all(np.array_equal(part.experts, experts) for part in parts)
    assert parts[0].phase.tolist() == [PREFILL] * 2 + [DECODE] * 4
    assert parts[1].phase.tolist() == [UNKNOWN] * 6


def test_fortran_order(tmp_path: Path) -> None:
    """An array that NumPy saved column-major is read the same."""
    experts = routing(6)
    path = tmp_path / "f.npy"
    path.write_bytes(npy(np.asfortranarray(with_dense(experts))))
    assert b"'fortran_order': True" in path.read_bytes()
    assert np.array_equal(read_one(path).experts, experts)


def test_labels_and_tasks(tmp_path: Path) -> None:
    """A label replaces a line's task; files of one label make one task; else the stem names it."""
    a = write(tmp_path / "a.jsonl", response(with_dense(routing(4)), task="x"))
    b = write(tmp_path / "b.jsonl", response(with_dense(routing(5))))
    assert read_vllm([Source(a), Source(b)], MODEL).tasks == ("x", "b")
    trace = read_vllm([Source(a, "law"), Source(b, "law")], MODEL)
    assert trace.tasks == ("law",)
    assert trace.tokens.tolist() == [9]
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more" / "b.jsonl", response(with_dense(routing(5))))
    with pytest.raises(InputError, match="two sources"):
        read_vllm([Source(b), Source(other)], MODEL)


def test_choices_are_requests(tmp_path: Path) -> None:
    """Each choice is a request with its prompt; usage counts the tokens of all together."""
    one, two = routing(5, seed=1), routing(7, seed=2)
    line = {
        "choices": [{"routed_experts": encoded(with_dense(e))} for e in (one, two)],
        "usage": {"prompt_tokens": 3, "completion_tokens": 8},
    }
    parts = batches(read_vllm([Source(write(tmp_path / "a.jsonl", line))], MODEL))
    assert [len(part) for part in parts] == [5, 7]
    assert parts[1].phase.tolist() == [PREFILL] * 3 + [DECODE] * 4


def test_responses_without_the_start_of_the_prompt(tmp_path: Path) -> None:
    """With routed_experts_prompt_start the positions are still those of the tokens."""
    experts = routing(10)
    line = response(with_dense(experts), 6)
    line["choices"][0]["routed_experts"] = encoded(with_dense(experts)[4:])
    told: list[str] = []
    trace = read_vllm([Source(write(tmp_path / "a.jsonl", line))], MODEL, notify=told.append)
    (batch,) = batches(trace)
    assert batch.position.tolist() == [4, 5, 6, 7, 8, 9]
    assert batch.phase.tolist() == [PREFILL] * 2 + [DECODE] * 4
    assert np.array_equal(batch.experts, experts[4:])
    assert told == ["1 requests were recorded without the start of the prompt"]


def test_aborted_responses_are_left_out(tmp_path: Path) -> None:
    """A null is no routing: the response is left out, and the user is told."""
    path = write(
        tmp_path / "a.jsonl",
        {"choices": [{"routed_experts": None}]},
        response(with_dense(routing(4))),
    )
    told: list[str] = []
    assert read_vllm([Source(path)], MODEL, notify=told.append).tokens.tolist() == [4]
    assert told == ["left out 1 responses without routed experts (aborted?)"]


@pytest.mark.parametrize("number", [511, 512, 3000])
@pytest.mark.parametrize("row", [[0, 0], [3, 5]])
def test_profiling_rows_are_dropped(tmp_path: Path, number: int, row: list[int]) -> None:
    """512 or more equal rows at the start are start-up profiling, valid selections or not."""
    experts = routing(9)
    array = np.concatenate([np.tile(np.uint8([0, 0] + row * 3), (number, 1)).reshape(-1, 4, 2),
                            with_dense(experts)])  # fmt: skip
    path = write(tmp_path / "a.jsonl", {"routed_experts": encoded(array)})
    told: list[str] = []
    if number < 512 and row == [0, 0]:
        assert "token 0 layer 1: nothing was recorded" in refusal(path)
        return
    trace = read_vllm([Source(path)], MODEL, notify=told.append)
    (batch,) = batches(trace)
    if number < 512:
        assert len(batch) == number + 9
        assert len(told) == 1
        assert told[0].startswith("510 rows in 1 runs repeat the row before them")
        return
    assert np.array_equal(batch.experts, experts)
    assert told == [f"dropped {number:,} identical rows of start-up profiling"]
    assert trace.provenance["profiling_rows_dropped"] == number


def test_profiling_rows_keep_positions(tmp_path: Path) -> None:
    """Where usage says how many tokens there were, the rest keeps its place and its phase."""
    experts = routing(20)
    junk = with_dense(np.tile(experts[:1], (600, 1, 1)))
    line = response(with_dense(experts), 8)
    line["choices"][0]["routed_experts"] = encoded(np.concatenate([junk, with_dense(experts)[1:]]))
    batch = read_one(write(tmp_path / "a.jsonl", line))
    assert batch.position.tolist() == list(range(1, 20))
    assert batch.phase.tolist() == [PREFILL] * 7 + [DECODE] * 12


def broken(values: Any, *place: int) -> npt.NDArray[Any]:
    array = with_dense(routing(4), dtype=np.int32)
    array[place] = values
    return array


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (broken(8, 2, 1, 0), "line 1 choice 0 token 2 layer 1: expert 8; expected ids 0..7 of toy"),
        (broken(-1, 2, 3, 1), "token 2 layer 3: expert -1"),
        (broken([4, 4], 3, 2), "token 3 layer 2: experts [4, 4] name one expert twice"),
        (broken([0, 1], 1, 0), "token 1 layer 0: experts [0, 1]; expected zeros, for toy has"),
        (broken([0, 0], 1, 2), "token 1 layer 2: nothing was recorded"),
        (np.zeros((4, 4, 3), np.uint8), "3 experts a token; expected 2"),
        (np.zeros((4, 2, 2), np.uint8), "2 layers; expected [tokens, 4 or more layers, 2]"),
        (np.zeros((4, 4), np.uint8), "uint8 of shape [4, 4]"),
        (np.full((4, 4, 2), np.nan), "an array of type <f8; expected whole numbers"),
        (np.zeros((4, 4, 2), bool), "an array of type |b1"),
        (np.zeros((4, 4, 2), "U3"), "an array of type <U3"),
        (np.zeros((0, 4, 2), np.uint8), "no token has routed experts"),
    ],
)
def test_arrays_of_another_model_are_refused(tmp_path: Path, array: Any, words: str) -> None:
    """Ids, shapes and dtypes that contradict --model are named by line, token and layer."""
    message = refusal(write(tmp_path / "a.jsonl", response(array)))
    assert words in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (5, "line 1: 5; expected a JSON object"),
        ({}, "neither 'choices' nor 'routed_experts'"),
        ({"meta_info": {}}, "format of their own, sglang"),
        ({"choices": [{"text": "x"}]}, "--enable-return-routed-experts"),
        ({"choices": []}, "no token has routed experts"),
        ({"choices": [1]}, "line 1 choice 0: 1; expected a JSON object"),
        ({"routed_experts": None}, "no token has routed experts"),
        ({"routed_experts": 5}, "'routed_experts': 5; expected base64"),
        ({"routed_experts": "@"}, "'@' is not base64"),
        ({"routed_experts": "é"}, "is not base64"),
        ({"routed_experts": ""}, "not a .npy array"),
        ({"routed_experts": [[1, 2], [3]]}, "no array of whole numbers"),
        ({"routed_experts": [[[0.5]]]}, "no array of whole numbers"),
        ({"routed_experts": [[[10**30]]]}, "no array of whole numbers"),
        ({"routed_experts": "gone.npy"}, "line 1: gone.npy: no such file"),
        ({"routed_experts": "a\0.npy"}, "embedded null"),
        ({"routed_experts": [], "task": 3}, "line 1 'task': 3"),
        ({"routed_experts": None, "prompt_tokens": -1}, "'prompt_tokens': -1"),
        ({"choices": [], "usage": {"prompt_tokens": "3"}}, "'prompt_tokens': '3'"),
        ({"choices": [], "usage": 3}, "line 1 'usage': 3"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, line: Any, words: str) -> None:
    """A line of another form is one line of error that names the line."""
    assert words in refusal(write(tmp_path / "a.jsonl", line))


def test_token_numbers_that_cannot_be(tmp_path: Path) -> None:
    """More rows than tokens, or fewer than the prompt with nothing said of the rest."""
    line = response(with_dense(routing(9)), 4)
    line["usage"]["completion_tokens"] = 2
    assert "9 tokens; expected at most 4 of the prompt and 2 generated" in refusal(
        write(tmp_path / "a.jsonl", line)
    )
    plain = {"routed_experts": encoded(with_dense(routing(3))), "prompt_tokens": 7}
    assert "3 tokens; expected at least the 7 of the prompt" in refusal(
        write(tmp_path / "b.jsonl", plain)
    )


def test_bad_json_names_line_and_column(tmp_path: Path) -> None:
    """A syntax error, NaN, a duplicate key or bad UTF-8 in the second line is placed there."""
    good = json.dumps(response(with_dense(routing(3)))).encode()
    path = tmp_path / "a.jsonl"
    for text, words in [
        (b"{", "line 2 column 2: not JSON"),
        (b'{"routed_experts": NaN}', "line 2: NaN is not JSON"),
        (b'{"a": 1, "a": 2}', "line 2: key 'a' is duplicated"),
        (b'"\xff"', "line 2: byte 1 is not UTF-8"),
        (b"[" * 100_000, "line 2: nested too deeply"),
    ]:
        path.write_bytes(good + b"\n" + text + b"\n")
        assert words in refusal(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """An empty file, a folder and a missing file are refused."""
    assert "no token has routed experts" in refusal(write(tmp_path / "a.jsonl"))
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "gone.jsonl")
    assert "no such file" in refusal(tmp_path / "gone.npy")
    with pytest.raises(InputError, match="no sources"):
        read_vllm([], MODEL)


class Bomb:
    """Makes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_pickles_in_npy_never_run(tmp_path: Path) -> None:
    """An array of objects is refused unopened: the code in it does not run."""
    marker = tmp_path / "ran"
    data = npy(np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    (tmp_path / "a.npy").write_bytes(data)
    assert "an array of type |O; expected whole numbers" in refusal(tmp_path / "a.npy")
    line = {"routed_experts": base64.b64encode(data).decode()}
    assert "an array of type |O" in refusal(write(tmp_path / "b.jsonl", line))
    assert not marker.exists()


def test_npy_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    """No length of a .npy file but the full one is read, and none ends in a traceback."""
    whole = npy(with_dense(routing(5)))
    path = tmp_path / "a.npy"
    for length in [*range(len(whole)), len(whole) + 1]:
        path.write_bytes((whole + b"\0")[:length])
        assert refusal(path)


def test_jsonl_cut_short_anywhere_gives_a_shorter_trace_or_an_error(tmp_path: Path) -> None:
    """Cut at a line's end the file is a shorter one; elsewhere it is refused."""
    path = write(tmp_path / "a.jsonl", *[response(with_dense(routing(3)), 2)] * 2)
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        if length in (first, first + 1):
            assert read_vllm([Source(path)], MODEL).tokens.tolist() == [3]
        else:
            assert refusal(path)


def test_changed_bytes_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Any single byte of a .npy file may be wrong: it is read, or refused."""
    whole = npy(with_dense(routing(3)))
    path = tmp_path / "a.npy"
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged)
        message = ""
        try:
            trace = read_vllm([Source(path)], MODEL)
        except InputError as error:
            message = str(error)
        calls = MODEL.num_layers * MODEL.top_k
        assert message or trace.counts.sum() == trace.tokens.sum() * calls
        assert "\n" not in message


def test_more_rows_missing_than_the_prompt_has(tmp_path: Path) -> None:
    """Only rows of the prompt can be left out: fewer rows than generated tokens are refused."""
    line = response(with_dense(routing(9)), 5)
    line["usage"]["completion_tokens"] = 50
    assert "at least the 49 generated" in refusal(write(tmp_path / "r.jsonl", line))
