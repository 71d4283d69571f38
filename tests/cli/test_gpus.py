"""`prism-plan gpus`: the table, one GPU in full, parts of names, and what no GPU is called."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from prism_plan.io.cluster import parse_cluster
from prism_plan.io.gpu_table import gpu_figures, gpu_table
from tests.cli.test_completion import completions

Run = Callable[..., CompletedProcess[str]]
MEMORY_CLUSTER = """
[[server]]
tasks = { x = 1.0 }
weight = 1
[[server.gpu]]
{gpu}
[[server.gpu]]
memory_gb = 16
"""


def test_the_table(prism_plan: Run) -> None:
    """Without a name every GPU has a row, and standard error stays empty."""
    result = prism_plan("gpus")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0][:2] == ["name", "GPU"]
    assert [line[0] for line in lines[2:]] == list(gpu_table())
    row = next(" ".join(line) for line in lines if line[0] == "rtx-4090")
    assert row == "rtx-4090 NVIDIA GeForce RTX 4090 24 1,008 165.2 bf16 25.2 PCIe 4.0 x16"


def test_the_table_for_machines(prism_plan: Run) -> None:
    """CSV and JSON have the same figures, unrounded, in the units that keys name."""
    rows = list(csv.DictReader(io.StringIO(prism_plan("gpus", "--format", "csv").stdout)))
    values = json.loads(prism_plan("gpus", "--json").stdout)
    assert [row["name"] for row in rows] == [value["name"] for value in values] == list(gpu_table())
    for row, value in zip(rows, values, strict=True):
        for key in ("memory_gib", "memory_bandwidth_gbs", "tflops", "load_gbs"):
            assert float(row[key]) == value[key] == getattr(gpu_figures(row["name"]), key)
        assert value["source_url"].startswith("https://")


def test_one_gpu_in_full(prism_plan: Run) -> None:
    """A name prints the figures with source and note, and lines that a cluster file takes."""
    result = prism_plan("gpus", "h100-sxm")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("h100-sxm: NVIDIA H100 SXM 80 GB\n")
    for text in ("80 GiB", "3,350 GB/s", "989.5 TFLOP/s in bf16", "50.4 GB/s over PCIe 5.0 x16",
                 gpu_figures("h100-sxm").source_title, gpu_figures("h100-sxm").source_url,
                 "1,979 TFLOP/s with sparsity"):  # fmt: skip
        assert text in result.stdout
    pasted = result.stdout[result.stdout.index("[[server.gpu]]") :]
    assert tomllib.loads(pasted) == {"server": {"gpu": [{"gpu": "h100-sxm"}]}}
    named = parse_cluster(f"[[server]]\n{pasted}")
    keys = [line[2:] for line in pasted.splitlines() if line.startswith("# ") and "=" in line]
    spelt = parse_cluster("[[server]]\n[[server.gpu]]\n" + "\n".join(keys))
    assert named == spelt


def test_one_gpu_for_machines(prism_plan: Run) -> None:
    """JSON is one object, CSV one row."""
    assert json.loads(prism_plan("gpus", "t4", "--json").stdout) == gpu_figures("t4").to_json()
    text = prism_plan("gpus", "t4", "--format", "csv").stdout
    assert [line.split(",")[0] for line in text.splitlines()] == ["name", "t4"]


def test_part_of_a_name(prism_plan: Run) -> None:
    """A text that is no name lists the GPUs that have it in name, title or vendor."""
    result = prism_plan("gpus", "A100", "--format", "csv")
    assert result.returncode == 0
    names = [row["name"] for row in csv.DictReader(io.StringIO(result.stdout))]
    assert names == ["a100-80gb-sxm", "a100-80gb-pcie", "a100-40gb"]
    found = json.loads(prism_plan("gpus", "apple", "--json").stdout)
    assert {gpu["vendor"] for gpu in found} == {"Apple"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ("rtx-4099",),
            "'rtx-4099'; expected a GPU of the table, did you mean 'rtx-4090'?; prism-plan gpus "
            "lists them",
        ),
        (("",), "''; expected a GPU of the table; prism-plan gpus lists them"),
        (
            ("\x1b[31mred", "--json"),
            r"'\x1b[31mred'; expected a GPU of the table; prism-plan gpus lists them",
        ),
        (("t4", "--json", "--format", "csv"), "--format: has no effect with --json; leave it out"),
    ],
    ids=["unknown", "empty", "controls", "no-effect"],
)
def test_bad_input_is_one_line(prism_plan: Run, args: tuple[str, ...], line: str) -> None:
    """What is wrong is told in one line on standard error, with exit code 2 and no output."""
    result = prism_plan("gpus", *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"prism-plan: {line}\n"


def test_shells_complete_names() -> None:
    """Names that begin with what was typed are offered."""
    assert completions("prism-plan gpus rtx-409") == [("plain", "rtx-4090")]


def test_check_prints_the_names(prism_plan: Run, tmp_path: Path) -> None:
    """The memory of every GPU has a column of names where the cluster file gives one."""
    file = tmp_path / "c.toml"
    args = ("check", "c.toml", "--model", "deepseek-v2-lite")
    file.write_text(MEMORY_CLUSTER.replace("{gpu}", 'gpu = "rtx-4090"'))
    rows = json.loads(prism_plan(*args, "--json", cwd=tmp_path).stdout)[0]["memory"]
    assert [row.get("name") for row in rows] == ["rtx-4090", None]
    assert rows[0]["usable_bytes"] == 24 * 2**30
    text = prism_plan(*args, cwd=tmp_path).stdout
    assert "its name" in text
    assert "gpu[0]   rtx-4090" in text
    file.write_text(MEMORY_CLUSTER.replace("{gpu}", "memory_gib = 24"))
    unnamed = json.loads(prism_plan(*args, "--json", cwd=tmp_path).stdout)[0]["memory"]
    del rows[0]["name"]
    assert unnamed == rows
    assert "its name" not in prism_plan(*args, cwd=tmp_path).stdout


def test_an_unknown_gpu_stops_a_command(prism_plan: Run, tmp_path: Path) -> None:
    """A cluster file with an unknown GPU is one line with exit code 2, as any bad file."""
    (tmp_path / "c.toml").write_text(MEMORY_CLUSTER.replace("{gpu}", 'gpu = "RTX 4090"'))
    result = prism_plan("check", "c.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("prism-plan: c.toml: server[0].gpu[0].gpu: 'RTX 4090'; ")
    assert "did you mean 'rtx-4090'?" in result.stderr
    assert result.stderr.count("\n") == 1
