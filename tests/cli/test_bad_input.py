"""What a user can get wrong: one line on standard error, a fitting exit code, and no damage.

Wide tables of broken files are read in-process; one of each class goes through the command.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_plan.check.report import check_file
from prism_plan.errors import Infeasible, PrismError
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.placement import read_placement, write_placement
from prism_plan.io.text_files import sha256
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import InputFile
from prism_plan.profiling.counts_csv import read_counts
from prism_plan.profiling.esft import read_esft
from prism_plan.profiling.sources import Source
from prism_plan.sizes.load import load_model_spec
from prism_plan.solvers import Options, solve
from prism_plan.trace import TokenBatch, Trace, trace_from_batches
from tests.limits import HANG_S
from tests.warm_processes import run_warm

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and modes of POSIX")

COMMAND = (sys.executable, "-m", "prism_plan")
#: A message longer than this is no longer one line to a reader.
LONGEST = 400
OLD = b"an earlier result\n"

SPEC = {
    "name": "tiny",
    "moe_layers": [1, 2, 3],
    "num_experts": 4,
    "top_k": 2,
    "hidden_size": 8,
    "dtype_bytes": 2,
    "expert_bytes": 1_000_000,
    "dense_bytes": 5_000_000,
    "kv_bytes_per_token": 100,
}
COUNTS = "task,layer,expert,count\n" + "".join(
    f"{task},{layer},{expert},{calls[(expert + layer) % 4]}\n"
    for task, calls in (("a", (10, 6, 3, 1)), ("b", (2, 4, 6, 8)))
    for layer in (1, 2, 3)
    for expert in range(4)
)
CLUSTER = """\
name = "two"
[link]
bandwidth_mbps = 500
[[server]]
name = "s0"
weight = 1.0
tasks = { a = 1.0 }
[[server.gpu]]
slots = 7
[[server]]
name = "s1"
weight = 1.0
tasks = { b = 1.0 }
[[server.gpu]]
slots = 8
"""
#: One ESFT layer file: a request of two tokens, then one of one token.
ESFT_LAYER = "0\t1\t2\t3\t\t.5\t.5\t.25\t.25\n1\t2\t\t.5\t.5\n"


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files; tests copy it and spoil the copy."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "spec.json").write_text(json.dumps(SPEC))
    (folder / "counts.csv").write_text(COUNTS)
    (folder / "c.toml").write_text(CLUSTER)
    spec = load_model_spec(str(folder / "spec.json"))
    write_trace(folder / "t.parquet", read_counts([Source(folder / "counts.csv")], spec))
    write_trace(folder / "tokens.parquet", _token_trace(spec))
    instance = Instance.build(read_trace(folder / "t.parquet"), parse_cluster(CLUSTER))
    inputs = {"trace": InputFile("t.parquet", sha256(folder / "t.parquet"))}
    write_placement(folder / "p.json", solve(instance, inputs=inputs))
    _esft_folder(folder / "esft")
    return folder


@pytest.fixture
def work(material: Path, tmp_path: Path) -> Path:
    """A fresh copy of the good files, and the folder that commands run in."""
    folder = tmp_path / "work"
    shutil.copytree(material, folder)
    return folder


def _token_trace(spec: ModelSpec, requests: int = 6, tokens: int = 10) -> Trace:
    rng = np.random.default_rng(0)
    rows = requests * tokens
    shape = (rows, spec.num_layers, spec.num_experts)
    experts = np.argsort(rng.random(shape), axis=2)[:, :, : spec.top_k].astype(np.uint16)
    request = np.repeat(np.arange(requests, dtype=np.int32), tokens)
    batch = TokenBatch(
        request=request,
        position=np.tile(np.arange(tokens, dtype=np.int32), requests),
        phase=np.full(rows, 2, np.int8),
        task=(request % 2).astype(np.int32),
        experts=experts,
        weights=rng.random(experts.shape).astype(np.float16),
    )
    return trace_from_batches(spec, ["a", "b"], [batch])


def _esft_folder(folder: Path, layer: str = ESFT_LAYER) -> None:
    folder.mkdir()
    for number in SPEC["moe_layers"]:  # type: ignore[attr-defined]
        (folder / f"expert_weights_{number}.txt").write_text(layer)


def run(
    folder: Path, *args: str | bytes, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command in ``folder``."""
    if not prefix and not options and all(isinstance(arg, str) for arg in args):
        return run_warm([str(arg) for arg in args], cwd=folder, timeout_s=HANG_S)
    return subprocess.run(
        [*prefix, *COMMAND, *args],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=HANG_S,
        check=False,
        **options,
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, one line on standard error with the words in it, nothing else anywhere."""
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == code, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("prism-plan: ")
    assert len(result.stderr) <= LONGEST
    for word in words:
        assert word in result.stderr
    assert not result.stdout


def assert_refused(call: Callable[[], object], *words: str) -> PrismError:
    """The call raises one of our errors, with the words in its one line."""
    with pytest.raises(PrismError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) <= LONGEST, message
    for word in words:
        assert word in message
    return caught.value


def attempt(call: Callable[[], Any], *words: str) -> tuple[Any, bool]:
    """What the call gives and True, or None and False after a refusal with the words in it."""
    try:
        return call(), True
    except PrismError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) <= LONGEST, message
    for word in words:
        assert word in message
    return None, False


@contextlib.contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """No file of the folder, hidden ones included, appears, goes or changes in the block."""

    def state() -> dict[str, bytes]:
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    before = state()
    yield
    after = state()
    assert sorted(after) == sorted(before)
    assert after == before


SOLVE = ("solve", "t.parquet", "--cluster", "c.toml")


# ---------------------------------------------------------------------------------------- options


OPTION_MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no trace": (("-o", "o.json"), "Missing argument"),
    "no output": (SOLVE[1:], "'--output'"),
    "unknown solver": ((*SOLVE[1:], "--solver", "exakt", "-o", "o.json"), "did you mean 'exact'"),
    "negative seed": ((*SOLVE[1:], "--seed", "-1", "-o", "o.json"), "--seed"),
    "no replicas": ((*SOLVE[1:], "--min-replicas", "0", "-o", "o.json"), "--min-replicas"),
    "NaN time limit": ((*SOLVE[1:], "--time-limit", "nan", "-o", "o.json"), "--time-limit"),
    "price alone": ((*SOLVE[1:], "--load-price", "1", "-o", "o.json"), "--from"),
}


@pytest.mark.parametrize("what", OPTION_MISTAKES)
def test_option_mistake(work: Path, what: str) -> None:
    """A wrong option is named on one line, and nothing is written."""
    args, word = OPTION_MISTAKES[what]
    with nothing_changes(work):
        assert_one_line_error(run(work, "solve", *args), 2, word)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"time_limit_s": 0.0},
        {"time_limit_s": -1.0},
        {"time_limit_s": float("nan")},
        {"time_limit_s": float("inf")},
        {"backend": "gurobi"},
        {"load_price": -1.0},
        {"load_price": float("nan")},
        {"load_price": float("inf")},
        {"load_price": 1.0},
    ],
    ids=str,
)
def test_options_out_of_range(values: dict[str, Any]) -> None:
    """Solver options out of range are refused where they are made."""
    assert_refused(lambda: Options(**values), f"{next(iter(values))}: ")


def test_more_replicas_than_servers(work: Path) -> None:
    """More replicas than servers are infeasible: the constraint and the shortfall are named."""
    result = run(work, *SOLVE, "--min-replicas", "9", "-o", "o.json")
    assert_one_line_error(result, 3, "min_replicas 9 on 2 servers", "short by 7 servers")


def test_time_limit_without_placement(work: Path) -> None:
    """A limit that ends the search before any placement is exit code 4."""
    result = run(work, *SOLVE, "--solver", "ilp", "--time-limit", "1e-300", "-o", "o.json")
    assert_one_line_error(result, 4, "--time-limit")
    assert not (work / "o.json").exists()


def test_solver_without_rule(work: Path) -> None:
    """A solver that does not support what is asked names those that have."""
    result = run(work, *SOLVE, "--solver", "prism", "--min-replicas", "2", "-o", "o.json")
    assert_one_line_error(result, 2, "'prism'", "exact")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("check", "t.parquet", "--cluster", "t.parquet"), ("t.parquet: is a Parquet file",)),
        (("solve", "t.parquet", "--cluster", "p.json", "-o", "o"), ("p.json: is a JSON file",)),
        (("diff", "p.json", "t.parquet"), ("t.parquet: is a Parquet file",)),
        (("diff", "c.toml", "p.json"), ("c.toml: looks like TOML; expected a JSON file",)),
        (("diff", "a.npz", "p.json"), ("a.npz: is a zip archive",)),
        (("plot", "heatmap", "p.json", "-o", "f.png"), ("p.json: ", "Parquet")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_file_of_another_kind(work: Path, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    """A file given in the place of another is called what it is."""
    np.savez(work / "a.npz", a=np.zeros(3))
    assert_one_line_error(run(work, *args), 2, *words)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.5, float("nan")])
def test_holdout_out_of_range(material: Path, share: float) -> None:
    """A holdout share must lie strictly between 0 and 1."""
    trace = read_trace(material / "tokens.parquet")
    assert_refused(lambda: trace.split(share, 0), "holdout: ")


def test_holdout_of_counts(work: Path) -> None:
    """A counts-only trace cannot be split, and the message says what can."""
    result = run(work, "compare", *SOLVE[1:], "--holdout", "0.5")
    assert_one_line_error(result, 2, "t.parquet", "--holdout", "token-level")


def test_tokens_of_thousands_of_digits(work: Path) -> None:
    """--tokens with more digits than Python converts is a value out of range like any other."""
    args = ("--format", "counts", "--model", "spec.json", "-o", "o.parquet")
    result = run(work, "profile", "counts.csv", *args, "--tokens", "a=" + "9" * 5000)
    assert_one_line_error(result, 2, "--tokens")


@pytest.mark.parametrize("command", [(), ("plot",)], ids=["prism-plan", "plot"])
def test_no_command_shows_the_help(work: Path, command: tuple[str, ...]) -> None:
    """Without a command the help is shown on standard error, as a usage error."""
    result = run(work, *command)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(
        f"Usage: {' '.join(('prism-plan', *command))} [OPTIONS] COMMAND"
    )
    assert "\nCommands:\n" in result.stderr


# ----------------------------------------------------------------------------- files that are not


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("solve", "no.parquet", "--cluster", "c.toml", "-o", "-"), "no.parquet"),
        (("solve", "t.parquet", "--cluster", "no.toml", "-o", "-"), "no.toml"),
        (("solve", "esft", "--cluster", "c.toml", "-o", "-"), "esft"),
        (("solve", "counts.csv", "--cluster", "c.toml", "-o", "-"), "counts.csv"),
        (("solve", "t.parquet", "--cluster", "t.parquet", "-o", "-"), "t.parquet"),
        (("diff", "p.json", "t.parquet"), "t.parquet"),
    ],
    ids=" ".join,
)
def test_missing_or_foreign_file(work: Path, args: tuple[str, ...], name: str) -> None:
    """A missing file, a folder or a file of another kind is named; stdout stays empty."""
    assert_one_line_error(run(work, *args), 2, f"prism-plan: {name}: ")


@pytest.mark.parametrize("read", [read_trace, read_placement, check_file])
def test_message_of_a_missing_file_is_plain(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """A missing file is called that once, without the words of a library."""
    error = assert_refused(lambda: read(tmp_path / "gone.parquet"), "no such file or directory")
    assert "errno" not in str(error).lower()
    assert str(error).count("gone.parquet") == 1


def _without_root() -> list[str]:
    """A prefix under which file modes count, for root overrides them."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root ignores file modes, and setpriv is not here to change that")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]


