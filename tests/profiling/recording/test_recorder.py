"""Recording through hooks: the right experts, of every token once, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from prism_plan.io.trace_reader import read_trace  # noqa: E402
from prism_plan.profiling.recording.decoder_cache import cache_argument  # noqa: E402
from prism_plan.profiling.recording.recorder import record  # noqa: E402
from prism_plan.sizes.loaded_model import spec_from_loaded_model  # noqa: E402
from tests.profiling.recording.families import FAMILIES, VOCABULARY, tiny_model  # noqa: E402
from tests.profiling.recording.witness import DECODE, PREFILL, prompts, recorded  # noqa: E402

#: What models call the cache that they are given: renamed in transformers 5.24.
CACHE = cache_argument(transformers.MixtralForCausalLM)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of each family."""
    return tiny_model(request.param)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Forward passes as in serving."""
    with torch.inference_mode():
        yield


class Routers:
    """An independent witness: the router logits of every pass, and the top-k taken from them."""

    def __init__(self, model: Any) -> None:
        self.passes: list[list[Any]] = []
        self.family = model.config.model_type
        self.handles = []
        for _, module in model.named_modules():
            if type(module).__name__.lower().endswith("router"):
                self.handles.append(module.register_forward_hook(self._hook))
        decoder = model.get_decoder()
        self.handles.append(decoder.register_forward_pre_hook(lambda *_: self.passes.append([])))

    def _hook(self, module: Any, args: Any, output: Any) -> None:
        logits = output[0].reshape(-1, output[0].shape[-1])
        scores = logits.float()
        if self.family == "deepseek_v3":
            scores = scores.sigmoid() + module.e_score_correction_bias
        best = torch.topk(scores, module.top_k, dim=-1).indices
        self.passes[-1].append(best.sort(dim=-1).values.numpy())

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_equals_the_routers(model: Any, tmp_path: Path, batch: int, side: str) -> None:
    """One pass over padded prompts: the experts are the top-k of the model's own router logits."""
    ids, mask = prompts(batch, side)
    witness = Routers(model)
    with record(model, tmp_path / "t.parquet"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    witness.remove()
    layers = np.stack(witness.passes[0], axis=1).reshape(
        batch, ids.shape[1], -1, spec_from_loaded_model(model).top_k
    )
    wanted = {}
    for row in range(batch):
        real = np.flatnonzero(mask[row].numpy())
        for position, column in enumerate(real):
            wanted[row, position] = (PREFILL, layers[row, column].tolist())
    assert recorded(tmp_path / "t.parquet") == wanted


def test_cache_equals_teacher_forcing(model: Any, tmp_path: Path) -> None:
    """In float32, generation with the cache gives the trace of one pass over prompt and output.

    The last token of the output is never fed, so it is not in either trace.
    """
    ids, mask = prompts(4)
    with record(model, tmp_path / "cache.parquet"):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
        )
    with record(model, tmp_path / "forced.parquet"):
        for row in range(len(ids)):
            whole = output[row, ids.shape[1] - int(mask[row].sum()) : -1][None]
            model(input_ids=whole, use_cache=False)
    cached = recorded(tmp_path / "cache.parquet")
    forced = recorded(tmp_path / "forced.parquet")
    assert {key: experts for key, (_, experts) in cached.items()} == {
        key: experts for key, (_, experts) in forced.items()
    }


def test_output_is_the_same_to_the_bit(model: Any, tmp_path: Path) -> None:
    """Logits and generated tokens do not change by recording, also with gate weights."""
    ids, mask = prompts(8)
    plain = model(input_ids=ids, attention_mask=mask).logits
    words = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with record(model, tmp_path / "t.parquet", weights=True):
        recorded = model(input_ids=ids, attention_mask=mask).logits
        again = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False
        )
    assert torch.equal(plain, recorded)
    assert torch.equal(words, again)


