"""The committed tiny models, their tasks and their prompts hold what traces/TINY.md says."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pyfiglet")

TRACES = Path(__file__).resolve().parents[2] / "traces"
MODELS = ("mixtral", "deepseek-v2")
TASKS = ("arithmetic", "ascii-word", "narrative")
PROMPTS = TRACES / "tiny-prompts.jsonl"


def script(name: str) -> ModuleType:
    """A module that lies beside the traces, imported as its scripts import each other."""
    sys.path.insert(0, str(TRACES))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(TRACES))


tiny_tasks = script("tiny_tasks")
train_tiny = script("train_tiny")


def folder(model: str) -> Path:
    return TRACES / f"tiny-{model}"


@functools.cache
def loaded(model: str) -> tuple[Any, Any]:
    """Model and tokenizer of a committed checkpoint, loaded once."""
    return train_tiny.load(folder(model))


@functools.cache
def record(model: str) -> dict[str, Any]:
    return json.loads((folder(model) / "training.json").read_text(encoding="utf-8"))


def prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def repeatable() -> Iterator[None]:
    """One thread and exact orders of addition, undone afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    train_tiny.be_repeatable(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("model", MODELS)
def test_loads_without_remote_code(model: str) -> None:
    """A checkpoint holds no code, and the auto classes open it as the family it claims to be."""
    config = json.loads((folder(model) / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config
    assert not list(folder(model).glob("*.py"))
    network, tokenizer = loaded(model)
    family = {"mixtral": "MixtralForCausalLM", "deepseek-v2": "DeepseekV2ForCausalLM"}[model]
    assert type(network).__name__ == family
    assert network.num_parameters() == record(model)["parameters"]
    assert tokenizer.is_fast
    special = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert special == (network.config.pad_token_id, 1, 2)
    assert max(tokenizer.get_vocab().values()) < network.config.vocab_size


def test_shape_of_deepseek() -> None:
    """The DeepSeek-V2 has a dense first layer, shared experts, 32 routed experts, top-6."""
    config = loaded("deepseek-v2")[0].config
    assert (config.first_k_dense_replace, config.n_shared_experts) == (1, 2)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (32, 6)


def test_weights_are_small_and_bf16() -> None:
    """Both folders together take at most 6 MB, and every weight is stored in bf16."""
    from safetensors import safe_open

    files = [path for model in MODELS for path in folder(model).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    for model in MODELS:
        with safe_open(folder(model) / "model.safetensors", framework="pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds == {"BF16"}


@pytest.mark.parametrize("text", ["What is 37 + 48? 85", "  _|_\n |/ é \t x", " two  spaces , "])
def test_tokenizer_gives_text_back(text: str) -> None:
    """Any text survives the tokenizer, one token a byte after the token of the start."""
    tokenizer = loaded("mixtral")[1]
    ids = tokenizer.encode(text)
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_on_the_left() -> None:
    """A batch of prompts ends where the answers begin, so it can be generated from."""
    batch = loaded("mixtral")[1](["a", "abc"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("model", MODELS)
def test_held_out_loss(model: str) -> None:
    """Recomputed, held-out losses agree with training.json and are far below the unigrams'."""
    scores = train_tiny.scores(*loaded(model))
    written = record(model)["held_out_nats_per_token"]
    assert tuple(scores) == tuple(written) == TASKS
    for task in TASKS:
        assert scores[task] == pytest.approx(written[task], abs=0.02)
        assert scores[task]["loss"] < 0.5 * scores[task]["unigram_loss"]
        assert scores[task]["answer_loss"] < 0.6 * scores[task]["unigram_answer_loss"]


@pytest.mark.parametrize("model", MODELS)
def test_routing_depends_on_the_task(model: str) -> None:
    """Every expert is alive, usage is far from one expert, and tasks use different experts."""
    calls = train_tiny.expert_calls(*loaded(model))
    assert calls.shape == (3, 4, {"mixtral": 8, "deepseek-v2": 32}[model])
    assert (calls.sum(0) > 0).all()
    found = train_tiny.routing(calls)
    assert found["divergence"] > 0.05
    assert min(found["entropy_by_task"].values()) > 0.6 * train_tiny.np.log2(calls.shape[-1])


def test_routing_of_known_counts() -> None:
    """Two tasks on disjoint halves of 4 experts: 1 bit of entropy each, 1 bit of divergence."""
    calls = train_tiny.np.array([[[5, 5, 0, 0]], [[0, 0, 2, 2]], [[0, 0, 2, 2]]])
    found = train_tiny.routing(calls)
    assert found["entropy_by_layer"] == [1.0]
    assert found["divergence"] == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("model", MODELS)
def test_training_is_repeatable(model: str) -> None:
    """Two trainings of a few steps with one seed give identical weights; they did change."""
    first, again = (train_tiny.train(model, steps=2, seed=0).state_dict() for _ in range(2))
    start = train_tiny.new_model(model, seed=0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], start[name]) for name in first)


def test_packed_examples_do_not_see_each_other() -> None:
    """An example inside a packed row gets the logits that it gets alone."""
    network, tokenizer = loaded("deepseek-v2")
    ids, positions = next(train_tiny.batches(tokenizer, seed=0))
    starts = torch.nonzero(ids[0] == tiny_tasks.BOS_ID).flatten().tolist()
    ends = (torch.nonzero(ids[0] == tiny_tasks.EOS_ID).flatten() + 1).tolist()
    assert len(starts) == len(ends) > 1
    with torch.no_grad():
        packed = network(input_ids=ids[:1], position_ids=positions[:1], use_cache=False).logits
        for start, end in zip(starts, ends, strict=True):
            alone = network(input_ids=ids[:1, start:end], use_cache=False).logits
            assert torch.allclose(packed[:, start:end], alone, atol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_deterministic(task: str) -> None:
    """One seed gives one stream of examples, another seed another."""
    assert tiny_tasks.TASKS == TASKS
    one, same, other = (
        list(itertools.islice(tiny_tasks.examples(task, held_out=False, seed=seed), 20))
        for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("task", TASKS)
def test_held_out_keys_are_never_trained_on(task: str) -> None:
    """No key of a training example is held out, and the other way round."""
    for held_out in (True, False):
        for example in itertools.islice(tiny_tasks.examples(task, held_out=held_out), 500):
            assert example.keys
            assert all(tiny_tasks.is_held_out(key) is held_out for key in example.keys)


def test_prompts_file(tmp_path: Path) -> None:
    """The file holds 40 prompts per task, all different, as the script writes them today."""
    tiny_tasks.write_prompts(tmp_path / "again.jsonl", train_tiny.PROMPTS)
    assert (tmp_path / "again.jsonl").read_bytes() == PROMPTS.read_bytes()
    found = prompts()
    assert [line["task"] for line in found] == [task for task in TASKS for _ in range(40)]
    assert all(set(line) == {"prompt", "task"} for line in found)
    assert len({line["prompt"] for line in found}) == len(found)


def test_prompts_are_disjoint_from_training() -> None:
    """No prompt begins a text of the first 20,000 training examples of its task."""
    for task in TASKS:
        mine = {line["prompt"] for line in prompts() if line["task"] == task}
        stream = tiny_tasks.examples(task, held_out=False, seed=0)
        assert mine.isdisjoint(example.prompt for example in itertools.islice(stream, 20_000))


@pytest.mark.parametrize("model", MODELS)
def test_prompts_fit_the_context(model: str) -> None:
    """Every prompt leaves room for 128 new tokens in the model's context."""
    network, tokenizer = loaded(model)
    longest = max(len(tokenizer.encode(line["prompt"])) for line in prompts())
    assert longest + 128 <= network.config.max_position_embeddings


@pytest.mark.parametrize("model", MODELS)
def test_tiny_md_tells_what_was_recorded(model: str) -> None:
    """TINY.md's table of losses holds the numbers of training.json."""
    text = (TRACES / "TINY.md").read_text(encoding="utf-8")
    for task, row in record(model)["held_out_nats_per_token"].items():
        whole = f"{row['loss']:.2f} | {row['unigram_loss']:.2f}"
        answer = f"{row['answer_loss']:.2f} | {row['unigram_answer_loss']:.2f}"
        line = f"| {model} | {task} | {whole} | {answer} | {row['exact_answers']:.0%} |"
        assert line in text