@pytest.mark.parametrize(
    ("closed", "args"),
    [
        ("t.parquet", (*SOLVE, "-o", "-")),
        ("c.toml", (*SOLVE, "-o", "-")),
        ("esft", ("profile", "esft", "--format", "esft", "--model", "spec.json", "-o", "o")),
        ("esft", ("profile", "x=esft/e", "--format", "esft", "--model", "spec.json", "-o", "o")),
        ("esft", ("profile", "counts.csv", "--format", "counts", "--model", "esft/m", "-o", "o")),
        ("esft", (*SOLVE, "-o", "esft/o.json")),
    ],
    ids=["trace", "cluster", "folder", "in folder", "model in folder", "output in folder"],
)
def test_unreadable(work: Path, closed: str, args: tuple[str, ...]) -> None:
    """What may not be read or searched is named, not only the reason."""
    prefix = _without_root()
    mode = (work / closed).stat().st_mode
    (work / closed).chmod(0)
    try:
        result = run(work, *args, prefix=prefix)
    finally:
        (work / closed).chmod(mode)
    assert_one_line_error(result, 2, closed, "permission denied")


def test_name_too_long(work: Path) -> None:
    """A file name that the file system refuses is a bad name that the message shows."""
    result = run(work, *SOLVE, "-o", "o" * 300 + ".json")
    assert_one_line_error(result, 2, "ooooo", "name too long")


def test_input_from_a_pipe(work: Path) -> None:
    """`<(command)` is read once: the digest is of what was read, and check can tell its kind."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    plan = "solve t.parquet --cluster <(cat c.toml) --solver exact -o o.json"
    script = f'"$@" {plan} && "$@" check <(cat p.json)'
    result = subprocess.run(
        [bash, "-c", script, bash, *COMMAND],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    inputs = json.loads((work / "o.json").read_text())["inputs"]
    assert inputs["cluster"]["sha256"] == sha256(work / "c.toml")


# ------------------------------------------------------------------------------------ odd names


@pytest.mark.parametrize("name", [b"c\xff.toml", b"c\nd.toml", "ç \u202e.toml".encode()])
def test_odd_cluster_name_works(work: Path, name: bytes) -> None:
    """File names that are not UTF-8, or hold a line break, do not stop a plan."""
    shutil.copy(work / "c.toml", os.fsencode(work) + b"/" + name)
    result = run(work, "solve", "t.parquet", "--cluster", name, "--solver", "exact", "-o", "o.json")
    assert result.returncode == 0, result.stderr
    read_placement(work / "o.json")


@pytest.mark.parametrize("name", [b"t\xff.parquet", b"t\nu.parquet"])
def test_odd_trace_name_works(work: Path, name: bytes) -> None:
    """A trace whose name is not UTF-8 is written and read; messages stay one line."""
    args = ("--format", "counts", "--model", "spec.json", "-o", name)
    result = run(work, "profile", "counts.csv", *args)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert run(work, "check", name).returncode == 0


def test_lone_surrogate_in_a_name(work: Path) -> None:
    r"""JSON can spell "\ud800", which no file or terminal can hold: it is refused on reading."""
    values = json.loads((work / "p.json").read_text())
    values["servers"][0]["name"] = "\ud800"
    (work / "p.json").write_text(json.dumps(values))
    assert_one_line_error(run(work, "diff", "p.json", "p.json"), 2, "p.json", "servers[0].name")


def test_output_encoding_that_lacks_characters(work: Path) -> None:
    """A terminal of another encoding gets a table with replacements, not a traceback."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run(work, "diff", "p.json", "p.json", env=env)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------ traces


