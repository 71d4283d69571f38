"""What recording costs: paired runs with and without it, and memory over the number of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.cases import ROOT

CHECKPOINTS = ("tiny-mixtral", "tiny-deepseek-v2")
PAIRS = 80
#: Numbers of prompts whose peak memory is compared.
PROMPTS = (10, 1000)


def overhead(checkpoint: str) -> dict[str, Any]:
    """Median ratio of paired runs, batch 8: eight passes over 64 tokens; generation of 16 more.

    Two pairs make a block in mirrored order, and the ratio is of a block. A recorded run ends with
    all its rows handed to the file; eight passes are as many tokens as a recorder holds before it
    hands them on by itself.
    """
    import torch

    from prism_plan.io.trace_writer import TraceWriter
    from prism_plan.profiling.recording.hf_options import HfOptions
    from prism_plan.profiling.recording.load_checkpoint import load_hf_model
    from prism_plan.profiling.recording.recorder import Recorder
    from prism_plan.sizes.loaded_model import spec_from_loaded_model

    torch.set_num_threads(1)
    model = load_hf_model(
        str(ROOT / "traces" / checkpoint), HfOptions(dtype="float32", device="cpu")
    )
    ids = torch.randint(5, 200, (8, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward() -> None:
        for _ in range(8):
            model(**inputs, use_cache=False)

    def generate() -> None:
        model.generate(
            **inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
        )

    spec = spec_from_loaded_model(model)
    found: dict[str, Any] = {}
    with (
        torch.inference_mode(),
        tempfile.TemporaryDirectory() as folder,
        TraceWriter(Path(folder) / "t.parquet", spec) as writer,
    ):
        recorder = Recorder(model, spec, writer.write, weights=False)
        for name, run in (("forward", forward), ("generate", generate)):
            run()
            times: dict[bool, list[float]] = {True: [], False: []}
            ratios = []
            for _ in range(PAIRS // 2):
                # recorded, plain, plain, recorded: what the second of two gains cancels out
                block: dict[bool, float] = {True: 0.0, False: 0.0}
                for recording in (True, False, False, True):
                    elapsed = _timed(run, recorder if recording else None)
                    times[recording].append(elapsed)
                    block[recording] += elapsed
                ratios.append(block[True] / block[False])
            found[name] = {
                "plain_median_ms": round(1e3 * median(times[False]), 3),
                "overhead_median": round(median(ratios) - 1, 4),
                "pairs": PAIRS,
            }
    return found


def _timed(run: Callable[[], None], recorder: Any) -> float:
    if recorder is None:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    with recorder.attached():
        begin = time.perf_counter()
        run()
        recorder.flush()
        return time.perf_counter() - begin


def peak_of_prompts(number: int) -> float:
    """Peak memory in MiB of profiling so many prompts, in a process of its own."""
    code = f"""
import itertools, sys, tempfile
from pathlib import Path
from prism_plan.profiling.recording.checkpoint_run import profile_checkpoint
from prism_plan.profiling.recording.hf_options import HfOptions
traces = Path({str(ROOT / "traces")!r})
lines = (traces / "tiny-prompts.jsonl").read_text().splitlines()
with tempfile.TemporaryDirectory() as folder:
    prompts = Path(folder) / "p.jsonl"
    prompts.write_text("\\n".join(itertools.islice(itertools.cycle(lines), {number})))
    options = HfOptions(max_new_tokens=2, dtype="float32", device="cpu")
    profile_checkpoint(str(traces / "tiny-mixtral"), prompts, Path(folder) / "t.parquet", options)
from tests.benchmarks.measuring import peak_mib
print(peak_mib())
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return float(output.splitlines()[-1])


def measure() -> dict[str, Any]:
    """All of it, for the results file."""
    return {
        "overhead": {name: overhead(name) for name in CHECKPOINTS},
        "peak_mib_by_prompts": {str(n): round(peak_of_prompts(n), 1) for n in PROMPTS},
        "gpu": "not measured: no GPU at hand",
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
