"""Tests of the importer of ESFT folders, on a folder written here and on the real data."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prism_plan.errors import InputError
from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.profiling.esft import read_esft
from prism_plan.profiling.sources import Source, parse_source
from prism_plan.trace import PHASES, TokenBatch, Trace

TINY = ModelSpec(
    name="tiny",
    moe_layers=(2, 10),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)

# Per layer and request: the ids of its tokens, two a token, and as many gate weights.
LAW = {
    2: ["0\t1\t2\t3\t\t0.5\t0.25\t0.125\t0.75", "3\t0\t\t1.0\t0.0"],
    10: ["1\t0\t3\t1\t\t0.1\t0.2\t0.3\t0.4", "2\t1\t\t1e-3\t0.333333"],
}
CODE = {2: ["1\t2\t\t0.5\t0.5"], 10: ["0\t3\t\t0.25\t0.5"]}


def write_folder(folder: Path, layers: dict[int, list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for layer, lines in layers.items():
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"expert_weights_{layer}.txt").write_text(text)
    return folder


def rows(trace: Trace) -> TokenBatch:
    """All tokens in one batch."""
    assert trace.batches is not None
    parts = list(trace.batches())
    columns = ("request", "position", "phase", "task", "experts")
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in columns]
    gates = [part.weights for part in parts if part.weights is not None]
    return TokenBatch(*joined, np.concatenate(gates) if gates else None)


# --------------------------------------------------------------------------------- by hand


def test_tiny_folder(tmp_path: Path) -> None:
    """A folder written by hand gives exactly these rows, layer 2 before layer 10."""
    write_folder(tmp_path / "law", LAW)
    write_folder(tmp_path / "code", CODE)
    (tmp_path / "law" / "README.md").write_text("not a layer")
    trace = read_esft([Source(tmp_path / "law"), Source(tmp_path / "code")], TINY)
    batch = rows(trace)
    assert trace.tasks == ("law", "code")
    assert batch.request.tolist() == [0, 0, 1, 2]
    assert batch.position.tolist() == [0, 1, 0, 0]
    assert batch.task.tolist() == [0, 0, 0, 1]
    assert {PHASES[code] for code in batch.phase} == {"unknown"}
    assert batch.experts.tolist() == [
        [[0, 1], [1, 0]],
        [[2, 3], [3, 1]],
        [[3, 0], [2, 1]],
        [[1, 2], [0, 3]],
    ]
    gates = [
        [[0.5, 0.25], [0.1, 0.2]],
        [[0.125, 0.75], [0.3, 0.4]],
        [[1.0, 0.0], [1e-3, 0.333333]],
        [[0.5, 0.5], [0.25, 0.5]],
    ]
    assert batch.weights is not None
    assert batch.weights.dtype == np.float16
    np.testing.assert_array_equal(batch.weights, np.array(gates, np.float16))
    assert trace.counts.tolist() == [
        [[2, 1, 1, 2], [1, 3, 1, 1]],
        [[0, 1, 1, 0], [1, 0, 0, 1]],
    ]
    assert trace.tokens.tolist() == [3, 1]
    assert trace.requests is not None
    assert trace.requests.tolist() == [2, 1]
    assert trace.has_weights
    assert trace.provenance["source"] == "esft"
    assert trace.provenance["folders"] == {"law": "law", "code": "code"}


def test_without_weights(tmp_path: Path) -> None:
    """Without weights the selections are the same."""
    source = Source(write_folder(tmp_path / "law", LAW))
    bare, full = (read_esft([source], TINY, weights=weights) for weights in (False, True))
    assert not bare.has_weights
    assert rows(bare).weights is None
    np.testing.assert_array_equal(rows(bare).experts, rows(full).experts)


def test_layers_are_in_numeric_order(tmp_path: Path) -> None:
    """Positions follow decoder indices as numbers (1, 2, ..., 12), not as words (1, 10, 11, 2)."""
    layers = tuple(range(1, 13))
    model = ModelSpec(
        name="deep", moe_layers=layers, num_experts=16, top_k=1, hidden_size=8, dtype_bytes=2,
        expert_bytes=100, dense_bytes=0, kv_bytes_per_token=0,
    )  # fmt: skip
    folder = write_folder(tmp_path / "a", {layer: [f"{layer}\t\t1.0"] for layer in layers})
    experts = rows(read_esft([Source(folder)], model)).experts
    assert experts[0, :, 0].tolist() == list(layers)


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label names the task; without one the folder does, also where it is given as ``.``."""
    write_folder(tmp_path / "law", LAW)
    write_folder(tmp_path / "x=y", CODE)
    sources = [parse_source(f"{tmp_path}/law"), parse_source(f"coding={tmp_path}/x=y")]
    trace = read_esft(sources, TINY)
    assert trace.tasks == ("law", "coding")
    assert trace.provenance["folders"] == {"law": "law", "coding": "x=y"}
    assert parse_source(f"{tmp_path}/x=y") == Source(tmp_path / "x=y")
    monkeypatch.chdir(tmp_path / "law")
    assert read_esft([parse_source(".")], TINY).tasks == ("law",)