@pytest.mark.parametrize("name", ["t.parquet", "tokens.parquet"])
def test_truncated_trace(material: Path, tmp_path: Path, name: str) -> None:
    """A trace cut at any byte is refused, and the message names the file."""
    data = (material / name).read_bytes()
    path = tmp_path / "cut.parquet"
    for length in [*range(0, len(data), 13), *range(len(data) - 12, len(data))]:
        path.write_bytes(data[:length])
        assert_refused(lambda: read_trace(path), str(path))


@pytest.mark.parametrize("name", ["t.parquet", "tokens.parquet"])
@pytest.mark.parametrize("part", range(4))
def test_flipped_bytes(material: Path, tmp_path: Path, name: str, part: int) -> None:
    """Flipped bytes give a refusal, or a trace whose numbers are all possible."""
    data = (material / name).read_bytes()
    path = tmp_path / "flipped.parquet"
    rng = random.Random(f"{name} {part}")
    for _ in range(250):
        spoilt = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 20])):
            spoilt[rng.randrange(len(spoilt))] ^= rng.randrange(1, 256)
        path.write_bytes(spoilt)
        trace, read = attempt(lambda: read_trace(path), str(path))
        if read:
            _assert_possible(trace)


def test_flipped_task_word(material: Path, tmp_path: Path) -> None:
    """A task name that is no longer UTF-8 is refused."""
    data = (material / "tokens.parquet").read_bytes()
    path = tmp_path / "word.parquet"
    tasks = read_trace(material / "tokens.parquet").tasks
    refused = 0
    for at in range(4, len(data) // 2):
        path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
        trace, read = attempt(lambda: read_trace(path), str(path))
        refused += not read
        assert not read or trace.tasks == tasks
    assert refused > 0


def _assert_possible(trace: Trace) -> None:
    """No negative number, and no layer with more calls than its tokens can make."""
    assert (trace.counts >= 0).all()
    assert (trace.tokens > 0).all()
    assert (trace.counts.sum(axis=2) <= trace.tokens[:, None] * trace.model.top_k).all()


Spoil = Callable[[pa.Table, dict[str, Any]], pa.Table | None]


def _set(column: str, values: Any) -> Spoil:
    def change(table: pa.Table, header: dict[str, Any]) -> pa.Table:
        index = table.schema.get_field_index(column)
        return table.set_column(index, column, values(table) if callable(values) else values)

    return change


def _first(column: str, value: Any, kind: pa.DataType) -> Spoil:
    return _set(column, lambda t: pa.array([value, *t[column].to_pylist()[1:]], kind))


def _header(**changes: Any) -> Spoil:
    def change(table: pa.Table, header: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is None:
                del header[key]
            else:
                header[key] = value

    return change


def _model(**changes: Any) -> Spoil:
    return lambda table, header: header["model"].update(changes)


COUNTS_SPOILS: dict[str, tuple[Spoil, str]] = {
    "float count": (_set("count", pa.array([1.0] * 24)), "count"),
    "NaN count": (_set("count", pa.array([float("nan")] * 24)), "count"),
    "null count": (_first("count", None, pa.int64()), "count"),
    "negative count": (_first("count", -1, pa.int64()), "-1"),
    "count above tokens": (_first("count", 2**62, pa.int64()), "count"),
    "more calls than tokens make": (_set("count", pa.array([10] * 24, pa.int64())), "count"),
    "layer": (_first("layer", 0, pa.int32()), "layer 0"),
    "expert": (_first("expert", 4, pa.int32()), "expert 4"),
    "negative expert": (_first("expert", -1, pa.int32()), "expert -1"),
    "null task": (_set("task", pa.array([None] + ["a"] * 23).dictionary_encode()), "task"),
    "empty task": (_set("task", pa.array([""] * 12 + ["b"] * 12).dictionary_encode()), "task"),
    "row twice": (lambda t, h: pa.concat_tables([t, t.slice(3, 1)]), "row 24"),
    "no rows": (lambda t, h: t.slice(0, 0), "no rows"),
    "column missing": (lambda t, h: t.drop_columns(["count"]), "count"),
    "column unknown": (lambda t, h: t.append_column("x", t["count"]), "'x'"),
    "column twice": (lambda t, h: t.append_column("count", t["count"]), "count"),
    "no tokens": (_header(tokens=None), "tokens"),
    "negative tokens": (_header(tokens={"a": -1, "b": 10}), "tokens.a"),
    "tokens of another task": (_header(tokens={"a": 10, "b": 10, "z": 1}), "'z'"),
    "version": (_header(version=2), "version"),
    "version true": (_header(version=True), "version"),
    "format": (_header(format="other"), "format"),
    "kind": (_header(kind="x"), "kind"),
    "kind of the other columns": (_header(kind="tokens"), "column"),
    "provenance": (_header(provenance=3), "provenance"),
    "model": (_header(model="tiny"), "model"),
    "model key": (_model(nmae="x"), "nmae"),
    "model layers": (_model(moe_layers=[1, 2, 10**30]), "layer"),
    "model with fewer experts": (_model(num_experts=3), "expert 3"),
    "model name no text can hold": (_model(name="\ud800"), "name"),
}


def _experts(change: Callable[[Any], Any]) -> Spoil:
    def values(table: pa.Table) -> Any:
        ids = np.array(table["experts"].to_pylist(), np.uint16)
        ids = change(ids)
        return pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1])

    return _set("experts", values)


