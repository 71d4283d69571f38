"""Undocumented parts of torch and transformers that prism_plan uses: as read, and in one module."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import prism_plan
from prism_plan import torch_private

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PACKAGE = Path(prism_plan.__file__).parent
#: Private names of Python's own classes: named tuples, and what leaves a process at once.
OF_PYTHON = {"_asdict", "_exit", "_fields", "_replace"}
CHANGED = "changed since prism_plan/torch_private.py was written: read it anew"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # which torch.compile gives itself
def test_compiled_modules_are_known() -> None:
    """Both ways to compile a module leave their mark; a plain module has none."""
    plain, compiled = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    compiled.compile()
    assert not torch_private.is_compiled(plain)
    assert torch_private.is_compiled(compiled), f"torch: Module.compile has {CHANGED}"
    assert torch_private.is_compiled(torch.compile(plain)), f"torch: torch.compile has {CHANGED}"


def test_transformers_marks_experts_that_it_spreads() -> None:
    """The mark of expert parallelism is set where transformers applies its plan."""
    import transformers.distributed.expert_parallel as source

    assert "_is_expert_parallel" in inspect.getsource(source), f"transformers has {CHANGED}"


def test_a_model_is_made_from_its_configuration() -> None:
    """A class makes a model of the type asked for; the config says where it was loaded from."""
    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=16, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = torch_private.model_from_config(
            transformers.MixtralForCausalLM, config, torch.bfloat16
        )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert hasattr(model.config, "_name_or_path"), f"transformers: the config has {CHANGED}"
    assert not torch_private.loaded_from(model.config)


def test_special_floats_are_decoded() -> None:
    """Infinity as transformers writes it into a file is the number again."""
    config = transformers.MixtralConfig(rope_theta=float("inf"))
    values = torch_private.decode_special_floats(
        transformers.MixtralConfig, {"a": {"__float__": "Infinity"}, "b": 1}
    )
    assert values == {"a": float("inf"), "b": 1}, f"transformers has {CHANGED}"
    assert "__float__" in config.to_json_string(use_diff=False), f"transformers has {CHANGED}"


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "torch_private.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_other_module_uses_private_names(path: Path) -> None:
    """Attributes with a leading underscore are a module's own, or of Python's classes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            dunder = node.attr.startswith("__")
            assert own or dunder or node.attr in OF_PYTHON, f"line {node.lineno}: {node.attr}"