def test_one_folder_twice(tmp_path: Path) -> None:
    """One folder may serve two labels; two sources of one task are refused."""
    folder = write_folder(tmp_path / "law", LAW)
    trace = read_esft([Source(folder, "a"), Source(folder, "b")], TINY)
    assert trace.tokens.tolist() == [3, 3]
    assert rows(trace).request.tolist() == [0, 0, 1, 2, 2, 3]
    with pytest.raises(InputError, match="task 'law' comes from two sources"):
        read_esft([Source(folder), Source(folder)], TINY)


@pytest.mark.parametrize("text", ["nowhere", "a=nowhere", "={here}", " ={here}"])
def test_wrong_sources(tmp_path: Path, text: str) -> None:
    """A source that does not exist, or an empty label, is refused."""
    with pytest.raises(InputError, match=r"(no such file or folder|empty task)"):
        parse_source(text.format(here=tmp_path))


def test_progress(tmp_path: Path) -> None:
    """Progress counts the files read over all sources."""
    write_folder(tmp_path / "law", LAW)
    write_folder(tmp_path / "code", CODE)
    told: list[tuple[str, int]] = []
    sources = [Source(tmp_path / "law"), Source(tmp_path / "code")]
    read_esft(sources, TINY, progress=lambda label, done: told.append((label, done)))
    assert told == [("law", 1), ("law", 2), ("code", 3), ("code", 4)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({2: ["0\t1\t\t0.5\t0.5"]}, "law: expert_weights_10.txt is missing"),
        ({**LAW, 3: LAW[2]}, "expert_weights_3.txt: layer 3; expected a MoE layer of tiny, 2, 10"),
        ({**LAW, 10: LAW[10][:1]}, "expert_weights_10.txt: 1 requests; expected 2"),
        ({**LAW, 10: LAW[10][::-1]}, "expert_weights_10.txt: line 1: 1 tokens; expected 2"),
        ({2: [], 10: []}, "law: no requests in it"),
        ({**LAW, 10: [LAW[10][0], "2\t1"]}, "expert_weights_10.txt: line 2: no two tabs"),
        ({**LAW, 10: [LAW[10][0], "2\t1\t3\t\t1\t1\t1"]}, "line 2: 3 ids and 3 weights"),
        ({**LAW, 10: [LAW[10][0], "2\t1\t\t1"]}, "line 2: 2 ids and 1 weights"),
        ({**LAW, 10: [LAW[10][0], "2\tx\t\t1\t1"]}, "expert_weights_10.txt: line 2: "),
        ({**LAW, 10: [LAW[10][0], "2\t4\t\t1\t1"]}, "line 2 token 1: expert 4; expected ids 0..3"),
        ({**LAW, 10: [LAW[10][0], "2\t-1\t\t1\t1"]}, "line 2 token 1: expert -1"),
        ({**LAW, 2: [LAW[2][0], "3\t3\t\t1\t1"]}, "expert_weights_2.txt: line 2 token 1: experts"),
        ({**LAW, 10: [LAW[10][0], "2\t1\t\tnan\t1"]}, "line 2: a gate weight is negative, NaN"),
        ({**LAW, 10: [LAW[10][0], "2\t1\t\t-1\t1"]}, "line 2: a gate weight is negative, NaN"),
        ({**LAW, 10: [LAW[10][0], "2\t1\t\t1e5\t1"]}, "line 2: a gate weight is negative, NaN"),
    ],
)
def test_wrong_folders(tmp_path: Path, layers: dict[int, list[str]], message: str) -> None:
    """What is wrong with a folder is told by file and line."""
    folder = write_folder(tmp_path / "law", layers)
    with pytest.raises(InputError) as caught:
        read_esft([Source(folder)], TINY)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_no_folder(tmp_path: Path) -> None:
    """A file, and a folder without layers, are no recordings."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        read_esft([Source(tmp_path / "file")], TINY)
    with pytest.raises(InputError, match=r"no expert_weights_\*\.txt in it"):
        read_esft([Source(tmp_path)], TINY)


def test_two_files_of_one_layer(tmp_path: Path) -> None:
    """Two files for one layer are refused: which of them was meant cannot be known."""
    folder = write_folder(tmp_path / "law", LAW)
    (folder / "expert_weights_02.txt").write_text("2\t3\t0\t1\t\t1\t1\t1\t1\n1\t2\t\t1\t1\n")
    with pytest.raises(InputError, match="not the name of a layer"):
        read_esft([Source(folder)], TINY)


def test_packed_files(tmp_path: Path) -> None:
    """Files compressed with gzip are read as they were; a layer in both forms is refused."""
    wanted = rows(read_esft([Source(write_folder(tmp_path / "law", LAW))], TINY))
    folder = write_folder(tmp_path / "packed", LAW)
    plain = folder / "expert_weights_2.txt"
    (folder / "expert_weights_2.txt.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(InputError, match=r"expert_weights_2\.txt\.gz: its layer was read already"):
        read_esft([Source(folder)], TINY)
    plain.unlink()
    found = rows(read_esft([Source(folder)], TINY))
    assert found.experts.tolist() == wanted.experts.tolist()
    assert found.weights is not None
    assert wanted.weights is not None
    assert found.weights.tolist() == wanted.weights.tolist()


@pytest.mark.parametrize(
    "line", ["", "0\t1\t\t0.5", "0\t9\t\t0.5\t0.5", "1\t1\t\t0.5\t0.5", "0\t1\t2\t3\t\t1\t1\t1\t1"]
)
def test_skipping_bad_requests(tmp_path: Path, line: str) -> None:
    """A request with a bad line in one layer is left out of all, and told with the file."""
    folder = write_folder(
        tmp_path / "law", {2: [*LAW[2], LAW[2][1]], 10: [LAW[10][0], line, LAW[10][1]]}
    )
    told: list[str] = []
    trace = read_esft([Source(folder)], TINY, skip_bad=True, notify=told.append)
    assert (
        rows(trace).experts.tolist()
        == rows(
            read_esft([Source(write_folder(tmp_path / "good" / "law", LAW))], TINY)
        ).experts.tolist()
    )
    assert rows(trace).request.tolist() == [0, 0, 1]
    assert trace.provenance["bad_rows_left_out"] == 1
    assert f"{folder}: left out bad rows: 1 of 3 (expert_weights_10.txt line 2" in told[0]
    write_folder(folder, {2: [LAW[2][1]], 10: [line]})
    with pytest.raises(
        InputError, match=r"weights_10\.txt: line 1.*no row is good \(1 bad\), the first"
    ):
        read_esft([Source(folder)], TINY, skip_bad=True)


# --------------------------------------------------------------------------------- the real data

REQUESTS = {"intent": 64, "law": 17, "summary": 7, "translation": 20}


@pytest.fixture(scope="module")
def parsed(traces_dir: Path) -> dict[tuple[str, int], list[list[int]]]:
    """Expert ids by (task, decoder layer): a list for each request. Parsed on its own."""
    scores = traces_dir / "deepseek-v2-lite-esft" / "expert_scores"
    found = {}
    for task in REQUESTS:
        for layer in range(1, 27):
            with open(scores / task / f"expert_weights_{layer}.txt") as lines:
                ids = [line.split("\t\t")[0].split("\t") for line in lines]
            found[task, layer] = [[int(word) for word in request] for request in ids]
    return found


@pytest.mark.traces
def test_real_size(v2_trace: Trace) -> None:
    """The real data are 64 + 17 + 7 + 20 requests and 16,810 tokens."""
    assert v2_trace.model == PRESETS["deepseek-v2-lite"]
    assert v2_trace.requests is not None
    assert dict(zip(v2_trace.tasks, v2_trace.requests.tolist(), strict=True)) == REQUESTS
    assert v2_trace.tokens.sum() == 16_810
    assert len(rows(v2_trace)) == 16_810


@pytest.mark.traces
def test_real_counts(v2_trace: Trace, parsed: dict[tuple[str, int], list[list[int]]]) -> None:
    """Tokens of each task, and calls of every expert, equal those of an independent parse."""
    for t, task in enumerate(v2_trace.tasks):
        for position, layer in enumerate(range(1, 27)):
            ids = [e for request in parsed[task, layer] for e in request]
            assert v2_trace.tokens[t] * 6 == len(ids)
            calls = Counter(ids)
            expected = [calls[e] for e in range(64)]
            assert v2_trace.counts[t, position].tolist() == expected


@pytest.mark.traces
def test_real_selections(v2_trace: Trace, parsed: dict[tuple[str, int], list[list[int]]]) -> None:
    """Every token of every request names the experts of its line, in each layer."""
    batch = rows(v2_trace)
    number = 0
    for task, requests in REQUESTS.items():
        for index in range(requests):
            here = batch.request == number
            assert (batch.position[here] == np.arange(here.sum())).all()
            assert {v2_trace.tasks[code] for code in batch.task[here]} == {task}
            for position, layer in enumerate(range(1, 27)):
                found = batch.experts[here, position].ravel().tolist()
                assert found == parsed[task, layer][index]
            number += 1


@pytest.mark.traces
def test_real_gates(v2_trace: Trace) -> None:
    """Gate weights are raw softmax values: they sum to about 0.35 a token, never above one."""
    gates = rows(v2_trace).weights
    assert gates is not None
    sums = gates.astype(np.float64).sum(axis=2)
    assert sums.mean() == pytest.approx(0.35, abs=0.03)
    assert sums.max() <= 1.001  # float16 rounds


@pytest.mark.traces
def test_real_usage(v2_trace: Trace) -> None:
    """Mean entropy of expert usage is 5.3 to 5.8 of 6 bits, as the data's description says."""
    shares = v2_trace.counts / v2_trace.counts.sum(axis=2, keepdims=True)
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = -(shares * logs).sum(axis=2).mean(axis=1)
    assert (entropy > 5.25).all()
    assert (entropy < 5.85).all()