def _put(at: tuple[int, int], value: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[at] = value
        return values

    return change


def _weight(value: float) -> Spoil:
    def values(table: pa.Table) -> Any:
        weights = np.array(table["weights"].to_pylist(), np.float16)
        weights[1, 1] = value
        return pa.FixedSizeListArray.from_arrays(pa.array(weights.ravel()), weights.shape[1])

    return _set("weights", values)


TOKEN_SPOILS: dict[str, tuple[Spoil, str]] = {
    "expert": (_experts(_put((5, 3), 4)), "expert 4"),
    "expert twice": (_experts(lambda ids: np.repeat(ids[:, ::2], 2, axis=1)), "twice"),
    "narrow lists": (_experts(lambda ids: ids[:, :4].copy()), "experts"),
    "lists of another kind": (
        _set("experts", lambda t: pa.array(t["experts"].to_pylist(), pa.list_(pa.int64(), 6))),
        "experts",
    ),
    "lists of any length": (
        _set("experts", lambda t: pa.array(t["experts"].to_pylist(), pa.list_(pa.uint16()))),
        "experts",
    ),
    "null list": (
        _set(
            "experts",
            lambda t: pa.array([None, *t["experts"].to_pylist()[1:]], pa.list_(pa.uint16(), 6)),
        ),
        "experts",
    ),
    "NaN weight": (_weight(float("nan")), "weight"),
    "infinite weight": (_weight(float("inf")), "weight"),
    "negative weight": (_weight(-1.0), "weight"),
    "rows twice": (lambda t, h: pa.concat_tables([t, t]), "is duplicated"),
    "negative request": (_first("request", -1, pa.int32()), "request"),
    "negative position": (_first("position", -1, pa.int32()), "position"),
    "phase": (_set("phase", pa.array(["x"] * 60).dictionary_encode()), "phase"),
    "two tasks a request": (_set("task", pa.array(["a", "b"] * 30).dictionary_encode()), "request"),
    "no rows": (lambda t, h: t.slice(0, 0), "no rows"),
}


def _respoil(source: Path, target: Path, spoil: Spoil) -> None:
    with pq.ParquetFile(source) as parquet:
        metadata = {**(parquet.schema_arrow.metadata or {}), **(parquet.metadata.metadata or {})}
        table = parquet.read().replace_schema_metadata(None)
    header = json.loads(metadata[b"prism_plan"])
    changed = spoil(table, header)
    if isinstance(changed, pa.Table):
        table = changed
    text = json.dumps(header).encode()
    pq.write_table(table.replace_schema_metadata({b"prism_plan": text}), target)


@pytest.mark.parametrize(
    ("name", "spoil", "word"),
    [
        pytest.param(name, spoil, word, id=f"{name}: {what}")
        for name, spoils in (("t.parquet", COUNTS_SPOILS), ("tokens.parquet", TOKEN_SPOILS))
        for what, (spoil, word) in spoils.items()
    ],
)
def test_wrong_trace(material: Path, tmp_path: Path, name: str, spoil: Spoil, word: str) -> None:
    """Parquet with our header but wrong content is refused; the message names what is wrong."""
    path = tmp_path / "wrong.parquet"
    _respoil(material / name, path, spoil)
    assert_refused(lambda: read_trace(path), str(path), word)


@pytest.mark.parametrize("name", ["t.parquet", "tokens.parquet"])
def test_rewritten_trace_is_still_read(material: Path, tmp_path: Path, name: str) -> None:
    """The tool that spoils traces leaves an unspoilt one readable."""
    _respoil(material / name, tmp_path / "same.parquet", lambda table, header: None)
    again = read_trace(tmp_path / "same.parquet")
    assert np.array_equal(again.counts, read_trace(material / name).counts)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"3", b"null", b'{"format":NaN}', b'{"a":1,"a":2}', b"\xff", b"[" * 99_999],
    ids=lambda raw: repr(raw[:20]),
)
def test_broken_header(material: Path, tmp_path: Path, raw: bytes) -> None:
    """A header that is not our JSON is refused."""
    path = tmp_path / "header.parquet"
    table = pq.read_table(material / "t.parquet").replace_schema_metadata({b"prism_plan": raw})
    pq.write_table(table, path)
    assert_refused(lambda: read_trace(path), str(path))


def test_foreign_parquet(work: Path) -> None:
    """Parquet of somebody else is told from ours, with the way to make ours."""
    pq.write_table(pa.table({"x": [1, 2]}), work / "foreign.parquet")
    result = run(work, "solve", "foreign.parquet", "--cluster", "c.toml", "-o", "o.json")
    assert_one_line_error(result, 2, "foreign.parquet", "prism-plan profile")


# -------------------------------------------------------------------------------------- placements


def _paths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values)
    if isinstance(values, dict | list):
        for key, value in items:
            if isinstance(value, dict | list):
                yield from _paths(value, (*path, key))
            else:
                yield (*path, key)


_RAW = {"@nan": "NaN", "@1e999": "1e999", "@400 digits": "9" * 400, "@5000 digits": "9" * 5000}
_WRONG: tuple[Any, ...] = (None, True, -1, 1.5, 2.0, "", "\ud800", [], {}, [[]], 2**63, *_RAW)


def test_every_value_of_a_placement(material: Path, tmp_path: Path) -> None:
    """Each value of a placement, removed or replaced by any odd one: accepted or refused."""
    good = json.loads((material / "p.json").read_text())
    path = tmp_path / "p.json"
    for place in _paths(good):
        for wrong in (*_WRONG, KeyError):
            if wrong is KeyError and not place:
                continue
            text = json.dumps(_changed(good, place, wrong))
            for mark, raw in _RAW.items():
                text = text.replace(f'"{mark}"', raw)
            path.write_text(text)
            report, read = attempt(lambda: check_file(path), f"{path}: ")
            if read:
                json.dumps(report.to_json(), ensure_ascii=False).encode()


def _changed(good: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    if not place:
        return wrong
    values = copy.deepcopy(good)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if wrong is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = wrong
    return values


def _experts_of(values: Any) -> Any:
    return values["servers"][0]["gpus"][0]["experts"]


PLACEMENT_SPOILS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no model": (lambda v: v.pop("model"), "model"),
    "unknown key": (lambda v: v.update(extra=1), "extra"),
    "no servers": (lambda v: v.update(servers=[]), "servers"),
    "server without name": (lambda v: v["servers"][0].pop("name"), "servers[0]"),
    "unknown layer": (lambda v: _experts_of(v).update({"4": [0]}), "layer 4"),
    "layer of 5000 digits": (lambda v: _experts_of(v).update({"1" * 5000: [0]}), "layer"),
    "layer with a line break": (lambda v: _experts_of(v).update({"1\n": [0]}), "experts"),
    "layer in words": (lambda v: _experts_of(v).update(one=[0]), "experts"),
    "bytes for slots": (
        lambda v: v["servers"][0]["gpus"][0].update(bytes=v["servers"][0]["gpus"][0].pop("slots")),
        "slots",
    ),
    "digest": (lambda v: v["inputs"]["trace"].update(sha256="x"), "sha256"),
}


@pytest.mark.parametrize("what", PLACEMENT_SPOILS)
def test_wrong_placement(material: Path, tmp_path: Path, what: str) -> None:
    """A wrong placement is refused; the message names file and place."""
    spoil, word = PLACEMENT_SPOILS[what]
    values = json.loads((material / "p.json").read_text())
    spoil(values)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(values))
    assert_refused(lambda: read_placement(path), f"{path}: ", word)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"format": 1, "format": 2}', "'format' is duplicated"),
        ('{"format": NaN}', "NaN"),
        ("", "line 1"),
        ("\0\1", "line 1"),
        ("[" * 99_999, "deep"),
    ],
    ids=["duplicate key", "NaN", "empty", "binary", "deep"],
)
def test_placement_that_is_not_json(tmp_path: Path, text: str, word: str) -> None:
    """What JSON does not allow is refused with its place."""
    path = tmp_path / "p.json"
    path.write_text(text, encoding="utf-8")
    assert_refused(lambda: read_placement(path), f"{path}: ", word)


def test_truncated_placement(material: Path, tmp_path: Path) -> None:
    """A placement cut at any byte is refused."""
    data = (material / "p.json").read_bytes().rstrip()
    path = tmp_path / "cut.json"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert_refused(lambda: read_placement(path), f"{path}: ")


def test_placement_of_another_model(work: Path) -> None:
    """A placement for another model is refused by its file name, also as the one to stay near."""
    values = json.loads((work / "p.json").read_text())
    values["model"]["name"] = "other"
    (work / "q.json").write_text(json.dumps(values))
    with nothing_changes(work):
        result = run(work, *SOLVE, "--from", "q.json", "-o", "o.json")
    assert_one_line_error(result, 2, "q.json", "another model", "'other'", "'tiny'")


