"""States in which recorded rows could be wrong, and specs of other models: one line, no file."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from prism_plan.io.trace_reader import read_trace  # noqa: E402
from prism_plan.profiling.recording.decoder_cache import cache_argument  # noqa: E402
from prism_plan.profiling.recording.expert_modules import find_experts  # noqa: E402
from prism_plan.profiling.recording.recorder import record  # noqa: E402
from prism_plan.profiling.recording.transformers_release import require_transformers  # noqa: E402
from tests.profiling.recording.families import OVERRIDES, family_model  # noqa: E402
from tests.profiling.recording.witness import prompts, recorded, spec_for  # noqa: E402

CACHE = cache_argument(transformers.MixtralForCausalLM)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Forward passes as in serving."""
    with torch.inference_mode():
        yield


@pytest.fixture
def mixtral() -> Any:
    """A tiny model with MoE layers 0..3, top-2 of 8 experts."""
    return family_model("mixtral")


def refusal(model: Any, path: Path, run: Callable[[], Any], spec: Any = None) -> str:
    """The line with which ``run`` is refused while it is recorded; no file is left."""
    with (
        pytest.raises(InputError) as caught,
        record(model, path, spec=spec or spec_for("m", model)),
    ):
        run()
    assert not path.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_layers": (1, 2, 3)}, "moe_layers: the spec has MoE layers 1..3; expected 0..3"),
        (
            {"moe_layers": (0, 1, 2, 3, 4), "num_decoder_layers": 5},
            "the spec has MoE layers 0..4; expected 0..3",
        ),
        ({"num_experts": 9}, "num_experts: the spec has 9 experts in layer 0; expected 8"),
        ({"top_k": 3}, "top_k: the spec has 3 experts a token; expected 2"),
    ],
)
def test_a_spec_of_another_model(
    mixtral: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """Layers, experts and top-k of a spec are compared with the model's; both values are named."""
    spec = dataclasses.replace(spec_for("sizes", mixtral), **change)
    ids, mask = prompts(2)
    message = refusal(
        mixtral, tmp_path / "t.parquet", lambda: mixtral(ids, attention_mask=mask), spec
    )
    assert message.startswith("sizes: ")
    assert words in message


def test_a_spec_from_a_file(mixtral: Any, tmp_path: Path) -> None:
    """A JSON file of a spec gives the sizes; `name` still says what the model is called."""
    spec = dataclasses.replace(spec_for("sizes", mixtral), expert_bytes=(10, 20, 30, 40))
    (tmp_path / "sizes.json").write_text(json.dumps(spec.to_json()))
    ids, mask = prompts(2)
    with record(mixtral, tmp_path / "t.parquet", spec=tmp_path / "sizes.json", name="mine"):
        mixtral(ids, attention_mask=mask)
    assert read_trace(tmp_path / "t.parquet").model == dataclasses.replace(spec, name="mine")
    words = refusal(mixtral, tmp_path / "u.parquet", lambda: None, "mixtral-8x7b")
    assert "mixtral-8x7b: moe_layers: the spec has MoE layers 0..31; expected 0..3" in words


# ------------------------------------------------------------------------------------------ caches


def test_a_cache_of_linear_attention_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """It does not tell how many tokens it holds, so a decode step could be taken for a request."""
    monkeypatch.delitem(OVERRIDES, "granitemoehybrid")  # then no layer has attention
    model = family_model("granitemoehybrid")
    ids, mask = prompts(2)
    words = refusal(
        model,
        tmp_path / "t.parquet",
        lambda: model.generate(ids, attention_mask=mask, max_new_tokens=3),
    )
    assert "a cache (DynamicCache) that does not tell how many tokens it holds" in words


@pytest.mark.parametrize("told", [0, 3, 99])
def test_a_cache_that_does_not_tell_its_length(mixtral: Any, tmp_path: Path, told: int) -> None:
    """After a pass of S new tokens it must be S longer, whatever its class."""

    class Ring(transformers.DynamicCache):  # type: ignore[misc]
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return told if super().get_seq_length(layer_idx) else 0

    ids, mask = prompts(2)
    words = refusal(
        mixtral,
        tmp_path / "t.parquet",
        lambda: mixtral.generate(ids, attention_mask=mask, max_new_tokens=3, **{CACHE: Ring()}),
    )
    assert f"a cache (Ring) that tells {told} tokens; expected {ids.shape[1]}" in words


def test_no_cache_of_transformers(mixtral: Any, tmp_path: Path) -> None:
    """Tuples of keys and values, the caches of older releases, are not guessed at."""
    words = refusal(
        mixtral,
        tmp_path / "t.parquet",
        lambda: mixtral.model(torch.tensor([[5]]), **{CACHE: ((1, 2),)}),
    )
    assert "a cache (tuple) that does not tell" in words


def test_a_static_cache(mixtral: Any, tmp_path: Path) -> None:
    """`generate` replaces the mask that tells padding by one of attention."""
    ids, mask = prompts(2)
    words = refusal(
        mixtral,
        tmp_path / "t.parquet",
        lambda: mixtral.generate(
            ids, attention_mask=mask, max_new_tokens=3, cache_implementation="static"
        ),
    )
    assert "an attention mask that is not [sequences, tokens]" in words


def test_a_sliding_cache_beyond_its_window(tmp_path: Path) -> None:
    """A cache that forgets tokens still tells how many there were: each is recorded once."""
    model = family_model("gpt_oss")
    window = model.config.sliding_window
    ids = torch.randint(3, 90, (2, window - 2))
    with record(model, tmp_path / "t.parquet", spec=spec_for("m", model), end_tokens=()):
        model.generate(ids, max_new_tokens=8, do_sample=False)
    rows = recorded(tmp_path / "t.parquet")
    assert sorted(rows) == [(r, p) for r in range(2) for p in range(window - 2 + 7)]


# ------------------------------------------------------------------------------------------ models


def test_experts_outside_of_the_decoder_layers(mixtral: Any, tmp_path: Path) -> None:
    """Layers for multi-token prediction have experts too; they are not layers of the decoder."""
    before = {layer: found.name for layer, found in find_experts(mixtral).items()}
    mixtral.model.mtp = torch.nn.ModuleList([copy.deepcopy(mixtral.model.layers[0])])
    assert {layer: found.name for layer, found in find_experts(mixtral).items()} == before
    mixtral.config.num_hidden_layers = 9
    with pytest.raises(InputError, match="several lists of layers: layers, mtp"):
        find_experts(mixtral)


def test_experts_that_are_not_called_with_all_tokens(mixtral: Any, tmp_path: Path) -> None:
    """A layer that calls its experts in chunks, twice or with fewer tokens is refused."""
    block = mixtral.model.layers[1].mlp
    original = type(block).forward
    ids, mask = prompts(2)

    def chunked(hidden: Any) -> Any:
        return torch.cat([original(block, part) for part in hidden.split(1)])

    def fewer(hidden: Any) -> Any:
        return torch.cat([original(block, hidden[:, :1]), hidden[:, 1:]], dim=1)

    for forward, words in (
        (chunked, "[20, 2], all tokens"),
        (fewer, "ids of shape [2, 2]; expected [20, 2], all tokens"),
    ):
        block.forward = forward
        message = refusal(
            mixtral, tmp_path / "t.parquet", lambda: mixtral(ids, attention_mask=mask)
        )
        assert "layer 1" in message
        assert words in message.replace(str(mask.numel()), "20")


def test_expert_parallel_and_compiled_models(mixtral: Any, tmp_path: Path) -> None:
    """Sharded experts are numbered anew on each process; compiled modules may leave out hooks."""
    path = tmp_path / "t.parquet"
    mixtral.model.layers[0]._compiled_call_impl = print  # what Module.compile sets
    spec = spec_for("m", mixtral)
    assert "model.layers.0 is compiled" in refusal(mixtral, path, lambda: None, spec)
    mixtral.model.layers[0].mlp.experts._is_expert_parallel = True
    assert "experts are sharded over processes" in refusal(mixtral, path, lambda: None, spec)


def test_packed_sequences(mixtral: Any, tmp_path: Path) -> None:
    """Several sequences in one row would become one request; padding before a start would not."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    words = refusal(
        mixtral,
        tmp_path / "t.parquet",
        lambda: mixtral(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]])),
    )
    assert "positions start anew within a row" in words
    with record(mixtral, tmp_path / "t.parquet", spec=spec_for("m", mixtral)):
        mixtral(
            ids,
            attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
            position_ids=torch.tensor([[1, 1, 0, 1, 2]]),
        )
    assert sorted(recorded(tmp_path / "t.parquet")) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_releases_that_are_not_known(version: str, monkeypatch: Any) -> None:
    """Experts of 4 are not called with ids, of 6 nothing is known: both are refused."""
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(InputError, match=f"transformers: {version}; expected a release 5.x"):
        require_transformers()
