"""`profile --format hf` on the committed checkpoints, and its mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError, PrismError
from prism_plan.io.prompts import read_prompts
from prism_plan.io.trace_reader import read_trace
from prism_plan.profiling.recording.checkpoint_run import Interrupted, profile_checkpoint
from prism_plan.profiling.recording.hf_options import HfOptions
from prism_plan.profiling.recording.load_checkpoint import load_tokenizer
from prism_plan.trace import PHASES, Trace
from tests.limits import HANG_S
from tests.profiling.recording.families import SMALL

TRACES = Path(__file__).resolve().parents[3] / "traces"
CHECKPOINTS = [TRACES / "tiny-mixtral", TRACES / "tiny-deepseek-v2"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve of the committed prompts, a blank line among them."""
    lines = (TRACES / "tiny-prompts.jsonl").read_text().splitlines()[::10]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    return path


def table(trace: Trace) -> dict[tuple[int, int], tuple[int, str, list[list[int]]]]:
    """(request, position) → phase, task, experts."""
    found = {}
    assert trace.batches is not None
    for batch in trace.batches():
        for row in range(len(batch)):
            key = int(batch.request[row]), int(batch.position[row])
            assert key not in found
            task = trace.tasks[batch.task[row]]
            found[key] = int(batch.phase[row]), task, batch.experts[row].tolist()
    return found


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda p: p.name)
def test_every_token_once(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Each prompt's tokens are counted once as prefill, and its new ones but the last as decode."""
    output = tmp_path / "t.parquet"
    profile_checkpoint(str(checkpoint), prompts, output, HfOptions(max_new_tokens=6, batch_size=4))
    rows = table(trace := read_trace(output))
    tokenizer = load_tokenizer(str(checkpoint), HfOptions())
    lines = list(read_prompts(prompts))
    for number, prompt in enumerate(lines):
        length = len(tokenizer(prompt.prompt)["input_ids"])
        mine = {p: row for (r, p), row in rows.items() if r == number}
        assert sorted(mine) == list(range(len(mine)))
        assert length <= len(mine) <= length + 5
        for position, (phase, task, _) in mine.items():
            assert PHASES[phase] == ("prefill" if position < length else "decode")
            assert task == prompt.task
    assert max(r for r, _ in rows) == len(lines) - 1
    assert trace.requests is not None
    assert int(trace.requests.sum()) == len(lines)
    assert trace.model.name == checkpoint.name
    assert not trace.provenance.get("partial")


def test_batches_do_not_matter(prompts: Path, tmp_path: Path) -> None:
    """In float32 the trace is the same whether prompts run alone or together, padded."""
    tables = []
    for size in (1, 5):
        output = tmp_path / f"{size}.parquet"
        options = HfOptions(max_new_tokens=4, batch_size=size, dtype="float32", device="cpu")
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, options)
        rows = table(read_trace(output))
        tables.append({k: (p, t, np.sort(e, axis=1).tolist()) for k, (p, t, e) in rows.items()})
    assert tables[0] == tables[1]


def test_prompts_alone(prompts: Path, tmp_path: Path) -> None:
    """No new tokens: only prefill; gate weights on request."""
    output = tmp_path / "t.parquet"
    options = HfOptions(max_new_tokens=0, weights=True)
    profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, options)
    trace = read_trace(output)
    assert trace.has_weights
    assert {phase for phase, _, _ in table(trace).values()} == {PHASES.index("prefill")}


def test_interrupted_and_resumed(prompts: Path, tmp_path: Path) -> None:
    """Ctrl-C keeps the batches done as a valid partial trace; --resume gives the whole one."""
    whole, part = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    options = HfOptions(max_new_tokens=3, batch_size=4)
    profile_checkpoint(str(CHECKPOINTS[0]), prompts, whole, options)

    def stop(done: int, total: int, tokens: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="first 8 of 12 prompts"):
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, part, options, progress=stop)
    partial = read_trace(part)
    assert partial.provenance["partial"] is True
    assert partial.provenance["prompts_done"] == 8
    assert {r for r, _ in table(partial)} == set(range(8))
    profile_checkpoint(str(CHECKPOINTS[0]), prompts, part, options, resume=True)
    resumed = read_trace(part)
    assert table(resumed) == table(read_trace(whole))
    assert "partial" not in resumed.provenance
    with pytest.raises(InputError, match="is complete"):
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, part, options, resume=True)