def test_hooks_are_gone_afterwards(model: Any, tmp_path: Path) -> None:
    """After the block, and after a failure in it, the model carries no hook of ours."""
    ids, mask = prompts(1)
    with record(model, tmp_path / "t.parquet"):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(RuntimeError, match="stop"), record(model, tmp_path / "u.parquet"):
        raise RuntimeError("stop")
    assert not (tmp_path / "u.parquet").exists()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_gate_weights(tmp_path: Path) -> None:
    """Weights stand beside the experts they are of: Mixtral's are the renormalised softmax."""
    model = tiny_model("mixtral")
    ids, mask = prompts(2)
    seen = []
    gates = [m for m in model.modules() if type(m).__name__ == "MixtralTopKRouter"]
    handles = [gate.register_forward_hook(lambda m, a, o: seen.append(o[0])) for gate in gates]
    with record(model, tmp_path / "t.parquet", weights=True):
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    trace = read_trace(tmp_path / "t.parquet")
    assert trace.batches is not None
    batch = next(trace.batches())
    assert batch.weights is not None
    flat = mask.bool().reshape(-1)
    for layer, logits in enumerate(seen):
        p = torch.softmax(logits[flat].double(), dim=-1).numpy()
        chosen = np.take_along_axis(p, batch.experts[:, layer].astype(np.int64), axis=1)
        wanted = chosen / chosen.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(batch.weights[:, layer], wanted, atol=1e-3)


def test_ended_sequences_are_not_fed_on(tmp_path: Path) -> None:
    """A sequence that ends early in a batch is recorded as if it had run alone."""
    model = tiny_model("mixtral", seed=3)
    ids, mask = prompts(6, seed=5)
    free = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[
        :, ids.shape[1] :
    ]
    model.generation_config.eos_token_id = int(free[0, 2])  # the first ends at its third token
    with record(model, tmp_path / "batch.parquet"):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False
        )[:, ids.shape[1] :]
    fed = {}
    for row in range(len(ids)):
        new = output[row].tolist()
        end = (
            new.index(model.generation_config.eos_token_id)
            if (model.generation_config.eos_token_id in new)
            else 7
        )
        fed[row] = int(mask[row].sum()) + end
    assert fed[0] < int(mask[0].sum()) + 7
    found = recorded(tmp_path / "batch.parquet")
    assert {row: sum(1 for r, _ in found if r == row) for row in range(len(ids))} == fed


def test_labels_and_requests(tmp_path: Path) -> None:
    """Every pass without a cache begins new requests; labels are one for all or one each."""
    model = tiny_model("olmoe")
    with record(model, tmp_path / "t.parquet", task="first") as recorder:
        ids, mask = prompts(2)
        model(input_ids=ids, attention_mask=mask)
        recorder.label(["x", "y", "x"])
        ids, mask = prompts(3)
        model(input_ids=ids, attention_mask=mask)
    trace = read_trace(tmp_path / "t.parquet")
    assert dict(zip(trace.tasks, trace.requests, strict=True)) == {"first": 2, "x": 2, "y": 1}
    assert trace.model.name == "olmoe"
    assert trace.model.moe_layers == (0, 1, 2)


def test_no_mask_is_no_padding(tmp_path: Path) -> None:
    """Without an attention mask every token is real."""
    model = tiny_model("mixtral")
    with record(model, tmp_path / "t.parquet"):
        model(input_ids=torch.randint(3, VOCABULARY, (2, 5)))
    assert read_trace(tmp_path / "t.parquet").tokens.tolist() == [10]


