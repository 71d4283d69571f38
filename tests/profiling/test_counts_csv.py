"""Tests of the importer of call counts, on tables written here and on the real data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.sources import Source
from prism_plan.sizes.load import load_model_spec
from prism_plan.trace import Trace

TINY = ModelSpec(
    name="tiny",
    moe_layers=(2, 10),
    num_experts=3,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)
LAW = {(2, 0): 5, (2, 1): 5, (2, 2): 10, (10, 0): 0, (10, 1): 10, (10, 2): 10}
CODE = {(2, 0): 3, (2, 1): 2, (2, 2): 1, (10, 0): 2, (10, 1): 2, (10, 2): 2}


def table(*, header: str = "task,layer,expert,count", **tasks: dict[tuple[int, int], int]) -> str:
    lines = [header]
    for task, counts in tasks.items():
        lines += [f"{task},{layer},{e},{count}" for (layer, e), count in counts.items()]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> Source:
    path.write_text(text)
    return Source(path)


# --------------------------------------------------------------------------------- by hand


def test_tiny_table(tmp_path: Path) -> None:
    """A table written by hand gives exactly these counts; tokens are calls by K."""
    told: list[str] = []
    source = write(tmp_path / "c.csv", table(law=LAW, code=CODE))
    trace = read_counts([source], TINY, notify=told.append)
    assert trace.kind == "counts"
    assert trace.tasks == ("law", "code")
    assert trace.counts.tolist() == [[[5, 5, 10], [0, 10, 10]], [[3, 2, 1], [2, 2, 2]]]
    assert trace.tokens.tolist() == [10, 3]
    assert trace.requests is None
    assert trace.batches is None
    assert trace.provenance == {"source": "counts", "files": ["c.csv"]}
    assert told == []


@given(st.permutations(list(LAW)), st.permutations(["task", "layer", "expert", "count", "note"]))
@settings(max_examples=20)
def test_order_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[int, int]], columns: list[str]
) -> None:
    """Rows and columns may stand in any order; rows of zero may be missing; others are ignored."""
    lines = [",".join(columns)]
    for layer, expert in keys:
        cell = {"task": "law", "layer": layer, "expert": expert, "count": LAW[layer, expert],
                "note": '"a, b"'}  # fmt: skip
        if cell["count"]:
            lines.append(",".join(str(cell[column]) for column in columns))
    source = write(tmp_path_factory.mktemp("c") / "c.csv", "\r\n".join(lines))
    assert read_counts([source], TINY).counts.tolist() == [[[5, 5, 10], [0, 10, 10]]]


def test_label(tmp_path: Path) -> None:
    """A label stands for the column of tasks, and replaces it where there is one."""
    lines = ["layer,expert,count", *(f"{layer},{e},{n}" for (layer, e), n in LAW.items())]
    bare, full = tmp_path / "bare.csv", tmp_path / "full.csv"
    bare.write_text("\n".join(lines))
    full.write_text(table(law=LAW))
    for path in (bare, full):
        trace = read_counts([Source(path, "a b")], TINY)
        assert trace.tasks == ("a b",)
        assert trace.counts.tolist() == [[[5, 5, 10], [0, 10, 10]]]
    with pytest.raises(InputError, match="line 1: columns layer, expert, count; expected task"):
        read_counts([Source(bare)], TINY)


def test_several_sources(tmp_path: Path) -> None:
    """Several tables make one trace, tasks in the order of the sources; none may come twice."""
    code, law = (write(tmp_path / f"{name}.csv", table(**{name: counts}))
                 for name, counts in (("code", CODE), ("law", LAW)))  # fmt: skip
    trace = read_counts([code, law, Source(code.path, "again")], TINY)
    assert trace.tasks == ("code", "law", "again")
    assert trace.tokens.tolist() == [3, 10, 3]
    assert trace.counts[1].tolist() == [[5, 5, 10], [0, 10, 10]]
    np.testing.assert_array_equal(trace.counts[0], trace.counts[2])
    assert trace.provenance["files"] == ["code.csv", "law.csv", "code.csv"]
    with pytest.raises(InputError, match="task 'law' was read already"):
        read_counts([law, code, law], TINY)


def test_names_of_sglang(tmp_path: Path) -> None:
    """layer_id and expert_id are read as layer and expert, but not beside them."""
    lines = [f"{layer},{e},{n}" for (layer, e), n in LAW.items()]
    path = tmp_path / "expert_distribution_rank0.csv"
    path.write_text("\n".join(["layer_id,expert_id,count", *lines]))
    trace = read_counts([Source(path, "law")], TINY)
    assert trace.counts.tolist() == [[[5, 5, 10], [0, 10, 10]]]
    with pytest.raises(InputError, match="label it with its task, TASK=SOURCE"):
        read_counts([Source(path)], TINY)
    path.write_text("layer_id,layer,expert_id,count\n2,2,0,5\n")
    with pytest.raises(InputError, match="columns layer_id, layer, expert_id, count; expected"):
        read_counts([Source(path, "law")], TINY)


@given(st.lists(st.integers(0, 6), min_size=6, max_size=18))
@settings(max_examples=20)
def test_tables_of_one_label(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    """Tables of all ranks under one label are added up, also where a rank lacks a layer."""
    folder = tmp_path_factory.mktemp("c")
    pairs = list(LAW)
    total = np.zeros((2, 3), np.int64)
    sources = [write(folder / "law.csv", table(law=LAW))]
    for (layer, expert), count in LAW.items():
        total[TINY.moe_layers.index(layer), expert] += count
    for rank in range(len(counts) // 6):
        rows = dict(zip(pairs, counts[6 * rank : 6 * rank + 6], strict=True))
        for (layer, expert), count in rows.items():
            total[TINY.moe_layers.index(layer), expert] += count
        text = table(header="x,layer_id,expert_id,count", law=rows)
        sources.append(write(folder / f"rank{rank}.csv", text))
    labelled = [Source(s.path, "chat") for s in sources]
    trace = read_counts(labelled, TINY, tokens={"chat": 200})
    assert trace.tasks == ("chat",)
    assert trace.counts[0].tolist() == total.tolist()
    assert trace.provenance["files"] == [s.path.name for s in sources]


def test_tables_that_are_not_added(tmp_path: Path) -> None:
    """A table twice, or labelled as the task of another one, is refused; equal ones are told."""
    law, copy = (write(tmp_path / f"{name}.csv", table(law=LAW)) for name in ("law", "copy"))
    for sources, words in (
        ([Source(law.path, "a"), Source(law.path, "a")], "given twice for task 'a'"),
        ([law, Source(copy.path, "law")], "task 'law' was read already"),
        ([Source(copy.path, "law"), law], "task 'law' was read already"),
        ([law, copy], "sources that are to be added up with one task"),
    ):
        with pytest.raises(InputError, match=words):
            read_counts(sources, TINY)
    told: list[str] = []
    same = [Source(law.path, "a"), Source(copy.path, "a")]
    assert read_counts(same, TINY, notify=told.append).tokens.tolist() == [20]
    assert told == [
        f"task 'a': {copy.path} has the same counts as {law.path}; they were added, which leaves "
        "calls per token as they are"
    ]
    huge = dict.fromkeys(LAW, 2**52)
    many = [write(tmp_path / f"{i}.csv", table(law=huge)) for i in range(1100)]
    with pytest.raises(InputError, match="a sum too large to count"):
        read_counts([Source(source.path, "a") for source in many], TINY)


def test_layers_that_disagree(tmp_path: Path) -> None:
    """Where layers disagree the fullest decides, rounded up, and the user is told."""
    told: list[str] = []
    odd = {**LAW, (2, 2): 9}
    trace = read_counts(
        [write(tmp_path / "c.csv", table(odd=odd, code=CODE))], TINY, notify=told.append
    )
    assert trace.tokens.tolist() == [10, 3]
    assert len(told) == 1
    assert "task 'odd'" in told[0]
    assert "19 to 20 calls" in told[0]
    both_odd = {**LAW, (2, 2): 11, (10, 2): 11}
    trace = read_counts([write(tmp_path / "c.csv", table(odd=both_odd))], TINY, notify=told.append)
    assert trace.tokens.tolist() == [11]  # 21 calls, two a token
    assert len(told) == 2


def test_tokens_given(tmp_path: Path) -> None:
    """A number that is given is taken as it is, for its task alone, and nothing is told."""
    told: list[str] = []
    odd = {**LAW, (2, 2): 9}
    source = write(tmp_path / "c.csv", table(odd=odd, code=CODE))
    trace = read_counts([source], TINY, tokens={"odd": 11}, notify=told.append)
    assert trace.tokens.tolist() == [11, 3]
    assert told == []
    np.testing.assert_allclose(trace.calls_per_token()[0].sum(axis=1), [19 / 11, 20 / 11])


@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        ({"lew": 10}, LAW, "tokens: unknown task 'lew'"),
        ({"law": 9}, LAW, "task 'law': 10 calls of one expert in a layer, 9 tokens"),
        ({"law": -10}, LAW, "task 'law': 10 calls of one expert in a layer, -10 tokens"),
        # no expert has more than 8 calls, yet 8 tokens of two experts make 16 calls and not 20
        ({"law": 8}, {(la, e): 8 - (e == 2) * 4 for la in (2, 10) for e in range(3)}, "'law'"),
        # no calls at all in layer 10
        ({"law": 10}, {key: count for key, count in LAW.items() if key[0] == 2}, "layer 10"),
    ],
    ids=["unknown-task", "too-few", "negative", "more-than-k-a-token", "no-calls-in-a-layer"],
)
def test_tokens_that_cannot_be(
    tmp_path: Path, tokens: dict[str, int], counts: dict[tuple[int, int], int], message: str
) -> None:
    """A given number of tokens that the calls contradict is refused: a token makes K a layer."""
    source = write(tmp_path / "c.csv", table(law=counts))
    with pytest.raises(InputError) as caught:
        read_counts([source], TINY, tokens=tokens)
    assert message in str(caught.value)


def test_layer_without_calls(tmp_path: Path) -> None:
    """A task without calls in some layer is refused: the recording or the model is another."""
    source = write(tmp_path / "c.csv", "task,layer,expert,count\nlaw,2,0,5\nlaw,2,1,5\n")
    with pytest.raises(InputError, match="task 'law' has no calls in layer 10"):
        read_counts([source], TINY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("law,3,0,1", "line 3 (task 'law'): layer 3; expected a MoE layer of tiny, 2, 10"),
        ("law,2,3,1", "line 3 (task 'law'): expert 3; expected ids 0..2 of tiny"),
        ("law,2,-1,1", "line 3 column 'expert': '-1'"),
        ("law,2,1,-1", "line 3 column 'count': '-1'"),
        ("law,2,1,1.0", "line 3 column 'count': '1.0'"),
        ("law,2,1,nan", "line 3 column 'count': 'nan'"),
        ("law,2,1,", "line 3 column 'count': ''"),
        ("law,2,1,9007199254740992", "line 3 column 'count'"),
        ("law,2,0,7", "line 3 (task 'law'): second row for layer, expert [2 0]"),
        ("law,2,1", "line 3: 3 values; expected 4"),
        ("law,2,1,1,1", "line 3: 5 values; expected 4"),
        (",2,1,1", "line 3: empty task"),
        ('law,2,1,"1', "not CSV"),
    ],
)
def test_wrong_lines(tmp_path: Path, line: str, message: str) -> None:
    """A wrong line is told by its number, value and what was expected."""
    source = write(tmp_path / "c.csv", f"task,layer,expert,count\nlaw,2,0,5\n{line}\nlaw,2,2,5\n")
    with pytest.raises(InputError) as caught:
        read_counts([source], TINY)
    assert str(caught.value).startswith(str(source.path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "layer, expert, count\n2, 0, 5\n2, 1, 5\n10, 0, 5\n10, 2, 5\n",
        " count ,layer,\texpert\n 5 ,2,\t0\n5, 2 , 1\n5,10,0 \n5 ,10 ,2\n",
        '"layer", "expert", "count"\n"2", "0", "5"\n2,"1 ", 5\n10,0,5\n10,2,"5"\n',
        "\n  \nlayer,expert,count\n\n2,0,5\n2,1,5\n   \n10,0,5\n10,2,5\n\n",
        "\ufefflayer,expert,count\r\n2,0,5\r\n2,1,5\r\n10,0,5\r\n10,2,5\r\n",
    ],
)
def test_spaces_and_blank_lines(tmp_path: Path, text: str) -> None:
    """Spaces around names and values, quotes, blank lines and a mark change nothing."""
    source = Source(tmp_path / "c.csv", "law")
    source.path.write_bytes(text.encode())
    assert read_counts([source], TINY).counts.tolist() == [[[5, 5, 0], [5, 0, 5]]]


def test_spaces_around_tasks(tmp_path: Path) -> None:
    """A task is the same with spaces around its name, those within it are its own."""
    text = "layer, expert, count, task\n2, 0, 5, a b\n2, 1, 5,a b\n10, 0, 5, a b \n10, 2, 5, a b\n"
    trace = read_counts([write(tmp_path / "c.csv", text)], TINY)
    assert trace.tasks == ("a b",)
    assert trace.counts.tolist() == [[[5, 5, 0], [5, 0, 5]]]


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("task,layer\u200b,expert,count", "task, 'layer\\u200b', expert, count"),
        ("task,l\u0430yer,expert,count", "task, 'l\\u0430yer', expert, count"),
        ("task,layer, layer,expert,count", "task, layer, layer, expert, count"),
    ],
)
def test_names_that_look_alike(tmp_path: Path, header: str, shown: str) -> None:
    """What differs from the expected columns can be seen in the message."""
    with pytest.raises(InputError) as caught:
        read_counts([write(tmp_path / "c.csv", f"{header}\na,2,0,5\n")], TINY)
    assert f"line 1: columns {shown}; expected task, layer, expert, count, each once" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns (none)"),
        ("task,layer,expert,count\n", "no rows in it"),
        ("task,layer,layer,expert,count\n", "columns task, layer, layer, expert, count"),
        ("task;layer;expert;count\n", "columns task;layer;expert;count"),
    ],
)
def test_no_table(tmp_path: Path, text: str, message: str) -> None:
    """A file without the columns, or without rows, is no table."""
    with pytest.raises(InputError) as caught:
        read_counts([write(tmp_path / "c.csv", text)], TINY)
    assert message in str(caught.value)


# --------------------------------------------------------------------------------- the real data


def check_against_pandas(trace: Trace, path: Path) -> None:
    """Every count of the file is in the trace, and nothing else."""
    rows = pd.read_csv(path)
    assert trace.tasks == tuple(rows["task"].unique())
    layers = {layer: position for position, layer in enumerate(trace.model.moe_layers)}
    expected = np.zeros_like(trace.counts)
    for task, layer, expert, count in rows.itertuples(index=False):
        expected[trace.tasks.index(task), layers[layer], expert] += count
    np.testing.assert_array_equal(trace.counts, expected)


def usage_entropy(trace: Trace) -> np.ndarray:
    """Mean entropy of expert usage of each task, in bits."""
    shares = trace.counts / trace.counts.sum(axis=2, keepdims=True)
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=2).mean(axis=1)


@pytest.mark.traces
def test_mixtral(mixtral_trace: Trace, traces_dir: Path) -> None:
    """Mixtral's seven subjects: tokens are half the calls of any layer, 1,920 to 56,322."""
    path = traces_dir / "mixtral-8x7b-mmlu" / "counts.csv"
    check_against_pandas(mixtral_trace, path)
    calls = pd.read_csv(path).groupby(["task", "layer"])["count"].sum().unstack()
    assert calls.shape == (7, 32)
    for task, tokens in zip(mixtral_trace.tasks, mixtral_trace.tokens.tolist(), strict=True):
        assert (calls.loc[task] == 2 * tokens).all()
    assert (mixtral_trace.tokens.min(), mixtral_trace.tokens.max()) == (1_920, 56_322)
    entropy = usage_entropy(mixtral_trace)
    assert (entropy > 2.935).all()
    assert (entropy < 2.985).all()