def test_interrupted_within_a_batch(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that was truncated leaves no rows, however many of them were recorded already."""
    from prism_plan.profiling.recording import checkpoint_run, recorder

    monkeypatch.setattr(recorder, "FLUSH_TOKENS", 1)  # hand on every pass at once
    original, calls = checkpoint_run._generate, []

    def cut_short(*args: Any) -> None:
        original(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_run, "_generate", cut_short)
    output = tmp_path / "t.parquet"
    options = HfOptions(max_new_tokens=3, batch_size=4)
    with pytest.raises(Interrupted, match="first 4 of 12"):
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, options)
    assert {r for r, _ in table(read_trace(output))} == set(range(4))
    monkeypatch.setattr(checkpoint_run, "_generate", original)
    profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, options, resume=True)
    assert {r for r, _ in table(read_trace(output))} == set(range(12))


def test_out_of_memory(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the second batch keeps the first, with exit code 4 and what to do."""
    import torch

    from prism_plan.errors import LimitReached
    from prism_plan.profiling.recording import checkpoint_run

    original, calls = checkpoint_run._generate, []

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(*args)

    monkeypatch.setattr(checkpoint_run, "_generate", full)
    output = tmp_path / "t.parquet"
    options = HfOptions(max_new_tokens=2, batch_size=4)
    with pytest.raises(LimitReached, match=r"out of memory; .* the first 4 of 12 prompts"):
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, options)
    assert {r for r, _ in table(read_trace(output))} == set(range(4))


def test_output_inside_the_checkpoint(prompts: Path, tmp_path: Path) -> None:
    """The checkpoint's own files are not overwritten."""
    target = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINTS[0], target)
    before = (target / "model.safetensors").read_bytes()
    result = run("profile", target, "--prompts", prompts, "-o", target / "model.safetensors")
    assert result.returncode == 2
    assert "is also read" in result.stderr
    assert (target / "model.safetensors").read_bytes() == before


def test_interrupted_before_anything(prompts: Path, tmp_path: Path) -> None:
    """Stopped in the first batch there is nothing to keep, and no file."""

    def stop(done: int, total: int, tokens: int) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "t.parquet"
    with pytest.raises(KeyboardInterrupt):
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, progress=stop)
    assert not output.exists()


@pytest.mark.parametrize("change", ["max_new_tokens", "prompts", "checkpoint", "weights"])
def test_resume_of_another_run(prompts: Path, tmp_path: Path, change: str) -> None:
    """A partial trace is only gone on with by the same checkpoint, prompts and options."""
    output = tmp_path / "t.parquet"

    def stop(done: int, total: int, tokens: int) -> None:
        if done:
            raise KeyboardInterrupt

    options = HfOptions(max_new_tokens=2, batch_size=4)
    with pytest.raises(Interrupted):
        profile_checkpoint(str(CHECKPOINTS[0]), prompts, output, options, progress=stop)
    before = output.read_bytes()
    checkpoint = CHECKPOINTS[1] if change == "checkpoint" else CHECKPOINTS[0]
    if change == "weights":  # a checkpoint of the same name and shape
        checkpoint = tmp_path / CHECKPOINTS[0].name
        shutil.copytree(CHECKPOINTS[0], checkpoint)
        weights = bytearray((checkpoint / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (checkpoint / "model.safetensors").write_bytes(weights)
    if change == "prompts":
        prompts.write_text(prompts.read_text() + prompts.read_text())
    if change == "max_new_tokens":
        options = HfOptions(max_new_tokens=3, batch_size=4)
    with pytest.raises(InputError, match="as in this run"):
        profile_checkpoint(str(checkpoint), prompts, output, options, resume=True)
    assert output.read_bytes() == before


LINES: dict[str, tuple[str, str]] = {
    "not JSON": ('{"prompt": "a", "task": "t"}\nhello\n', "line 2: not JSON"),
    "a list": ("[1]\n", "line 1: [1]"),
    "no task": ('{"prompt": "a"}\n', "line 1: key 'task' is missing"),
    "more keys": ('{"prompt": "a", "task": "t", "id": 1}\n', "line 1: unknown key 'id'"),
    "empty prompt": ('\n{"prompt": " ", "task": "t"}\n', "line 2: prompt: ' '"),
    "a number": ('{"prompt": 5, "task": "t"}\n', "line 1: prompt: 5"),
    "twice": ('{"prompt": "a", "prompt": "b", "task": "t"}\n', "is duplicated"),
    "nothing": ("\n\n", "no prompts in it"),
    "too long": (json.dumps({"prompt": "ab " * 4000, "task": "t"}) + "\n", "the model's context"),
}


@pytest.mark.parametrize("case", list(LINES))
def test_wrong_prompts(tmp_path: Path, case: str) -> None:
    """A wrong line is named with what was found, before anything is written."""
    text, words = LINES[case]
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        profile_checkpoint(str(CHECKPOINTS[0]), path, tmp_path / "t.parquet")
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "t.parquet").exists()


def spoilt(folder: Path, what: str) -> Path:
    """A copy of a checkpoint with something wrong."""
    target = folder / "checkpoint"
    shutil.copytree(CHECKPOINTS[0], target)
    weights = target / "model.safetensors"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        (target / "config.json").unlink()
    elif what == "no tokenizer":
        (target / "tokenizer.json").unlink()
        (target / "tokenizer_config.json").unlink()
    elif what == "dense":
        values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
        (target / "config.json").write_text(json.dumps(values))
    elif what == "config cut":
        (target / "config.json").write_text((target / "config.json").read_text()[:50])
    return target


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "no header in its 5,000 bytes"),
        ("no weights", "cannot load the model"),
        ("no config", "has no config.json"),
        ("no tokenizer", "tokenizer"),
        ("dense", "has no MoE layers"),
        ("config cut", "not JSON"),
    ],
)
def test_wrong_checkpoints(tmp_path: Path, prompts: Path, what: str, words: str) -> None:
    """A damaged, dense or incomplete checkpoint is one line, and nothing is written."""
    target = spoilt(tmp_path, what)
    with pytest.raises(PrismError) as caught:
        profile_checkpoint(str(target), prompts, tmp_path / "t.parquet")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t.parquet").exists()


