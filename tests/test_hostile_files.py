"""Files from strangers: bounds stand before memory is taken, and each file is opened once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_plan import input_limits as limits
from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.json import parse_json
from prism_plan.io.model_spec import spec_from_json
from prism_plan.io.open_file import OpenFile
from prism_plan.io.placement import placement_from_json, write_placement
from prism_plan.io.text_files import decode, iterate_lines, read_text
from prism_plan.io.toml import parse_toml
from prism_plan.io.trace_reader import read_trace
from prism_plan.io.trace_writer import write_trace
from prism_plan.model_spec import PRESETS, ModelSpec
from prism_plan.solvers import solve
from tests.hostile import placement, write_bombs
from tests.profiling.synthetic import synthetic_trace

COMMAND = [sys.executable, "-m", "prism_plan"]
#: Only a real hang takes so long, on however busy a machine.
HANG_S = 300
GIB = 2**30
CLUSTER = """
[[server]]
name = "a"
tasks = { x = 1.0 }
arrival_interval_s = 1.0
[[server.gpu]]
slots = 5
[[server]]
name = "b"
tasks = { y = 1.0 }
arrival_interval_s = 1.0
[[server.gpu]]
slots = 4
"""
SPEC = ModelSpec(
    name="tiny",
    moe_layers=(1, 2),
    num_experts=4,
    top_k=2,
    hidden_size=8,
    dtype_bytes=2,
    expert_bytes=100,
    dense_bytes=0,
    kv_bytes_per_token=0,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace, a cluster, two placements and the hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "bombs").mkdir()
    write_bombs(folder / "bombs")
    write_trace(folder / "t.parquet", synthetic_trace(SPEC, ["x", "y"], requests=3))
    (folder / "c.toml").write_text(CLUSTER)
    instance = Instance.build(read_trace(folder / "t.parquet"), parse_cluster(CLUSTER))
    write_placement(folder / "p.json", solve(instance, "exact"))
    write_placement(folder / "q.json", solve(instance, "uniform"))
    return folder


#: Runs a command; writes its exit code and its peak memory to standard output.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run(work: Path, *args: object, **more: object) -> tuple[int, str, int]:
    """(exit code, standard error, peak memory in bytes) of a command in a process of its own.

    A small process stands in between: a child's peak is at least that of who forked it.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *COMMAND, *map(str, args)],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
        **more,  # type: ignore[call-overload]
    )
    code, peak = map(int, result.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    return code, result.stderr, peak * unit


def refused(result: tuple[int, str, int], *words: str) -> str:
    """The message of a run that ended with exit code 2 and one line, in little memory."""
    code, text, memory = result
    assert code == 2, text
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text
    assert memory < GIB
    return text


# --------------------------------------------------------------------------------- whole commands


def test_check_refuses_hostile_files(work: Path) -> None:
    """`check` answers each hostile file with one line, and takes less than 1 GiB for all."""
    files = sorted(path.name for path in (work / "bombs").iterdir())
    code, text, memory = run(work / "bombs", "check", *files)
    assert code == 2
    assert [line.split(": ")[1] for line in text.splitlines()] == files
    assert memory < GIB


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ("solve bombs/rows.parquet --cluster c.toml -o o.json", "rows.parquet"),
        ("solve bombs/counts-in-bounds.parquet --cluster c.toml -o o.json", "counts-in-bounds"),
        ("compare bombs/tasks.parquet --cluster c.toml", "tasks.parquet"),
        ("solve t.parquet --cluster bombs/wide-headers.toml -o o.json", "wide-headers.toml"),
        ("diff bombs/places.json p.json", "places.json"),
        ("plot sweep bombs/sweep.parquet -o o.svg", "sweep.parquet"),
    ],
)
def test_commands_refuse_hostile_files(work: Path, args: str, name: str) -> None:
    """Every command that reads a hostile file refuses it, not `check` alone."""
    refused(run(work, *args.split()), name)
    assert not (work / "o.json").exists()


# ------------------------------------------------------------------------------------ odd files


def test_named_pipe(work: Path) -> None:
    """A named pipe is refused at once: nobody may ever write to it."""
    os.mkfifo(work / "pipe.toml")
    try:
        for command in (("check", "pipe.toml"), ("check", "t.parquet", "--cluster", "pipe.toml")):
            assert "is a pipe; expected a regular file, or -" in refused(run(work, *command))
    finally:
        (work / "pipe.toml").unlink()


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_device(work: Path) -> None:
    """A device is refused, and as standard input read up to a bound."""
    assert "/dev/zero: is a device" in refused(run(work, "check", "/dev/zero"))
    with open("/dev/zero", "rb") as zero:
        line = refused(run(work, "check", "-", stdin=zero))
    assert "is longer than 268,435,456 bytes" in line


