"""The notebooks run from top to bottom, and are committed without what running them leaves."""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.limits import HANG_S

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
#: Those that look for real routing data, and do with a committed trace where there is none.
WITH_REAL_DATA = [path for path in NOTEBOOKS if path.stem.startswith(("2-", "3-"))]

nbformat = pytest.importorskip("nbformat", reason="the extra `dev` is not installed")
pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
pytest.importorskip("ipykernel", reason="the extra `dev` is not installed")


@pytest.fixture(autouse=True)
def own_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python3` is the Python that runs the tests, whatever kernels the user has installed."""
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(str(tmp_path / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def execute(path: Path, folder: Path) -> Any:
    """The notebook with its outputs, run in ``folder``; a cell that fails raises.

    The file stays as it is.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        nbformat.read(path, as_version=4),
        kernel_name="python3",
        timeout=HANG_S,
        resources={"metadata": {"path": str(folder)}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the machinery on this side of the kernel
        executed = client.execute()
        del client
        gc.collect()  # its sockets complain when they are collected, so here
    return executed


def check(executed: Any) -> None:
    """Every code cell ran in order, and at least one figure is shown as an image."""
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_four() -> None:
    """Quick start, comparing solvers, migration, joint plans: in reading order."""
    assert NAMES == [
        "1-quick-start",
        "2-comparing-solvers",
        "3-migration-and-latency",
        "4-from-prism-to-a-joint-plan",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs_on_committed_traces(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without real routing data, and in any folder, it runs and leaves nothing behind."""
    monkeypatch.setenv("PRISM_TRACES", str(tmp_path / "none"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = sorted(path.parent.rglob("*"))
    executed = execute(path, elsewhere)
    check(executed)
    assert not list(elsewhere.iterdir())
    assert sorted(path.parent.rglob("*")) == before
    if path in WITH_REAL_DATA:
        assert "NOT found" in printed(executed)


@pytest.mark.traces
@pytest.mark.long
@pytest.mark.parametrize("path", WITH_REAL_DATA, ids=[path.stem for path in WITH_REAL_DATA])
def test_runs_on_real_traces(path: Path, traces_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real routing data, and in its own folder, it runs on that, and says so."""
    monkeypatch.setenv("PRISM_TRACES", str(traces_dir.resolve()))
    executed = execute(path, path.parent)
    check(executed)
    assert "real routing data of" in printed(executed)


def printed(executed: Any) -> str:
    """What all cells printed."""
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_stripped(path: Path) -> None:
    """No outputs, no execution counts, nothing of one machine in the metadata; a valid file."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_readable_on_its_own(path: Path) -> None:
    """It begins with a title and the question, and no cell of code is long."""
    first, *others = nbformat.read(path, as_version=4).cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "**The question.**" in first.source
    for cell in others:
        assert len(cell.source.splitlines()) <= 60


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_finds_the_repository_or_says_how(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are found from any folder of a clone, and from any where it is installed from one.

    Where neither holds, the error says what to do.
    """
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    source = next(source for source in sources if "REPOSITORY = " in source)
    lines = source[source.index("# The repository") :].splitlines()
    search = "\n".join(lines[: lines.index("    )") + 1])
    clone = tmp_path / "clone"
    (clone / "traces").mkdir(parents=True)
    (clone / "traces" / "tiny-deepseek-v2.parquet").touch()
    (clone / "notebooks" / "mine").mkdir(parents=True)
    elsewhere = str(tmp_path / "site-packages" / "prism_plan" / "__init__.py")
    installed = str(clone / "prism_plan" / "__init__.py")
    for folder, package in ((clone / "notebooks" / "mine", elsewhere), (tmp_path, installed)):
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {"Path": Path, "pp": SimpleNamespace(__file__=package)}
        exec(search, names)
        assert names["REPOSITORY"] == clone
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="start Jupyter in a clone of the repository"):
        exec(search, {"Path": Path, "pp": SimpleNamespace(__file__=elsewhere)})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_no_absolute_paths(path: Path) -> None:
    """Code finds its files on any machine."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not re.search(r"""["'](/|~|\\\\|[A-Za-z]:[/\\])""", cell.source)
            assert "expanduser" not in cell.source
            assert "Path.home" not in cell.source
