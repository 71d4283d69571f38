"""Sizes of checkpoints on the Hub: headers alone, from the cache or the network, and failures."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

from prism_plan.errors import InputError  # noqa: E402
from prism_plan.sizes.load import load_model_spec  # noqa: E402
from prism_plan.sizes.safetensors_headers import read_header  # noqa: E402

TINY = Path(__file__).parents[2] / "traces" / "tiny-mixtral"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


def test_headers_from_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's client tells of each file gives the sizes that the folder has."""
    folder = shutil.copytree(TINY, tmp_path / "moe-a")
    tensors = {
        name: SimpleNamespace(
            dtype=one.dtype, shape=list(one.shape), data_offsets=(8, 8 + one.num_bytes)
        )
        for name, one in read_header(folder / "model.safetensors").items()
    }
    stored = SimpleNamespace(
        weight_map=dict.fromkeys(tensors, "model.safetensors"),
        files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)},
    )
    asked = []

    def metadata(repository: str) -> Any:
        asked.append(repository)
        return stored

    monkeypatch.setattr(hub, "hf_hub_download", lambda _, name: str(folder / name))
    monkeypatch.setattr(hub, "get_safetensors_metadata", metadata)
    assert load_model_spec("acme/moe-a") == load_model_spec(folder)
    assert asked == ["acme/moe-a"]


FAILURES: dict[str, tuple[Any, str]] = {
    "no safetensors": (
        errors.NotASafetensorsRepoError("x"),
        "has no safetensors files; give a",
    ),
    "no network": (OSError("Name or service not known"), "from the hub (Name or service"),
    "a damaged header": (errors.SafetensorsParsingError("x"), "from the hub (x)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client raises, the line names the repository, the reason and a remedy."""
    error, words = FAILURES[case]

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", lambda _, name: str(TINY / name))
    monkeypatch.setattr(hub, "get_safetensors_metadata", fail)
    with pytest.raises(InputError) as caught:
        load_model_spec("acme/moe-a")
    assert str(caught.value).startswith("acme/moe-a: ")
    assert words in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["nosuch/", "a b/c", "m/-x", "a/b..", "a/" + "x" * 100])
def test_names_that_no_repository_has(name: str) -> None:
    """A path that does not exist may look like a hub id; it is refused in one line."""
    with pytest.raises(InputError, match="no such folder, and no checkpoint of that name"):
        load_model_spec(name)


def test_offline() -> None:
    """Without a network and without the checkpoint in the cache there is a line, no traceback."""
    with pytest.raises(InputError, match="acme/moe-a: no such folder, and no checkpoint"):
        load_model_spec("acme/moe-a")