def test_check_names_the_constraint(work: Path) -> None:
    """A well-formed placement that leaves an expert out is exit code 3."""
    values = json.loads((work / "p.json").read_text())
    for server in values["servers"]:
        held = server["gpus"][0]["experts"]["1"]
        server["gpus"][0]["experts"]["1"] = [e for e in held if e != 3]
    (work / "p.json").write_text(json.dumps(values))
    result = run(work, "check", "p.json")
    assert result.returncode == 3
    assert result.stderr == "prism-plan: p.json: layer 1 expert 3 is held nowhere\n"


def test_check_against_a_smaller_cluster(work: Path) -> None:
    """`check --cluster` alone compares servers and capacities with the cluster."""
    (work / "c.toml").write_text(CLUSTER.replace("slots = 7", "slots = 2"))
    result = run(work, "check", "p.json", "--cluster", "c.toml")
    assert result.returncode == 3, result.stdout
    assert "s0" in result.stderr
    assert "2" in result.stderr


def test_check_names_the_cluster_at_fault(work: Path) -> None:
    """An error in the cluster that `check` compares with names the cluster file."""
    (work / "c.toml").write_text(CLUSTER.replace("a = 1.0", "aa = 1.0"))
    result = run(work, "check", "p.json", "--cluster", "c.toml", "--trace", "t.parquet")
    assert_one_line_error(result, 2, "c.toml", "'aa'")


def test_check_knows_comparisons(work: Path) -> None:
    """`check` takes any file of ours, what `compare -o` writes too."""
    result = run(work, "compare", *SOLVE[1:], "--solvers", "exact", "-o", "r.json")
    assert result.returncode == 0, result.stderr
    assert run(work, "check", "r.json").returncode == 0


# ---------------------------------------------------------------------------------------- clusters

SERVER_KEYS = {
    "name": '"s0"',
    "weight": "1.0",
    "arrival_interval_s": "1.0",
    "uplink_mbps": "5",
    "downlink_mbps": "5",
    "kv_tokens": "0",
    "concurrency": "1",
    "layer_cap": "4",
    "pin": "[[1, 2]]",
    "forbid": "[[1, 3]]",
    "tasks": "{ a = 1.0 }",
}
GPU_KEYS = {
    "memory_gb": "0.02",
    "memory_fraction": "1.0",
    "reserve_gb": "0",
    "dense": "true",
    "memory_bandwidth_gbs": "1555",
    "tflops": "312",
    "launch_overhead_us": "20",
    "load_gbs": "12",
}
LINK_KEYS = {
    "bandwidth_mbps": "500",
    "rtt_ms": "1",
    "call_overhead_ms": "0.2",
    "burst_kb": "0",
    "short_kb": "1",
}
_ODD = (
    *("nan", "inf", "-inf", "-1", "0", "1e300", "1e308", "5e-324", "9223372036854775808"),
    *('"x"', '""', '" "', "true", "[]", "{}", "[1]", "[[1, 2], [1, 2]]", "[[0, 0]]", "[[1, 4]]"),
    *("[[1, -1]]", "[[1]]", "[[1.0, 2]]", "[[true, 1]]", "[[9223372036854775808, 1]]"),
    *("{ a = nan }", "{ a = 0.5 }", "{ a = -1.0 }", "{ a = 1e308, b = 1e308 }", "{ z = 1.0 }"),
    *("1979-05-27", '"s1"', '"a\\nb"', "9" * 5000, '"' + "n" * 5000 + '"'),
)


def _cluster(**changes: str) -> str:
    def table(keys: dict[str, str]) -> str:
        return "".join(f"{key} = {changes.get(key, value)}\n" for key, value in keys.items())

    return (
        f"name = {changes.get('cluster_name', 'two')!r}\n[link]\n{table(LINK_KEYS)}"
        f"[[server]]\n{table(SERVER_KEYS)}[[server.gpu]]\n{table(GPU_KEYS)}"
        '[[server]]\nname = "s1"\nweight = 1.0\ntasks = { b = 1.0 }\n[[server.gpu]]\nslots = 12\n'
    )


@pytest.mark.parametrize("key", [*SERVER_KEYS, *GPU_KEYS, *LINK_KEYS])
def test_every_value_of_a_cluster(material: Path, key: str) -> None:
    """Each value replaced by any odd one is refused by file, or the cluster can be planned on."""
    trace = read_trace(material / "t.parquet")
    refused = 0
    for odd in _ODD:
        text = _cluster(**{key: odd})
        cluster, read = attempt(lambda text=text: parse_cluster(text, source="c.toml"), "c.toml: ")
        refused += not read
        if read:
            plan, solved = attempt(lambda cluster=cluster: solve(Instance.build(trace, cluster)))
            assert not solved or 0 <= plan.plan.remote_share <= 1
    assert refused


def _first_server(line: str) -> str:
    return CLUSTER.replace('name = "s0"', f'name = "s0"\n{line}')


#: Text, what the message names. All are bad input.
CLUSTER_SPOILS: dict[str, tuple[str, str]] = {
    "empty": ("", "server"),
    "cut": (CLUSTER[:60], "TOML"),
    "binary": ("\0\1", "TOML"),
    "key twice": (CLUSTER.replace("weight = 1.0", "weight = 1\nweight = 2", 1), "line 7"),
    "unknown key": (CLUSTER.replace("weight", "wieght", 1), "did you mean 'weight'"),
    "unknown table": (CLUSTER + "[foo]\nx = 1\n", "'foo'"),
    "unknown gpu key": (CLUSTER.replace("slots = 7", "slot = 7"), "server[0].gpu[0]"),
    "no servers": ('name = "x"\n', "server"),
    "server is a number": ("server = 3\n", "server"),
    "no gpus": (CLUSTER.replace("[[server.gpu]]\nslots = 7\n", ""), "server[0]"),
    "no memory": (CLUSTER.replace("slots = 7", "tflops = 1"), "memory_gb"),
    "name twice": (CLUSTER.replace('"s1"', '"s0"'), "server[1].name"),
    "shares": (CLUSTER.replace("a = 1.0", "a = 0.5"), "server[0].tasks"),
    "shares beyond floats": (CLUSTER.replace("a = 1.0", "a = 1e308, b = 1e308"), "tasks"),
    "tasks is a number": (CLUSTER.replace("{ a = 1.0 }", "0"), "server[0].tasks"),
    "tasks is false": (CLUSTER.replace("{ a = 1.0 }", "false"), "server[0].tasks"),
    "link is a number": (CLUSTER.replace("[link]\nbandwidth_mbps = 500", "link = 0"), "link"),
    "pinned and forbidden": (_first_server("pin = [[1, 0]]\nforbid = [[1, 0]]"), "server[0]"),
    "two dense gpus": (_first_server("[[server.gpu]]\nslots = 1\ndense = true\n" * 2), "dense"),
    "pair of strangers": (CLUSTER + '[[links]]\na = "s0"\nb = "s9"\n', "links[0].b"),
    "pair of one": (CLUSTER + '[[links]]\na = "s0"\nb = "s0"\n', "links[0].b"),
}


@pytest.mark.parametrize("what", CLUSTER_SPOILS)
def test_wrong_cluster(what: str) -> None:
    """A wrong cluster file is refused; the message names file and place."""
    text, word = CLUSTER_SPOILS[what]
    error = assert_refused(lambda: parse_cluster(text, source="c.toml"), "c.toml: ", word)
    assert error.exit_code == 2