def test_folder(work: Path) -> None:
    """A folder is refused."""
    assert "bombs: is a directory" in refused(run(work, "check", "bombs"))


@pytest.mark.parametrize("name", ["p.json", "t.parquet"])
def test_standard_input(work: Path, name: str) -> None:
    """`-` is standard input, a pipe that is read once; a trace is held meanwhile."""
    code = '"$0" -m prism_plan check - < <(cat "$1")'
    result = subprocess.run(
        ["bash", "-c", code, sys.executable, name], cwd=work, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"-: ok: ")


# ----------------------------------------------------------------------------------- opened once

#: Runs the command line in a process that tells each file that it opens.
SPY = """
import os, sys
def spy(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        seen.append(os.path.realpath(os.fsdecode(args[0])))
seen = []
output = sys.argv.pop(1)
sys.addaudithook(spy)
from prism_plan.cli import main
try:
    main()
except SystemExit as error:
    code = error.code
with open(output, "w") as stream:
    stream.write("\\n".join(seen))
sys.exit(code)
"""


@pytest.mark.parametrize(
    "args",
    [
        "check t.parquet",
        "check c.toml p.json q.json",
        "check p.json --cluster c.toml --trace t.parquet",
        "solve t.parquet --cluster c.toml -o o.json",
        "compare t.parquet --cluster c.toml p.json --holdout 0.5 --solvers uniform",
        "simulate p.json q.json --trace t.parquet --cluster c.toml --requests 2",
        "diff p.json q.json",
        "migrate p.json q.json --cluster c.toml",
        "plot placement p.json -o o.svg",
    ],
)
def test_each_file_is_opened_once(work: Path, tmp_path: Path, args: str) -> None:
    """A command opens each of its inputs once, so that digests are of what was read."""
    opened = tmp_path / "opened"
    subprocess.run(
        [sys.executable, "-c", SPY, opened, *args.split()],
        cwd=work,
        capture_output=True,
        timeout=HANG_S,
        check=True,
    )
    inputs = [str(work / name) for name in args.split() if (work / name).is_file()]
    inputs = [path for path in inputs if not path.endswith(("o.json", "o.svg"))]
    times = Counter(opened.read_text().splitlines())
    assert inputs
    assert {path: times[path] for path in inputs} == dict.fromkeys(inputs, 1)
    for name in ("o.json", "o.svg"):
        (work / name).unlink(missing_ok=True)


def test_trace_that_is_replaced(work: Path, tmp_path: Path) -> None:
    """Another file under the name of a trace that was read changes nothing of it."""
    path, other = tmp_path / "t.parquet", tmp_path / "other"
    trace = synthetic_trace(SPEC, ["x"], requests=3)
    write_trace(path, trace)
    write_trace(other, synthetic_trace(SPEC, ["y"], requests=5))
    found = read_trace(path)
    os.replace(other, path)
    assert found.batches is not None
    assert trace.batches is not None
    again = np.concatenate([batch.experts for batch in found.batches()])
    assert np.array_equal(again, np.concatenate([batch.experts for batch in trace.batches()]))


def test_trace_that_is_written_to(tmp_path: Path) -> None:
    """A trace that is changed in place after it was read is refused, not mixed."""
    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x"], requests=3))
    found = read_trace(path)
    with open(path, "ab") as stream:
        stream.write(b"more")
    assert found.batches is not None
    with pytest.raises(InputError, match=r"t\.parquet: was changed while it was read"):
        list(found.batches())


def test_trace_in_another_process(tmp_path: Path) -> None:
    """A trace that is sent to another process is opened there, unless the file is another."""
    import cloudpickle  # part of joblib's dependencies

    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x"], requests=3))
    sent = cloudpickle.dumps(read_trace(path))
    found = cloudpickle.loads(sent)
    assert sum(len(batch) for batch in found.batches()) == found.tokens.sum()
    write_trace(path, synthetic_trace(SPEC, ["x"], requests=4))
    with pytest.raises(InputError, match="was changed"):
        list(cloudpickle.loads(sent).batches())


