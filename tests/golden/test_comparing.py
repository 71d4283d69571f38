"""The comparison sees what differs, and exceptions are narrow and needed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden.catalogue import INPUTS, Case, is_data
from tests.golden.comparing import (
    ABSENT,
    Difference,
    ListedException,
    differences,
    judge,
    read_exceptions,
)
from tests.golden.golden import read_values, write_values
from tests.golden.running import outcome, run
from tests.golden.values import read_file, recorded, without

WAS: dict[str, Any] = {
    "solve/a": {
        "exit": 0,
        "p.json": {"plan": {"bound": 0.25, "seed": 0}, "servers": [{"slots": 4}, {"slots": 2}]},
    },
    "solve/b": {"exit": 2, "p.json": None},
}


def lines(now: Any, tolerance: float = 0.0) -> list[str]:
    return [str(one) for one in differences(WAS, now, tolerance=tolerance)]


def changed() -> Any:
    return copy.deepcopy(WAS)


def test_equal_outcomes_have_no_difference() -> None:
    """What is equal is reported as equal."""
    assert lines(changed()) == []


def test_a_changed_number_is_one_line_with_its_place() -> None:
    """The last bit of a float counts; a tolerance lets it pass, and no more."""
    now = changed()
    now["solve/a"]["p.json"]["plan"]["bound"] = 0.25000000000000006
    wanted = "solve/a: p.json:plan.bound: was 0.25, is 0.25000000000000006"
    assert lines(now) == [wanted]
    assert lines(now, 1e-9) == []
    now["solve/a"]["p.json"]["plan"]["bound"] = 0.2500001
    assert lines(now, 1e-9) == ["solve/a: p.json:plan.bound: was 0.25, is 0.2500001"]


def test_a_float_for_a_whole_number_is_a_difference() -> None:
    """0 and 0.0 and false are different values in a file."""
    for other in (0.0, False, None, "0"):
        now = changed()
        now["solve/a"]["p.json"]["plan"]["seed"] = other
        assert len(lines(now)) == 1


def test_a_changed_exit_code_is_seen() -> None:
    """A command that refuses what it took differs."""
    now = changed()
    now["solve/b"]["exit"] = 70
    assert lines(now) == ["solve/b: exit: was 2, is 70"]


def test_a_missing_file_is_seen() -> None:
    """A file that is no longer written, one that is newly written, and a lost key differ."""
    now = changed()
    now["solve/a"]["p.json"] = None
    assert len(lines(now)) == 1
    now = changed()
    now["solve/b"]["p.json"] = {"plan": {}}
    assert lines(now) == ['solve/b: p.json: was null, is {"plan": {}}']
    now = changed()
    del now["solve/a"]["p.json"]["plan"]["seed"]
    assert lines(now) == [f"solve/a: p.json:plan.seed: was 0, is {ABSENT}"]
    now = changed()
    now["solve/a"]["p.json"]["plan"]["more"] = 1
    assert lines(now) == [f"solve/a: p.json:plan.more: was {ABSENT}, is 1"]


def test_a_list_of_another_length_is_seen() -> None:
    """A server more or fewer differs, and so does one inside of a list."""
    now = changed()
    now["solve/a"]["p.json"]["servers"].pop()
    assert len(lines(now)) == 1
    now = changed()
    now["solve/a"]["p.json"]["servers"][1]["slots"] = 3
    assert lines(now) == ["solve/a: p.json:servers[1].slots: was 2, is 3"]


def test_a_missing_case_is_seen() -> None:
    """A case without values, or values without a case, differ."""
    now = changed()
    del now["solve/b"]
    now["solve/c"] = {"exit": 0}
    assert lines(now) == [
        f"solve/b: case: was there, is {ABSENT}",
        f"solve/c: case: was {ABSENT}, is there",
    ]


# --------------------------------------------------------------------------------------- exceptions

FOUND = [
    Difference("solve/a", "p.json:plan.bound", 0.25, 0.5),
    Difference("solve/b", "p.json:plan.bound", 0.25, 0.75),
]


def judged(
    tmp_path: Path, text: str, ran: tuple[str, ...] = (), left_out: tuple[str, ...] = ()
) -> Any:
    path = tmp_path / "exceptions.toml"
    path.write_text(text)
    return judge(FOUND, read_exceptions(path), ran or ("solve/a", "solve/b"), left_out)


def listed(case: str, place: str = "p.json:plan.bound", more: str = "") -> str:
    return f'[[exception]]\ncase = "{case}"\nplace = "{place}"\nsentence = "It is so."\n{more}\n'


def test_an_exception_covers_what_it_names_and_no_more(tmp_path: Path) -> None:
    """The difference of the case that is named is excepted, that of the other is not."""
    wrong, excepted = judged(tmp_path, listed("solve/a"))
    assert wrong == ["solve/b: p.json:plan.bound: was 0.25, is 0.75"]
    assert excepted == ["solve/a: p.json:plan.bound: was 0.25, is 0.5 [It is so.]"]
    assert judged(tmp_path, listed("solve/?"))[0] == []


def test_an_exception_with_a_value_accepts_that_value_alone(tmp_path: Path) -> None:
    """``now`` says what is right, so that another wrong value is seen."""
    wrong, _ = judged(tmp_path, listed("solve/*", more="now = 0.5"))
    assert wrong == ["solve/b: p.json:plan.bound: was 0.25, is 0.75"]


def test_an_exception_admits_a_long_list_by_its_digest() -> None:
    """Compared in full, or as it is recorded; another list is not admitted."""
    values = list(range(40))
    for found in (values, recorded(values)):
        one = ListedException("a/b", "stdout", "A sentence.", recorded(values))
        assert one.covers(Difference("a/b", "stdout", "no JSON", found))
    assert not one.covers(Difference("a/b", "stdout", "no JSON", values[::-1]))


def test_an_exception_that_meets_nothing_is_wrong(tmp_path: Path) -> None:
    """It is told to be removed, unless cases that it names did not run."""
    text = listed("solve/*") + listed("solve/b", "p.json:plan.seed")
    wrong, _ = judged(tmp_path, text)
    assert len(wrong) == 1
    assert "solve/b: p.json:plan.seed: meets no difference" in wrong[0]
    assert judged(tmp_path, text, ("solve/a",), ("solve/b",))[0] == []


@pytest.mark.parametrize(
    "text",
    [
        listed("solve/a").replace("sentence", "reason"),
        listed("*"),
        listed("solve/a").replace("It is so.", "yes"),
        listed("solve/a", ""),
        listed("solve/a", more='then = "1"'),
        "[exceptions]\n",
    ],
)
def test_a_careless_exception_is_refused(tmp_path: Path, text: str) -> None:
    """One of all cases, without a sentence, without a place, or with an unknown key."""
    with pytest.raises(ValueError, match=r"exceptions\.toml"):
        judged(tmp_path, text)


def test_the_listed_exceptions_are_well_formed() -> None:
    """The committed list can be read."""
    assert isinstance(read_exceptions(), list)


# ------------------------------------------------------------------------------------------- values


def test_times_and_wording_are_left_out(tmp_path: Path) -> None:
    """Of a report neither the time that it took counts nor how a note is worded."""
    values = {"runtime_s": 1.5, "events": 3, "notes": ["a"], "note": "b", "rows": [{"date": "c"}]}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(values))
    found = read_file(path)
    assert found == {"events": 3, "notes": "1 sentences", "note": "a sentence", "rows": [{}]}


def test_a_table_is_its_columns_types_and_metadata(tmp_path: Path) -> None:
    """Compression and the writer's own metadata do not count; values, types and ours do."""

    def table(name: str, numbers: Any, kind: Any, meta: str, compression: str) -> Any:
        columns = {"n": pa.array(numbers, kind), "solve_s": pa.array([0.1] * len(numbers))}
        schema = pa.schema([("n", kind), ("solve_s", pa.float64())], metadata={"prism_plan": meta})
        path = tmp_path / name
        pq.write_table(pa.table(columns, schema=schema), path, compression=compression)
        return read_file(path)

    first = table("a.parquet", [1, 2], pa.int32(), '{"version": 1, "tool": "x 1"}', "zstd")
    assert first == table("b.parquet", [1, 2], pa.int32(), '{"tool": "x 2", "version": 1}', "none")
    assert list(first["columns"]) == ["n"]
    assert first != table("c.parquet", [1, 3], pa.int32(), '{"version": 1}', "zstd")
    assert first != table("d.parquet", [1, 2], pa.int64(), '{"version": 1}', "zstd")
    assert first != table("e.parquet", [1, 2], pa.int32(), '{"version": 2}', "zstd")