RULE_SPOILS: dict[str, tuple[str, int, str]] = {
    "unknown task": (CLUSTER.replace("a = 1.0", "aa = 1.0"), 2, "did you mean 'a'"),
    "pin of an unknown layer": (_first_server("pin = [[0, 0]]"), 2, "layer 0"),
    "pin of an unknown expert": (_first_server("pin = [[1, 4]]"), 2, "expert 4"),
    "no weight": (CLUSTER.replace("weight = 1.0\n", "", 1), 2, "weight"),
    "gpu below the dense part": (
        CLUSTER.replace("slots = 7", "memory_gb = 0.001"),
        3,
        "short by 4,000,000 bytes",
    ),
    "too few slots": (CLUSTER.replace("slots = 7", "slots = 1"), 3, "short by 3 slots"),
    "pins beyond slots": (
        _first_server("pin = [[1, 0], [1, 1]]").replace("= 7", "= 1").replace("= 8", "= 12"),
        3,
        "2 pinned experts and 1 slots",
    ),
    "forbidden everywhere": (
        CLUSTER.replace("weight = 1.0", "weight = 1.0\nforbid = [[1, 0]]"),
        3,
        "layer 1 expert 0",
    ),
    "caps": (CLUSTER.replace("weight = 1.0", "weight = 1.0\nlayer_cap = 1"), 3, "layer_cap"),
}


@pytest.mark.parametrize("what", RULE_SPOILS)
def test_cluster_that_does_not_fit(material: Path, what: str) -> None:
    """What does not fit trace or model is refused: bad input, or infeasible by a shortfall."""
    text, code, word = RULE_SPOILS[what]
    trace = read_trace(material / "t.parquet")
    error = assert_refused(lambda: solve(Instance.build(trace, parse_cluster(text))), word)
    assert error.exit_code == code
    if isinstance(error, Infeasible):
        assert error.shortfall > 0


@pytest.mark.parametrize("what", ["unknown task", "gpu below the dense part", "caps"])
def test_cluster_that_does_not_fit_is_named(work: Path, what: str) -> None:
    """The command names the cluster file for infeasible clusters as for wrong ones."""
    text, code, word = RULE_SPOILS[what]
    (work / "c.toml").write_text(text)
    (work / "o.json").write_bytes(OLD)
    with nothing_changes(work):
        result = run(work, *SOLVE, "-o", "o.json")
    assert_one_line_error(result, code, "c.toml", word)


def test_gpu_too_small_for_an_expert_has_no_slots(material: Path) -> None:
    """A GPU that holds the dense part but no expert has no slots, and that is all right."""
    text = CLUSTER.replace("slots = 7", "memory_gb = 0.0055").replace("slots = 8", "slots = 12")
    placement = solve(Instance.build(read_trace(material / "t.parquet"), parse_cluster(text)))
    assert placement.gpu_capacity == ((0,), (12,))


@pytest.mark.parametrize("solver", ["exact", "ilp", "prism", "smartmoe"])
@pytest.mark.parametrize("weight", ["5e-324", "1e-300", "1e300", "1e308"])
def test_extreme_weights(material: Path, solver: str, weight: str) -> None:
    """Rates at the ends of what floats hold are planned on rightly, or refused."""
    trace = read_trace(material / "t.parquet")
    text = CLUSTER.replace("weight = 1.0", f"weight = {weight}")
    placement, solved = attempt(
        lambda: solve(Instance.build(trace, parse_cluster(text)), solver), "weight"
    )
    if solved and placement.plan.termination == "optimal":
        wanted = solve(Instance.build(trace, parse_cluster(CLUSTER)), solver).plan.remote_share
        assert placement.plan.remote_share == pytest.approx(wanted)


@pytest.mark.parametrize("interval", ["5e-324", "1e308"])
def test_extreme_arrivals(material: Path, interval: str) -> None:
    """Arrival intervals at the ends of what floats hold are planned on, or refused."""
    trace = read_trace(material / "tokens.parquet")
    text = CLUSTER.replace("weight = 1.0", f"arrival_interval_s = {interval}")
    plan, solved = attempt(
        lambda: solve(Instance.build(trace, parse_cluster(text))), "arrival_interval_s"
    )
    assert not solved or 0 <= plan.plan.remote_share <= 1


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "\ud800"),
        ("moe_layers", [3, 2, 1]),
        ("moe_layers", [1, 2, "3"]),
        ("moe_layers", [1, 2, 2**40]),
        ("num_experts", 65537),
        ("num_experts", 2.0),
        ("top_k", 5),
        ("hidden_size", 0),
        ("expert_bytes", [1, 2]),
        ("expert_bytes", 2**70),
        ("dense_bytes", -1),
        ("dense_bytes", 10**400),
        ("kv_bytes_per_token", True),
        ("kv_bytes_per_token", None),
    ],
)
def test_wrong_model_spec(tmp_path: Path, key: str, value: Any) -> None:
    """A model spec that no other file of ours could hold is refused; the key is named."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({**SPEC, key: value}))
    assert_refused(lambda: load_model_spec(str(path)), str(path), key)


@pytest.mark.parametrize("key", SPEC)
def test_model_spec_without_key(tmp_path: Path, key: str) -> None:
    """Each key of a model spec is needed, and a missing one is named."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({k: v for k, v in SPEC.items() if k != key}))
    assert_refused(lambda: load_model_spec(str(path)), str(path), f"key {key!r} is missing")


def test_model_spec_without_many_keys(tmp_path: Path) -> None:
    """All missing keys are named at once, and an unknown one with the key that was meant."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"moe_layers": [1], "name": "x"}))
    words = "keys 'num_experts', 'top_k', 'expert_bytes', 'hidden_size', 'dtype_bytes', 'dense"
    assert_refused(lambda: load_model_spec(str(path)), str(path), words)
    path.write_text(json.dumps({**SPEC, "topk": 2}))
    assert_refused(lambda: load_model_spec(str(path)), str(path), "did you mean 'top_k'?")


# -------------------------------------------------------------------------------------- recordings


def _line(number: int, text: str) -> str:
    lines = COUNTS.splitlines()
    lines[number - 1] = text
    return "\n".join(lines) + "\n"


#: Bytes of the CSV, what the message names.
CSV_SPOILS: dict[str, tuple[str | bytes, str]] = {
    "NaN": (_line(4, "a,1,2,nan"), "line 4"),
    "negative": (_line(4, "a,1,2,-4"), "line 4"),
    "float": (_line(4, "a,1,2,4.0"), "line 4"),
    "underscore": (_line(4, "a,1,2,1_0"), "line 4"),
    "5000 digits": (_line(4, "a,1,2," + "9" * 5000), "line 4"),
    "row twice": (_line(4, "a,1,0,6"), "line 4"),
    "layer": (_line(4, "a,0,2,6"), "layer 0"),
    "expert": (_line(4, "a,1,4,6"), "expert 4"),
    "empty task": (_line(4, ",1,2,6"), "line 4"),
    "blank task": (_line(4, " ,1,2,6"), "line 4"),
    "value too many": (_line(4, "a,1,2,6,7"), "line 4"),
    "cut": (COUNTS[:100], "line 11"),
    "cut between lines": ("\n".join(COUNTS.splitlines()[:9]) + "\n", "layer 3"),
    "open quote": (_line(4, '"a,1,2,6'), "line"),
    "huge field": (_line(4, "a" * 200_000 + ",1,2,6"), "line 4"),
    "only a header": (COUNTS.splitlines()[0], "no rows"),
    "no header": (COUNTS.partition("\n")[2], "line 1"),
    "column missing": ("task,layer,expert\na,1,2\n", "count"),
    "empty": ("", "line 1"),
    "zero bytes": (b"\0" * 100, "line 1"),
    "binary": (bytes(range(256)), "UTF-8"),
    "UTF-16": (COUNTS.encode("utf-16"), "UTF-8"),
    "Latin-1": (b"task,layer,expert,count\n\xe9,1,1,1\n", "UTF-8"),
}


@pytest.mark.parametrize("what", CSV_SPOILS)
def test_wrong_counts(tmp_path: Path, what: str) -> None:
    """A wrong table of counts is refused; the message names file and line."""
    data, word = CSV_SPOILS[what]
    path = tmp_path / "counts.csv"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    spec = spec_from_json(SPEC)
    assert_refused(lambda: read_counts([Source(path)], spec), str(path), word)


def test_counts_with_byte_order_mark(tmp_path: Path) -> None:
    """The mark that spreadsheets put before UTF-8 is no part of the first column's name."""
    path = tmp_path / "counts.csv"
    path.write_bytes(b"\xef\xbb\xbf" + COUNTS.encode())
    assert read_counts([Source(path)], spec_from_json(SPEC)).tasks == ("a", "b")