def test_trace_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a shared file has other numbers; its size and its time of change tell that it is it."""
    import cloudpickle

    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x"], requests=3))
    sent = cloudpickle.dumps(read_trace(path))
    status, data = path.stat(), path.read_bytes()
    copy = tmp_path / "copy"
    copy.write_bytes(data)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)
    with pytest.raises(InputError, match="was changed"):
        list(cloudpickle.loads(sent).batches())
    monkeypatch.setattr("prism_plan.io.open_file.socket.gethostname", lambda: "another")
    found = cloudpickle.loads(sent)
    assert sum(len(batch) for batch in found.batches()) == found.tokens.sum()
    os.utime(path)
    with pytest.raises(InputError, match="was changed"):
        list(cloudpickle.loads(sent).batches())


# ---------------------------------------------------------------------------------------- bounds


def too_long(path: Path, size: int) -> Path:
    """A file of ``size`` bytes that takes no space on the disk."""
    with open(path, "wb") as stream:
        stream.truncate(size)
    return path


def test_text_file_too_long(tmp_path: Path) -> None:
    """A text file of a byte more than the bound is refused before it is read."""
    path = too_long(tmp_path / "long.json", limits.MAX_TEXT_BYTES + 1)
    with pytest.raises(InputError, match="is longer than 268,435,456 bytes"):
        read_text(path)


def test_growing_file(tmp_path: Path) -> None:
    """A file that is longer than it says, as those of /proc, is read up to the bound."""
    path = tmp_path / "a"
    path.write_bytes(b"12345678")
    with OpenFile(path) as file:
        with open(path, "ab") as stream:
            stream.write(b"90")
        assert file.read(10) == b"1234567890"
        with pytest.raises(InputError, match="is longer than 9 bytes"):
            file.read(9)


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are told one by one with their numbers; one beyond the bound is refused by number."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc\n\nabcdefgh\nlast")
    monkeypatch.setattr("prism_plan.io.open_file.MAX_LINE_BYTES", 9)
    with OpenFile(path) as file:
        assert list(file.lines()) == [(1, b"abc\n"), (2, b"\n"), (3, b"abcdefgh\n"), (4, b"last")]
    monkeypatch.setattr("prism_plan.io.open_file.MAX_LINE_BYTES", 8)
    with OpenFile(path) as file, pytest.raises(InputError, match="line 3: a line too long"):
        list(file.lines())


def test_lines_of() -> None:
    """A text is split at line feeds, without an empty line after the last."""
    for text in ("", "a", "a\n", "a\n\nb", "\n", "a\r\nb\n"):
        assert list(iterate_lines(text)) == text.removesuffix("\n").split("\n") * bool(text)


def test_wide_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text whose characters take 2 or 4 bytes in memory may be half or a quarter as long."""
    monkeypatch.setattr("prism_plan.io.text_files.MAX_TEXT_BYTES", 16)
    assert decode(b"x" * 16, "f") == "x" * 16
    for data, most in ((("é" + "x" * 9).encode(), 16), (("ж" + "x" * 9).encode(), 8)):
        if most == 16:
            assert decode(data, "f")
        else:
            with pytest.raises(InputError, match="at most 8"):
                decode(data, "f")
    with pytest.raises(InputError, match="at most 4"):
        decode("😀xx".encode(), "f")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_nesting(opening: str) -> None:
    """64 levels are read, 65 refused; brackets in strings are no levels."""
    closing = "]" if opening == "[" else "}"
    parse_json(opening * 63 + "[1]" + closing * 63, "f")
    with pytest.raises(InputError, match="f: nested too deeply; expected at most 64 levels"):
        parse_json(opening * 64 + "[1]" + closing * 64, "f")
    text = r"\"[[" * 1000
    assert parse_json(f'["{text}", {"[1]," * 80} 1]', "f")[0] == '"[[' * 1000


def test_toml_nesting() -> None:
    """64 levels of tables are read, 65 refused, however they are spelled; text is no level."""
    parse_toml("a" + ".a" * 63 + " = 1", "f")
    parse_toml("[a" + ".a" * 31 + "]\n" + "b" + ".b" * 31 + " = 1", "f")
    parse_toml("a = " + "[" * 63 + "]" * 63, "f")
    for text in (
        "a" + ".a" * 64 + " = 1",
        "[a" + " . a" * 64 + "]",
        '"a"' + ".'a'" * 64 + " = 1",
        "[a" + ".a" * 32 + "]\n" + "b" + ".b" * 31 + " = 1",
        "a = " + "[" * 64 + "]" * 64,
        "a = " + "{a=" * 64 + "1" + "}" * 64,
    ):
        with pytest.raises(InputError, match="f: nested too deeply; expected at most 64 levels"):
            parse_toml(text, "f")
    words = "a" + ".a" * 100 + "[" * 100
    table = parse_toml(f'# {words}\na = \'{words}\'\nb = "{words}\\"{words}"\n', "f")
    assert table["a"] == words
    for quotes in ("'''", '"""'):
        assert parse_toml(f"a = {quotes}\n{words}\n\"'{words}{quotes}", "f")["a"]