def test_long_lists_are_recorded_by_a_digest_that_sees_each_value() -> None:
    """A changed value changes it, its last bit does not; short lists stay as they are."""
    long = [float(n) for n in range(40)]
    other = [*long[:-1], 39.001]
    last_bit = [*long[:-1], 39.00000000000001]
    assert recorded(long).startswith("40 values from 0 to 39, sha256 ")
    assert recorded(long) == recorded(last_bit)
    assert recorded(long) != recorded(other)
    assert recorded(long) != recorded(list(range(40)))
    assert recorded([1, 2]) == [1, 2]


def test_places_of_one_machine_are_not_recorded() -> None:
    """A pattern drops what it names; the exit code always stays."""
    found = {"exit": 0, "p.json": {"servers": [1], "plan": {"bound": 1}}}
    assert without(found, ("p.json:servers*",)) == {"exit": 0, "p.json": {"plan": {"bound": 1}}}
    assert without(found, ("*",)) == {"exit": 0}


def test_written_values_are_read_back(tmp_path: Path) -> None:
    """A group is a file, and old files of groups that are gone are removed."""
    (tmp_path / "old.json").write_text("{}")
    cases = [Case("solve/a", ()), Case("solve/b", ())]
    write_values(cases, WAS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["solve.json"]
    assert read_values(tmp_path) == WAS


# ------------------------------------------------------------------------------------------ running


def test_cases_run_with_the_installed_command(tmp_path: Path) -> None:
    """Exit code, standard output and files of a call are found; a file not written is null."""
    good = Case("x/good", ("check", "in/golden/clusters/toy.toml", "--json"), stdout=True)
    bad = Case(
        "x/bad", ("solve", "no.parquet", "--cluster", "no.toml", "-o", "p.json"), ("p.json",)
    )
    found = run([good, bad], tmp_path, python=Path(sys.executable))
    assert found["x/good"]["exit"] == 0
    assert found["x/good"]["stdout"][0]["kind"] == "cluster"
    assert found["x/bad"] == {"exit": 2, "p.json": None}
    (tmp_path / "cases" / "x/bad" / "p.json").write_text("{")
    assert outcome(bad, tmp_path)["p.json"] == "no JSON"


def test_a_file_of_an_unknown_ending_is_refused() -> None:
    """Whoever commits a new kind of file has to say whether it is data."""
    assert is_data("traces/x.parquet")
    assert not is_data("README.md")
    with pytest.raises(ValueError, match=r"x\.dat"):
        is_data("traces/x.dat")


def test_the_inputs_are_those_of_a_small_folder() -> None:
    """The inputs stay below 600 kB."""
    assert sum(path.stat().st_size for path in INPUTS.rglob("*") if path.is_file()) < 600_000