def run(*arguments: object, env: dict[str, str] | None = None) -> Any:
    """The installed command, without network for the hub."""
    import os

    return subprocess.run(
        [str(Path(sys.executable).parent / "prism-plan"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )


def test_the_command(prompts: Path, tmp_path: Path) -> None:
    """The default format is hf; the trace it writes solves and checks like any other."""
    output = tmp_path / "t.parquet"
    result = run(
        "profile", CHECKPOINTS[1], "--prompts", prompts, "--max-new-tokens", 4, "-o", output
    )
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr
    assert run("check", output).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody/no-such-model", "--prompts", "PROMPTS"), "no such folder, and no checkpoint"),
        ((CHECKPOINTS[0],), "--prompts: not given"),
        ((CHECKPOINTS[0], "--prompts", "PROMPTS", "--max-new-tokens", -1), "--max-new-tokens: -1"),
        ((CHECKPOINTS[0], "--prompts", "PROMPTS", "--batch-size", 0), "--batch-size: 0"),
        ((CHECKPOINTS[0], "--prompts", "PROMPTS", "--device", "gpu"), "gpu"),
        ((CHECKPOINTS[0], "--prompts", "PROMPTS", "--device", "meta"), "--device: 'meta'"),
        ((CHECKPOINTS[0], "--prompts", "missing.jsonl"), "missing.jsonl: no such file"),
    ],
)
def test_mistakes_on_the_command_line(
    prompts: Path, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    """One line on standard error, exit code 2, no file."""
    given = [prompts if a == "PROMPTS" else a for a in arguments]
    result = run("profile", *given, "-o", tmp_path / "t.parquet")
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "t.parquet").exists()


def checkpoint_of(family: str, folder: Path) -> Path:
    """A tiny checkpoint of any MoE family, with the tokenizer of the committed ones, and a spec."""
    from tests.profiling.recording.families import family_model
    from tests.profiling.recording.witness import spec_for

    target = folder / family
    shutil.copytree(
        CHECKPOINTS[0], target, ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    shutil.copy(CHECKPOINTS[0] / "tokenizer_config.json", target)
    model = family_model(family)
    model.resize_token_embeddings(len(load_tokenizer(str(CHECKPOINTS[0]), HfOptions())))
    model.save_pretrained(target)
    spec = spec_for(f"my {family}", model)
    (folder / "sizes.json").write_text(json.dumps(spec.to_json()))
    return target


@pytest.mark.parametrize("family", ["granitemoe", "qwen3_vl_moe"])
def test_a_spec_by_hand(family: str, prompts: Path, tmp_path: Path) -> None:
    """--model takes sizes as a file: any family, also the language model of a multimodal one."""
    checkpoint, output = checkpoint_of(family, tmp_path), tmp_path / "t.parquet"
    settings = ("--prompts", prompts, "--max-new-tokens", 3, "--model", tmp_path / "sizes.json")
    result = run("profile", checkpoint, *settings, "-o", output)
    assert result.returncode == 0, result.stderr
    trace = read_trace(output)
    assert trace.model.name == f"my {family}"
    assert trace.model.expert_bytes == 1000
    assert {phase for phase, _, _ in table(trace).values()} == {0, 1}


def test_a_spec_of_another_model(prompts: Path, tmp_path: Path) -> None:
    """The preset does not have the checkpoint's layers: both are named, and nothing is written."""
    output = tmp_path / "t.parquet"
    result = run(
        *("profile", CHECKPOINTS[0], "--prompts", prompts, "--model", "mixtral-8x7b", "-o", output)
    )
    assert result.returncode == 2
    assert "mixtral-8x7b: moe_layers: the spec has MoE layers 0..31; expected 0..3" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()