def test_toml_that_is_broken_in_a_string() -> None:
    """A string that does not end is told by the parser, not taken for something else."""
    for text in ('a = "x', "a = 'x", 'a = """x', "a = '''x", 'a = "\\', '"' + '\\"' * 100):
        with pytest.raises(InputError, match="f: not TOML"):
            parse_toml(text, "f")


@pytest.fixture
def few_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bound on the memory of values that a short text reaches."""
    for module in ("io.json", "io.toml"):
        monkeypatch.setattr(f"prism_plan.{module}.MAX_VALUE_BYTES", 10_000)
    return


@pytest.mark.usefixtures("few_values")
def test_memory_of_values() -> None:
    """Lists, objects, keys and strings are counted before any is made."""
    for text in ("[" + "[]," * 100 + "1]", "[" + "{}," * 40 + "1]", "[" + "1," * 400 + "1]"):
        with pytest.raises(InputError, match="f: more values than 10,000 bytes"):
            parse_json(text, "f")
    for text in ("a=1\n" * 70, "a=[" + "1," * 130 + "]", "a={}\n" * 12, "a.a.a.a=1\n" * 4):
        with pytest.raises(InputError, match="f: more values than 10,000 bytes"):
            parse_toml(text, "f")


def test_largest_toml() -> None:
    """A cluster of 256 servers with a link for each pair, and numbers with points, is read."""
    servers = "".join(f'[[server]]\nname="{n}"\n[[server.gpu]]\nslots=9\n' for n in range(256))
    links = "".join(
        f'[[links]]\na="{a}"\nb="{b}"\nbandwidth_mbps=500.25\nrtt_ms=0.25\n'
        for a in range(256)
        for b in range(a)
    )
    assert len(parse_cluster(servers + links).pair_links) == 32_640


def test_model_bounds() -> None:
    """DeepSeek-V3's 58 layers of 256 experts are far within the bounds; 2^22 experts are most."""
    values = PRESETS["deepseek-v2-lite"].to_json()
    assert spec_from_json({**values, "moe_layers": list(range(61)), "num_experts": 256})
    full = {**values, "moe_layers": list(range(64)), "num_experts": 65_536}
    assert spec_from_json(full).num_pairs == limits.MAX_PAIRS
    for broken, words in (
        ({**full, "moe_layers": list(range(65))}, "4,259,840 experts in all"),
        ({**values, "moe_layers": list(range(10_001))}, "10,001 layers"),
        ({**values, "name": "x" * 1001}, "at most 1,000 characters"),
    ):
        with pytest.raises(InputError, match=words):
            spec_from_json(broken)


def test_places_of_a_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs × layers × experts may reach the bound, and not exceed it."""
    monkeypatch.setattr(limits, "MAX_PLACEMENT_SIZE", 24)
    assert placement_from_json(placement(2, 4, 3)).on_gpu.shape == (3, 2, 4)
    with pytest.raises(InputError, match=r"4 GPUs × 2 layers × 4 experts; .* at most 24"):
        placement_from_json(placement(2, 4, 4))


def test_places_of_an_instance(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers × layers × experts are bounded before activations are made of them."""
    trace, cluster = read_trace(work / "t.parquet"), parse_cluster(CLUSTER)
    monkeypatch.setattr(limits, "MAX_PLACEMENT_SIZE", 16)
    assert Instance.build(trace, cluster).num_servers == 2
    monkeypatch.setattr(limits, "MAX_PLACEMENT_SIZE", 15)
    with pytest.raises(InputError, match="2 servers × 2 layers × 4 experts"):
        Instance.build(trace, cluster)