def test_counts_without_a_layer_though_tokens_are_given(tmp_path: Path) -> None:
    """--tokens tells the tokens, it does not excuse a missing layer."""
    path = tmp_path / "counts.csv"
    kept = [line for line in COUNTS.splitlines() if not line.startswith("a,2,")]
    path.write_text("\n".join(kept) + "\n")
    spec = spec_from_json(SPEC)
    assert_refused(lambda: read_counts([Source(path)], spec, tokens={"a": 10}), "layer 2")


#: File of layer 2, what the message names besides the file.
ESFT_SPOILS: dict[str, tuple[str | bytes, str]] = {
    "cut ids": ("0\t1\t2", "line 1"),
    "cut weights": ("0\t1\t2\t3\t\t.5\t.5\t.2", "line 1"),
    "word": (ESFT_LAYER.replace("2\t3", "x\t3"), "'x'"),
    "float id": (ESFT_LAYER.replace("2\t3", "2.0\t3"), "'2.0'"),
    "huge id": (ESFT_LAYER.replace("2\t3", "9" * 20 + "\t3"), "line 1"),
    "expert": (ESFT_LAYER.replace("2\t3", "2\t4"), "expert 4"),
    "negative id": (ESFT_LAYER.replace("2\t3", "2\t-1"), "expert -1"),
    "expert twice": (ESFT_LAYER.replace("2\t3", "2\t2"), "[2, 2]"),
    "NaN weight": (ESFT_LAYER.replace(".25", "nan", 1), "line 1"),
    "negative weight": (ESFT_LAYER.replace(".25", "-1", 1), "line 1"),
    "huge weight": (ESFT_LAYER.replace(".25", "1e9", 1), "line 1"),
    "request missing": (ESFT_LAYER.splitlines()[0], "1 requests"),
    "token missing": ("0\t1\t\t.5\t.5\n1\t2\t\t.5\t.5\n", "1 tokens"),
    "empty": ("", "0 requests"),
    "only tabs": ("\t\t\n\t\t\n", "line 1"),
    "binary": (bytes(range(256)), "UTF-8"),
}


@pytest.mark.parametrize("what", ESFT_SPOILS)
def test_wrong_esft_layer(tmp_path: Path, what: str) -> None:
    """A wrong layer file is refused; the message names it and the line."""
    data, word = ESFT_SPOILS[what]
    _esft_folder(tmp_path / "law")
    path = tmp_path / "law" / "expert_weights_2.txt"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    spec = spec_from_json(SPEC)
    assert_refused(lambda: read_esft([Source(tmp_path / "law")], spec), str(path), word)


def test_message_of_a_wrong_id_is_plain(tmp_path: Path) -> None:
    """A word where an id should be is quoted without the words of Python's int()."""
    _esft_folder(tmp_path / "law", ESFT_LAYER.replace("2\t3", "x\t3"))
    spec = spec_from_json(SPEC)
    error = assert_refused(lambda: read_esft([Source(tmp_path / "law")], spec), "'x'")
    assert "int()" not in str(error)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: (f / "expert_weights_2.txt").unlink(), "expert_weights_2.txt is missing"),
        (lambda f: (f / "expert_weights_7.txt").write_text("x"), "layer 7"),
        (lambda f: (f / "expert_weights_02.txt").write_text(ESFT_LAYER), "expert_weights_"),
        (lambda f: [path.unlink() for path in f.iterdir()], "expert_weights_"),
        (lambda f: [path.write_text("") for path in f.iterdir()], "no requests"),
    ],
    ids=["layer missing", "layer unknown", "layer twice", "no files", "no requests"],
)
def test_wrong_esft_folder(tmp_path: Path, spoil: Callable[[Path], object], word: str) -> None:
    """A folder without exactly one file a MoE layer is refused."""
    _esft_folder(tmp_path / "law")
    spoil(tmp_path / "law")
    spec = spec_from_json(SPEC)
    assert_refused(lambda: read_esft([Source(tmp_path / "law")], spec), str(tmp_path), word)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("counts.csv", "--format", "counts"), ("--model", "not given")),
        (("counts.csv", "--format", "counts", "--model", "mixtral-8x7"), ("'mixtral-8x7b'",)),
        (("counts.csv", "--format", "counts", "--model", "mixtral-8x7b"), ("counts.csv", "layer")),
        (("esft", "--format", "esft"), ("esft", "deepseek-v2-lite")),
        (("counts.csv", "counts.csv", "--format", "counts", "--model", "spec.json"), ("TASK=",)),
    ],
    ids=["no model", "unknown preset", "another model", "default model", "source twice"],
)
def test_profile_mistakes(work: Path, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    """A recording that cannot be read leaves an earlier trace as it was."""
    (work / "o.parquet").write_bytes(OLD)
    with nothing_changes(work):
        assert_one_line_error(run(work, "profile", *args, "-o", "o.parquet"), 2, *words)


# ----------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("output", "word"),
    [(".", "folder"), ("gone/o.json", "gone"), ("c.toml/o.json", "c.toml"), ("", "--output")],
    ids=["folder", "in a missing folder", "in a file", "empty"],
)
def test_output_that_cannot_be(work: Path, output: str, word: str) -> None:
    """An output that cannot be written is refused before the work, and nothing is left."""
    with nothing_changes(work):
        assert_one_line_error(run(work, *SOLVE, "-o", output), 2, word)


def test_read_only_folder(work: Path) -> None:
    """A read-only folder is named, and what is in it stays."""
    prefix = _without_root()
    (work / "ro").mkdir()
    (work / "ro" / "o.json").write_bytes(OLD)
    (work / "ro").chmod(0o555)
    try:
        with nothing_changes(work):
            result = run(work, *SOLVE, "-o", "ro/o.json", prefix=prefix)
    finally:
        (work / "ro").chmod(0o755)
    assert_one_line_error(result, 2, "ro/o.json", "permission denied")


