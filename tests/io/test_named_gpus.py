"""Cluster files that name their GPUs: figures of the table, what overrides them, what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.cluster import GPU_FIGURES, Gpu, with_figures
from prism_plan.errors import InputError
from prism_plan.io.cluster import parse_cluster
from prism_plan.io.gpu_table import gpu_figures, gpu_table


def gpu_of(lines: str) -> Gpu:
    """The only GPU of a cluster file, from the lines of its table."""
    (server,) = parse_cluster(f"[[server]]\n[[server.gpu]]\n{lines}", "c.toml").servers
    return server.gpus[0]


@pytest.mark.parametrize("name", list(gpu_table()))
def test_a_name_stands_for_its_keys(name: str) -> None:
    """A GPU by its name is the GPU by the keys that the table says it stands for."""
    keys = gpu_figures(name).cluster_keys()
    spelt = gpu_of("\n".join(f"{key} = {value:g}" for key, value in keys.items()))
    named = gpu_of(f'gpu = "{name}"')
    assert named == spelt
    assert named.name == name
    assert spelt.name == ""
    assert named.assumed == spelt.assumed == {"launch_overhead_us"}


def test_the_rtx_4090_by_hand() -> None:
    """Memory is in units of 2**30 bytes, and every other figure is that of the data sheet."""
    expected = Gpu(
        memory_bytes=24 * 2**30, memory_bandwidth_gbs=1008.0, tflops=165.2, load_gbs=25.2
    )
    assert gpu_of('gpu = "rtx-4090"') == expected


def test_keys_of_the_file_override_the_table() -> None:
    """Each key that the file gives counts, also where it says what the table says."""
    lines = 'gpu = "rtx-4090"\nmemory_fraction = 0.5\nload_gbs = 6\ndense = true\nreserve_gb = 1'
    found = gpu_of(lines)
    assert (found.load_gbs, found.tflops, found.dense) == (6.0, 165.2, True)
    assert found.usable_bytes == 12 * 2**30
    assert found.reserve_bytes == 10**9
    assert gpu_of('gpu = "rtx-4090"\nlaunch_overhead_us = 20').assumed == frozenset()


@pytest.mark.parametrize(
    ("size", "expected"),
    [("memory_gb = 10", 10 * 10**9), ("memory_gib = 10", 10 * 2**30), ("slots = 3", None)],
)
def test_a_size_of_the_file_replaces_that_of_the_table(size: str, expected: int | None) -> None:
    """Any of the three keys of size is taken in place of the table's memory."""
    found = gpu_of(f'gpu = "a100-40gb"\n{size}')
    assert found.memory_bytes == expected
    assert found.slots == (None if expected else 3)
    assert found.memory_bandwidth_gbs == 1555.0


@given(
    name=st.sampled_from(list(gpu_table())),
    given_keys=st.dictionaries(st.sampled_from(GPU_FIGURES), st.floats(1e-3, 1e6)),
)
def test_only_what_nobody_gives_is_assumed(name: str, given_keys: dict[str, float]) -> None:
    """For any figures in the file: those count, then the table's, then the assumed defaults."""
    found = gpu_of(
        f'gpu = "{name}"\n' + "\n".join(f"{key} = {value!r}" for key, value in given_keys.items())
    )
    table = gpu_figures(name).cluster_keys()
    for key in GPU_FIGURES:
        expected = given_keys.get(key, table.get(key, getattr(Gpu(), key)))
        assert getattr(found, key) == expected
    assert found.assumed == set(GPU_FIGURES) - set(given_keys) - set(table)


def test_the_name_changes_no_comparison() -> None:
    """GPUs of equal figures are equal whatever they are called, and a changed copy keeps it."""
    assert Gpu(name="x") == Gpu()
    assert repr(Gpu(name="x")) == repr(Gpu())
    assert with_figures(gpu_of('gpu = "t4"'), tflops=1.0).name == "t4"


def test_files_without_names_are_as_before() -> None:
    """Without the key nothing comes from the table."""
    found = gpu_of("memory_gb = 40")
    assert found == Gpu(memory_bytes=40 * 10**9)
    assert (found.name, found.assumed) == ("", set(GPU_FIGURES))
    with pytest.raises(InputError, match="no memory size; expected memory_gb"):
        gpu_of("tflops = 1")


def test_an_unknown_name_is_one_line() -> None:
    """The error names file, place, value, the most similar name, and both ways out."""
    text = "[[server]]\n[[server.gpu]]\nslots = 1\n[[server]]\n[[server.gpu]]\nslots = 1\n"
    text += '[[server.gpu]]\ngpu = "rtx-409"\n'
    with pytest.raises(InputError) as caught:
        parse_cluster(text, "c.toml")
    assert str(caught.value) == (
        "c.toml: server[1].gpu[1].gpu: 'rtx-409'; expected a GPU of the table, did you mean "
        "'rtx-4090'?; prism-plan gpus lists them; or give memory_gb, memory_bandwidth_gbs and "
        "tflops"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4090", "4090; expected a text"),
        ("true", "expected a text"),
        ('["rtx-4090"]', "expected a text"),
        ('""', "expected a non-empty text"),
        ('"  "', "expected a non-empty text"),
        (json.dumps("x" * 1001), "expected at most 1,000"),
        (json.dumps("x" * 1000), "expected a GPU of the table; prism-plan gpus"),
        (json.dumps("rtx-4090\x1b[31m\u202e\n"), r"'rtx-4090\x1b[31m\u202e\n'; expected a GPU"),
    ],
    ids=["number", "boolean", "list", "empty", "blank", "too-long", "long", "controls"],
)
def test_what_is_no_name(value: str, expected: str) -> None:
    """Other types, blank, long and unprintable names are refused in a short line."""
    with pytest.raises(InputError) as caught:
        gpu_of(f"gpu = {value}")
    message = str(caught.value)
    assert message.startswith("c.toml: server[0].gpu[0].gpu: ")
    assert expected in message
    assert message.isprintable()
    assert len(message) < 400


def test_two_sizes_are_refused_with_a_name_too() -> None:
    """The table does not settle a contradiction within the file."""
    with pytest.raises(InputError, match="memory_gb and memory_gib"):
        gpu_of('gpu = "t4"\nmemory_gb = 1\nmemory_gib = 1')


def test_a_misspelt_key_is_refused_with_a_name_too() -> None:
    """Keys are checked as without a name."""
    with pytest.raises(InputError, match="unknown key 'gpus', did you mean 'gpu'"):
        gpu_of('gpus = "t4"')