def test_pins_and_servers() -> None:
    """10,000 pins and 1,000 servers are read; each pair stands once, and one more is refused."""
    pins = ",".join(f"[{i}, 0]" for i in range(10_000))
    gpu = "[[server.gpu]]\nslots = 1\n"
    assert len(parse_cluster(f"[[server]]\npin = [{pins}]\n{gpu}").servers[0].pin) == 10_000
    with pytest.raises(InputError, match=r"server\[0\]\.pin: 10,001 entries; .* at most 10,000"):
        parse_cluster(f"[[server]]\npin = [{pins}, [1, 1]]\n{gpu}")
    with pytest.raises(InputError, match=r"pin\[1\]: .*each pair once"):
        parse_cluster(f"[[server]]\npin = [[1, 1], [1, 1]]\n{gpu}")
    assert parse_cluster(f"[[server]]\n{gpu}" * 1000).num_servers == 1000


def test_gpus_of_a_server() -> None:
    """More GPUs than a server can have are refused with their number."""
    gpu = "[[server.gpu]]\nslots = 1\n"
    with pytest.raises(InputError, match=r"server\[0\]\.gpu: 1,025 entries; .* at most 1,024"):
        parse_cluster("[[server]]\n" + gpu * 1025)


def test_row_group_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group that decompresses to more than the bound is refused by number."""
    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x"], requests=3))
    monkeypatch.setattr("prism_plan.io.parquet.MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(InputError, match=r"row group 0: .* bytes decompressed; .*at most 100"):
        read_trace(path)


def test_rows_and_selections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and tokens × layers × top-k, are bounded by the footer."""
    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x"], requests=3))
    tokens = int(read_trace(path).tokens.sum())
    monkeypatch.setattr("prism_plan.io.trace_reader.MAX_TOKENS", tokens)
    monkeypatch.setattr("prism_plan.io.trace_reader.MAX_SELECTIONS", 4 * tokens)
    read_trace(path)
    monkeypatch.setattr("prism_plan.io.trace_reader.MAX_SELECTIONS", 4 * tokens - 1)
    with pytest.raises(InputError, match=f"selections .{tokens} tokens × 2 layers × top-2"):
        read_trace(path)
    monkeypatch.setattr("prism_plan.io.trace_reader.MAX_TOKENS", tokens - 1)
    with pytest.raises(InputError, match=f": {tokens} tokens; expected at most {tokens - 1}"):
        read_trace(path)


def test_small_batches_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of many selections is read in smaller batches, to the same totals."""
    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x", "y"], requests=5))
    whole = read_trace(path)
    monkeypatch.setattr("prism_plan.io.token_batches.MAX_BATCH_SELECTIONS", 12)
    parts = read_trace(path)
    assert parts.batches is not None
    assert {len(batch) for batch in parts.batches()} <= {1, 2, 3}
    assert np.array_equal(whole.counts, parts.counts)
    assert whole.requests is not None
    assert parts.requests is not None
    assert whole.requests.tolist() == parts.requests.tolist()


def test_two_tasks_in_the_order_of_rows(tmp_path: Path) -> None:
    """A request of two tasks is told with the task of its first row first."""
    path = tmp_path / "t.parquet"
    write_trace(path, synthetic_trace(SPEC, ["x", "y"], requests=2))
    table = pq.read_table(path)
    rows = len(table)
    header = pq.ParquetFile(path).metadata.metadata[b"prism_plan"]
    tasks = pa.DictionaryArray.from_arrays(
        pa.array([1] + [0] * (rows - 1), pa.int32()), pa.array(["x", "y"])
    )
    table = table.set_column(3, table.field("task"), tasks)
    table = table.set_column(0, table.field("request"), pa.array(np.zeros(rows, np.int32)))
    table = table.set_column(1, table.field("position"), pa.array(np.arange(rows, dtype=np.int32)))
    pq.write_table(table.replace_schema_metadata({b"prism_plan": header}), path)
    with pytest.raises(InputError, match="request 0 has tasks 'y' and 'x'"):
        read_trace(path)


def test_errors_of_a_large_file_are_told_quickly() -> None:
    """Lists and maps end at their first wrong entry, and an object has few keys."""
    values = placement(1, 2, 1)
    values["servers"][0]["gpus"][0]["experts"]["0"] = [0, "x"] * 500_000
    with pytest.raises(
        InputError, match=r"servers\[0\]\.gpus\[0\]\.experts\.0\[1\]: 'x'; expected"
    ):
        placement_from_json(values)
    with pytest.raises(InputError, match="300,006 keys; expected at most 1,000"):
        placement_from_json(placement(1, 2, 1) | {f"k{number}": 1 for number in range(300_000)})
    values["servers"][0]["gpus"][0]["experts"] = {f"{number}": [] for number in range(300_000)}
    with pytest.raises(InputError, match=r"gpus\[0\]\.experts\.0: 0 entries; expected at least 1"):
        placement_from_json(values)