@pytest.mark.parametrize(
    ("args", "output"),
    [
        (SOLVE, "o.json"),
        (("profile", "counts.csv", "--format", "counts", "--model", "spec.json"), "o.parquet"),
        (("profile", "esft", "--format", "esft", "--model", "spec.json"), "o.parquet"),
        (("compare", *SOLVE[1:], "--solvers", "exact"), "o.json"),
        (("plot", "placement", "p.json"), "o.png"),
    ],
    ids=["solve", "profile counts", "profile esft", "compare", "plot"],
)
def test_full_disk(work: Path, args: tuple[str, ...], output: str) -> None:
    """Where the disk ends in mid-write, the earlier file stays and no other is left."""
    (work / output).write_bytes(OLD)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    with nothing_changes(work):
        result = run(work, *args, "-o", output, preexec_fn=limit)
    assert_one_line_error(result, 2, f"prism-plan: {output}: cannot be written", "file too large")


@pytest.mark.parametrize(
    ("args", "victim"),
    [
        (SOLVE, "c.toml"),
        (SOLVE, "t.parquet"),
        (("profile", "counts.csv", "--format", "counts", "--model", "spec.json"), "counts.csv"),
        (("compare", *SOLVE[1:], "p.json", "--solvers", ""), "p.json"),
    ],
    ids=["cluster", "trace", "source", "placement"],
)
def test_output_over_an_input(work: Path, args: tuple[str, ...], victim: str) -> None:
    """An output that would overwrite an input of the same command is refused."""
    with nothing_changes(work):
        assert_one_line_error(run(work, *args, "-o", victim), 2, victim)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_full(work: Path) -> None:
    """A full standard output is named, with exit code 2."""
    with open("/dev/full", "w") as full:
        result = run(work, *SOLVE, "-o", "-", stdout=full)
    assert_one_line_error(result, 2, "standard output", "no space left")


@pytest.mark.parametrize(
    "args",
    [
        SOLVE,
        ("profile", "counts.csv", "--format", "counts", "--model", "spec.json"),
        ("profile", "esft", "--format", "esft", "--model", "spec.json"),
        ("plot", "placement", "p.json"),
    ],
    ids=["solve", "profile counts", "profile esft", "plot"],
)
def test_device_stays(work: Path, args: tuple[str, ...]) -> None:
    """An output that is a device, here one that is always full, is never removed or replaced."""
    device = work / "full.png"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
        device.open("wb").close()
    except OSError:
        pytest.skip("may not make a device here")
    assert_one_line_error(run(work, *args, "-o", device.name), 2, device.name, "no space left")
    assert device.is_char_device()


@pytest.mark.parametrize(
    "args", [(*SOLVE, "-o", "-"), (*SOLVE, "-o", "o.json"), ("check", "p.json")], ids=" ".join
)
def test_standard_output_closed(work: Path, args: tuple[str, ...]) -> None:
    """What goes to a closed standard output (`>&-`) is not lost in silence."""
    script = 'exec "$@" >&-'
    result = run(work, *args, prefix=["/bin/sh", "-c", script, "sh"])
    assert result.returncode == 2
    assert result.stderr.endswith("prism-plan: standard output: is closed\n")
    if args[-1] == "o.json":
        read_placement(work / "o.json")  # was written before the table was not


def test_a_command_that_prints_nothing_needs_no_standard_output(work: Path) -> None:
    """A figure is drawn with standard output closed."""
    args = ("plot", "placement", "p.json", "-o", "f.png")
    result = run(work, *args, prefix=["/bin/sh", "-c", 'exec "$@" >&-', "sh"])
    assert (result.returncode, result.stderr) == (0, "")
    assert (work / "f.png").stat().st_size


@pytest.mark.parametrize(
    "args", [("check", "p.json"), ("diff", "p.json", "p.json", "--json")], ids=" ".join
)
def test_reader_that_leaves_early(work: Path, args: tuple[str, ...]) -> None:
    """A reader that leaves before the end (`| head`) is no error."""
    with subprocess.Popen(
        [*COMMAND, *args], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(timeout=HANG_S) == 0
    assert stderr == b""


@pytest.mark.parametrize(
    "backend", [(), ("--solver", "ilp"), ("--solver", "ilp", "--backend", "cbc")], ids=" ".join
)
def test_standard_output_holds_only_json(work: Path, backend: tuple[str, ...]) -> None:
    """`-o -` writes one JSON document to standard output and no other byte."""
    result = run(work, *SOLVE, *backend, "-o", "-")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["format"] == "prism-plan/placement"


# ------------------------------------------------------------------------------------ interruption


@contextlib.contextmanager
def started(folder: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A running command with temporary files of its own; ended at the end of the block."""
    (folder / "tmp").mkdir()
    with subprocess.Popen(
        [*COMMAND, *args],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that the running process does."""
    end = time.monotonic() + HANG_S
    while not true():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end, "it did not begin"
        time.sleep(0.001)


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    """Ends with exit code 130 and one line, and leaves no process of its session."""
    try:
        out, err = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        pytest.fail("still runs long after the signal")
    assert process.returncode == 130, err
    assert err.splitlines() == ["prism-plan: interrupted; nothing was written"]
    assert out == ""
    end = time.monotonic() + HANG_S
    while _session(process.pid):
        assert time.monotonic() < end, f"processes are left: {_session(process.pid)}"
        time.sleep(0.05)


def _session(leader: int) -> list[str]:
    """Names of the processes of a session, but for those that have ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = entry.read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(name)
    return found


def _slow_problem(folder: Path) -> None:
    """Experts of unequal size on tight GPUs: an integer program that runs for minutes."""
    layers, experts, servers = 6, 16, 8
    rng = np.random.default_rng(1)
    sizes = tuple(int(size) for size in rng.integers(700_000, 1_300_000, layers))
    spec = ModelSpec("slow", tuple(range(layers)), experts, 4, sizes, 64, 2, 0, 10)
    counts = rng.integers(1, 1000, (4, layers, experts))
    tokens = np.full(4, 100_000, np.int64)
    write_trace(
        folder / "slow.parquet",
        Trace(model=spec, tasks=tuple("abcd"), counts=counts.astype(np.int64), tokens=tokens),
    )
    room = sum(sizes) * experts * 1.5 / servers / 3
    (folder / "slow.toml").write_text(
        "".join(
            f'[[server]]\nname = "s{n}"\nweight = 1.0\ntasks = {{ {"abcd"[n % 4]} = 1.0 }}\n'
            + f"[[server.gpu]]\nmemory_gb = {room / 1e9:.6f}\n" * 3
            for n in range(servers)
        )
    )


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_interrupted_search(work: Path, backend: str, number: signal.Signals) -> None:
    """A long search ends: no back end runs on, no file is left or changed."""
    _slow_problem(work)
    (work / "o.json").write_bytes(OLD)
    args = ("slow.parquet", "--cluster", "slow.toml", "--solver", "ilp", "--backend", backend)
    with nothing_changes(work), started(work, "solve", *args, "-o", "o.json") as process:
        wait_until(lambda: any((work / "tmp").iterdir()), process)
        time.sleep(1.0)
        process.send_signal(number)
        assert_interrupted(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_write(work: Path, number: signal.Signals) -> None:
    """In mid-write of a trace the earlier one stays and the half of the new one goes."""
    shutil.rmtree(work / "esft")
    request = "\t".join(["0\t1"] * 500) + "\t\t" + "\t".join([".5\t.5"] * 500) + "\n"
    _esft_folder(work / "esft", request * 400)
    (work / "o.parquet").write_bytes(OLD)
    args = ("esft", "--format", "esft", "--model", "spec.json", "-o", "o.parquet")

    def writing() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_size > 4 for path in work.glob(".*o.parquet*"))
        return False

    with nothing_changes(work), started(work, "profile", *args) as process:
        wait_until(writing, process)
        process.send_signal(number)
        assert_interrupted(process)