def test_many_steps_are_flushed_as_they_come(tmp_path: Path) -> None:
    """Long recordings are handed on in parts; nothing is lost between them."""
    model = tiny_model("mixtral")
    ids = torch.randint(3, VOCABULARY, (8, 100))
    with record(model, tmp_path / "t.parquet") as recorder:
        for _ in range(12):
            model(input_ids=ids, use_cache=False)
        assert recorder.tokens > 0  # some before the end
    assert int(read_trace(tmp_path / "t.parquet").tokens.sum()) == 12 * 800


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    """A dense model, an empty block and wrong labels are one-line errors, and leave no file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config)
    path = tmp_path / "t.parquet"
    with pytest.raises(InputError, match="has no MoE layers"), record(dense, path):
        pass
    model = tiny_model("mixtral")
    with pytest.raises(InputError, match="nothing was recorded"), record(model, path):
        pass
    with pytest.raises(InputError, match="2 labels for 1 sequences"), record(model, path) as r:
        r.label(["a", "b"])
        model(input_ids=torch.ones((1, 3), dtype=torch.long))
    assert not path.exists()


def refused(model: Any, path: Path, run: Any, words: str) -> None:
    """The passes of ``run`` are refused while they are recorded, and no file is left."""
    with pytest.raises(InputError, match=words), record(model, path):
        run()
    assert not path.exists()


def test_passes_that_would_give_wrong_rows_are_refused(tmp_path: Path) -> None:
    """No cache, a cut cache, a foreign cache, interleaved caches, speculation: errors, no trace."""
    model = tiny_model("mixtral")
    ids, mask = prompts(2)
    one = ids[1:2]
    path = tmp_path / "t.parquet"

    def without_cache() -> None:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, use_cache=False)

    def cut() -> None:
        cache = model(input_ids=one, use_cache=True)[CACHE]
        cache.crop(-2)
        model(input_ids=one[:, :2], **{CACHE: cache})

    foreign = model(input_ids=one[:, :3], use_cache=True)[CACHE]

    def elsewhere() -> None:
        model(input_ids=one, use_cache=True)
        model(input_ids=one[:, :1], **{CACHE: foreign})

    def interleaved() -> None:
        first = model(input_ids=one, use_cache=True)[CACHE]
        second = model(input_ids=one + 1, use_cache=True)[CACHE]
        model(input_ids=one[:, :1], **{CACHE: second})
        model(input_ids=one[:, :1], **{CACHE: first})

    def speculation() -> None:
        repeated = torch.tensor([[5, 6, 7] * 6])  # so that a continuation is guessed, and wrong
        model.generate(input_ids=repeated, max_new_tokens=12, prompt_lookup_num_tokens=3)

    refused(model, path, without_cache, "fed again with one more token")
    for run in (cut, elsewhere, interleaved, speculation):
        refused(model, path, run, "where .* were recorded last")
    assert list(tmp_path.iterdir()) == []


def test_positional_cache(tmp_path: Path) -> None:
    """A cache given by position is a cache like any other."""
    model = tiny_model("mixtral")
    ids, _ = prompts(1)
    with record(model, tmp_path / "t.parquet"):
        cache = model.model(ids, use_cache=True)[CACHE]
        model.model(ids[:, :1], None, None, cache)
    found = recorded(tmp_path / "t.parquet")
    assert sorted(found) == [(0, position) for position in range(ids.shape[1] + 1)]
    assert found[0, ids.shape[1]][0] == DECODE


def test_another_turn(tmp_path: Path) -> None:
    """A conversation that ended goes on when it is fed more than one token again."""
    model = tiny_model("mixtral")
    with record(model, tmp_path / "t.parquet", end_tokens=[2]):
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)[CACHE]
        for token in (8, 2, 9):  # the last two are fed after the end
            model(input_ids=torch.tensor([[token]]), **{CACHE: cache})
        model(input_ids=torch.tensor([[10, 11]]), **{CACHE: cache})
    phases = [phase for _, (phase, _) in sorted(recorded(tmp_path / "t.parquet").items())]
    assert phases == [PREFILL] * 3 + [DECODE] + [PREFILL] * 2


@pytest.mark.parametrize("label", ["", " ", None, [1, 2], [], ["a", ""]])
def test_labels_are_names(tmp_path: Path, label: Any) -> None:
    """What no trace could hold as a task is refused when it is given."""
    model = tiny_model("mixtral")
    with (
        pytest.raises(InputError, match="label"),
        record(model, tmp_path / "t.parquet") as recorder,
    ):
        recorder.label(label)


def test_decode_passes_without_a_known_cache_are_refused(tmp_path: Path) -> None:
    """A cache under a name that is not known would make every decoded token a request: refused."""
    model = tiny_model(FAMILIES[0])
    ids = torch.tensor([[5, 6, 7]])
    with record(model, tmp_path / "t.parquet"):
        model.model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2]]))
        with pytest.raises(InputError, match="tokens from position 3 on without a cache"):
            model.model(input_ids=ids[:, :1], position_ids=torch.tensor([[3]]))
