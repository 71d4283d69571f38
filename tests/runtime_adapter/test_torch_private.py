"""Undocumented parts of torch and transformers: they are as they were read, and in one module."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

import runtime_adapter  # noqa: E402
from runtime_adapter.torch_private import init_buffers, set_tensor  # noqa: E402

PACKAGE = Path(runtime_adapter.__file__).parent
#: Private names of Python itself that modules may use.
OF_PYTHON = {"_exit", "_run_finalizers"}
CHANGED = "changed since runtime_adapter/torch_private.py was written: read it anew"


def test_the_options_of_a_gloo_group() -> None:
    """They hold devices, the number of threads and the timeout; a group takes them."""
    options = dist.ProcessGroupGloo._Options()
    for name in ("_devices", "_threads", "_timeout"):
        assert hasattr(options, name), f"torch: ProcessGroupGloo._Options.{name} has {CHANGED}"
    device = dist.ProcessGroupGloo.create_device(interface="lo")
    options._devices, options._threads = [device], 1
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, options)
    for name in ("send", "recv", "abort"):
        assert callable(getattr(group, name)), f"torch: ProcessGroupGloo.{name} has {CHANGED}"


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch is built without NCCL")
def test_the_options_of_an_nccl_group() -> None:
    """They hold the timeout."""
    options = dist.ProcessGroupNCCL.Options()
    assert hasattr(options, "_timeout"), f"torch: ProcessGroupNCCL.Options has {CHANGED}"


def test_a_store_may_be_given_its_listener() -> None:
    """TCPStore takes a socket that listens already."""
    assert "master_listen_fd" in (dist.TCPStore.__init__.__doc__ or ""), f"TCPStore has {CHANGED}"


def test_the_tables_of_a_module() -> None:
    """Parameters and buffers, also those on the meta device, are replaced in their tables."""
    module = torch.nn.Module()
    with torch.device("meta"):
        module.register_parameter("weight", torch.nn.Parameter(torch.empty(2)))
        module.register_buffer("stored", torch.empty(2))
        module.register_buffer("computed", torch.empty(2), persistent=False)
    assert module._non_persistent_buffers_set == {"computed"}, f"torch: Module has {CHANGED}"
    for name in ("weight", "stored"):
        set_tensor(module, name, torch.ones(2))
        assert getattr(module, name).tolist() == [1, 1], f"torch: Module has {CHANGED}"
        assert getattr(module, name)._is_hf_initialized
    assert isinstance(module.weight, torch.nn.Parameter)
    module._init_weights = lambda one: one._buffers["computed"].fill_(3)
    init_buffers(module, torch.device("cpu"))
    assert module.computed.tolist() == [3, 3]


def test_what_a_model_of_transformers_has() -> None:
    """The initialisation of its modules, and the stored tensors that it ignores."""
    transformers = pytest.importorskip("transformers")
    model = transformers.PreTrainedModel
    assert list(inspect.signature(model._init_weights).parameters)[:2] == ["self", "module"], (
        f"transformers: PreTrainedModel._init_weights has {CHANGED}"
    )
    assert hasattr(model, "_keys_to_ignore_on_load_unexpected"), (
        f"transformers: PreTrainedModel has {CHANGED}"
    )
    for part, name in (
        ("transformers.initialization", "_is_hf_initialized"),
        ("transformers.generation.configuration_utils", "_from_model_config"),
    ):
        assert name in inspect.getsource(importlib.import_module(part)), (
            f"transformers: {name} has {CHANGED}"
        )


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "torch_private.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_other_module_uses_private_names(path: Path) -> None:
    """Attributes with a leading underscore are a module's own, but for two of Python."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            dunder = node.attr.startswith("__")
            assert own or dunder or node.attr in OF_PYTHON, f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.keyword):
            assert not (node.arg or "").startswith("_"), f"line {node.value.lineno}: {node.arg}"