@pytest.mark.traces
def test_mixtral_needs_no_notice(traces_dir: Path) -> None:
    """Exact counts are taken without a word, and survive a file."""
    told: list[str] = []
    source = Source(traces_dir / "mixtral-8x7b-mmlu" / "counts.csv")
    read_counts([source], PRESETS["mixtral-8x7b"], notify=told.append)
    assert told == []


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """gpt-oss-20b from a model spec file: 24 layers, 32 experts, top-4."""
    path = tmp_path_factory.mktemp("model") / "gpt-oss-20b.json"
    spec = {
        "name": "gpt-oss-20b",
        "moe_layers": list(range(24)),
        "num_experts": 32,
        "top_k": 4,
        "hidden_size": 2880,
        "dtype_bytes": 2,
        "expert_bytes": 13_236_480,
        "dense_bytes": 3_000_000_000,
        "kv_bytes_per_token": 49_152,
    }
    path.write_text(json.dumps(spec))
    return load_model_spec(str(path))


@pytest.mark.traces
def test_gpt_oss(traces_dir: Path, gpt_oss: ModelSpec, tmp_path: Path) -> None:
    """Counts rebuilt from mean frequencies: layers disagree, and each task is told of."""
    path = traces_dir / "gpt-oss-20b-mmlu-pro" / "counts.csv"
    told: list[str] = []
    trace = read_counts([Source(path)], gpt_oss, notify=told.append)
    check_against_pandas(trace, path)
    assert len(trace.tasks) == 14
    for task, message in zip(trace.tasks, told, strict=True):
        assert f"task '{task}'" in message
        assert f"tokens of {task!r}" in message
    fullest = trace.counts.sum(axis=2).max(axis=1)
    np.testing.assert_array_equal(trace.tokens, -(-fullest // 4))
    assert trace.calls_per_token().sum(axis=2).max() <= 4
    entropy = usage_entropy(trace)
    assert (entropy > 3.95).all()
    assert (entropy < 4.65).all()
    write_trace(tmp_path / "t.parquet", trace)
    again = read_trace(tmp_path / "t.parquet")
    assert again.tasks == trace.tasks
    np.testing.assert_array_equal(again.counts, trace.counts)
    np.testing.assert_array_equal(again.tokens, trace.tokens)


@pytest.mark.traces
def test_gpt_oss_with_its_tokens(traces_dir: Path, gpt_oss: ModelSpec) -> None:
    """Its true tokens, of which a layer has 3.95 to 3.97 calls each, are taken when given."""
    path = traces_dir / "gpt-oss-20b-mmlu-pro" / "counts.csv"
    calls = pd.read_csv(path).groupby(["task", "layer"])["count"].sum().groupby("task").mean()
    tokens = {task: round(value / 3.96) for task, value in calls.items()}
    told: list[str] = []
    trace = read_counts([Source(path)], gpt_oss, tokens=tokens, notify=told.append)
    assert told == []
    assert dict(zip(trace.tasks, trace.tokens.tolist(), strict=True)) == tokens
    sums = trace.calls_per_token().sum(axis=2)
    assert (sums > 3.95).all()
    assert (sums < 3.97).all()
