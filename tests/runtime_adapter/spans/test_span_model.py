"""Layers that are executed apart compute what the whole model computes, to the last bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from runtime_adapter.spans.span_model import SpanModel  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from tests.profiling.recording.families import VOCABULARY, family_model, tiny_model  # noqa: E402

#: Beside those that the runtime loads: sliding windows, biases, shared and dense layers.
OTHERS = ("granitemoe", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "phimoe")
torch.set_num_threads(1)
#: Steps of one request: a prompt in two chunks, and four tokens one by one.
STEPS = (13, 5, 1, 1, 1, 1)


def whole(model: Any, ids: Any) -> list[Any]:
    """The logits of the last token of each step, by the model itself."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    logits = []
    for step in torch.split(ids, STEPS):
        output = model(input_ids=step[None], cache=cache, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[0, -1].float())
    return logits


def apart(model: Any, cuts: tuple[int, ...], ids: Any) -> list[Any]:
    """The same of spans that begin at layer 0 and at the cuts."""
    parts = SpanModel(model)
    ends = (0, *cuts, len(model.get_decoder().layers))
    spans = [parts.span(first, end - 1) for first, end in itertools.pairwise(ends)]
    caches = [span.new_cache() for span in spans]
    logits, past = [], 0
    for step in torch.split(ids, STEPS):
        states = step
        for span, cache in zip(spans, caches, strict=True):
            states = span.run(states, cache, past)
        logits.append(states)
        past += len(step)
    return logits


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "sdpa") for family in (*FAMILIES, *OTHERS)),
        *((family, "eager") for family in ("mixtral", "deepseek_v2", "gpt_oss")),
    ],
)
def test_every_cut(family: str, attention: str) -> None:
    """Logits equal the whole model's bit by bit, wherever it is cut, and in one span."""
    model = tiny_model(family) if family in FAMILIES else family_model(family)
    model.set_attn_implementation(attention)
    layers = len(model.get_decoder().layers)
    ids = torch.randint(3, VOCABULARY, (sum(STEPS),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole(model, ids)
    every_cut = [(cut,) for cut in range(1, layers)]
    for cuts in [(), *every_cut, tuple(range(1, layers))]:
        for found, wanted in zip(apart(model, cuts, ids), expected, strict=True):
            assert torch.equal(found, wanted), cuts


def test_the_model_stays_as_it_was() -> None:
    """Spans share its tensors, and change neither its layers nor its configuration."""
    model = tiny_model("deepseek_v2")
    layers, config = list(model.get_decoder().layers), model.config.to_dict()
    span = SpanModel(model).span(1, 2)
    span.run(torch.zeros(3, model.config.hidden_size), span.new_cache(), 0)
    assert list(model.get_decoder().layers) == layers
    assert model.config.to_dict() == config
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in span._module.parameters()} <= shared


def test_a_step_that_does_not_follow() -> None:
    """A step after another number of tokens than are cached is refused, and changes nothing."""
    model = tiny_model("mixtral")
    span = SpanModel(model).span(0, 1)
    cache = span.new_cache()
    ids = torch.arange(3, 9)
    first = span.run(ids, cache, 0)
    for past in (0, 5, 7):
        with pytest.raises(ValueError, match="a cache of 6 tokens"):
            span.run(ids, cache, past)
    again = span.new_cache()
    assert torch.equal(span.run(ids, again, 0), first)
    assert torch.equal(span.run(ids, again, 6), span.run(ids, cache, 6))


@pytest.mark.parametrize(
    ("family", "kept"),
    [("qwen3_next", "linear_attention"), ("minimax", "linear"), ("lfm2_moe", "conv")],
)
def test_models_that_keep_something_else(family: str, kept: str) -> None:
    """Models whose layers keep states are refused by name, with what they keep."""
    model = family_model(family)
    with pytest.raises(InputError, match=f"{type(model).__name__}: its layers keep .*{kept}"):
        SpanModel(model)
