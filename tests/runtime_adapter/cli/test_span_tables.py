"""A hundred execution tables in one launch, of every family: the tokens of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from prism_plan.instance import Instance  # noqa: E402
from prism_plan.io.cluster import parse_cluster  # noqa: E402
from prism_plan.model_spec import ModelSpec  # noqa: E402
from prism_plan.placement import Placement  # noqa: E402
from prism_plan.solvers import solve  # noqa: E402
from runtime_adapter.weights.checkpoint import Checkpoint  # noqa: E402
from runtime_adapter.weights.checkpoint_families import FAMILIES  # noqa: E402
from tests.profiling.recording.families import VOCABULARY  # noqa: E402
from tests.profiling.synthetic import SyntheticSpread, synthetic_trace  # noqa: E402
from tests.runtime_adapter.checkpoints import TRACES, saved  # noqa: E402
from tests.runtime_adapter.cli.test_serve import lines  # noqa: E402
from tests.runtime_adapter.servers import Servers  # noqa: E402

NEW_TOKENS = 7
PLANNERS = ("exact+paths", "layer-partition+paths", "pipeline", "latency")


def checkpoint_folder(family: str, folder: Path) -> Path:
    """A committed checkpoint, or one of a tiny random model whose words are "w0", "w1" ..."""
    if (TRACES / f"tiny-{family}").is_dir():
        return TRACES / f"tiny-{family}"
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    saved(family, folder)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def planned(spec: ModelSpec, servers: int) -> list[Placement]:
    """A placement at home, and plans of all solvers of tables, for unequal servers."""
    pairs = spec.num_pairs
    shares = [0.7, 0.5, 0.4, 0.4][:servers]
    text = ['name = "drawn"']
    for n, share in enumerate(shares):
        text += ["[[server]]", f'name = "edge-{n}"', f"tasks = {{ t{n} = 1.0 }}"]
        text += ["arrival_interval_s = 5.0", "[[server.gpu]]", f"slots = {round(share * pairs)}"]
    tasks = [f"t{n}" for n in range(servers)]
    trace = synthetic_trace(
        spec, tasks, requests=6, prompt_tokens=5, decode_tokens=6,
        spread=SyntheticSpread(task=1.5), seed=1,
    )  # fmt: skip
    instance = Instance.build(trace, parse_cluster("\n".join(text) + "\n"))
    return [solve(instance, name) for name in ("exact", *PLANNERS)]


def reference_of(folder: Path) -> Any:
    """Gives what the single process adds to a prompt, in float32; each prompt once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @functools.cache
    def added(prompt: str) -> list[int]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        tokens: list[int] = found[0, ids.shape[1] :].tolist()
        return tokens

    return added


OTHERS = [family for family in FAMILIES if family not in ("mixtral", "deepseek_v2")]
CASES = [
    ("mixtral", 3, 0, 100),
    ("deepseek-v2", 4, 5, 100),
    *((family, 2 + n % 3, (0, 4)[n % 2], 25) for n, family in enumerate(OTHERS)),
]


@pytest.mark.long
@pytest.mark.parametrize(("family", "servers", "chunk", "tables"), CASES)
def test_tokens_on_every_table(
    family: str, servers: int, chunk: int, tables: int, tmp_path: Path
) -> None:
    """Plans of the solvers, then random tables on each of their placements, in one launch.

    Each is moved to while two requests of every home run, so that experts move with tables and
    requests begin before, during and after the moves. No request fails.
    """
    folder = checkpoint_folder(family, tmp_path / "model")
    spec = Checkpoint(folder).spec
    generator = np.random.default_rng(servers)
    plans = planned(spec, servers)
    added = reference_of(folder)
    words = [f"w{n}" for n in range(3, VOCABULARY)]
    if family in ("mixtral", "deepseek-v2"):
        words = " ".join(line["prompt"] for line in lines()["narrative"][:20]).split()
    targets = plans[1:]
    for number in range(tables):
        table = generator.integers(0, servers, (servers, spec.num_layers)).astype(np.int32)
        targets.append(plans[number % len(plans)].replace(execution=table))
    own = ["--movable", "--dtype", "float32", "--concurrency", "2"]
    own += ["--max-new-tokens", str(NEW_TOKENS), "--prefill-chunk", str(chunk)]
    names = plans[0].servers
    asked: dict[str, str] = {}
    with Servers(tmp_path, plans[0], str(folder), *own) as run:
        run.start_store()
        for name in names:
            run.start(name, None)
        for target in targets:
            for name in names:
                for _ in range(2):
                    length = int(generator.integers(1, 12))
                    prompt = " ".join(generator.choice(words, length))
                    identity = f"{name}/{len(asked)}"
                    asked[identity] = prompt
                    run.ask(name, {"prompt": prompt, "id": identity})
            code, text = run.move(target)
            assert code == 0, text
        for name in names:
            run.finish(name)
        assert set(run.codes().values()) == {0}, [run.errors(name) for name in names]
        answers = {answer["id"]: answer for name in names for answer in run.answers(name)}
        hops = sum(run.stats(name)["hops"] for name in names)
    assert answers.keys() == asked.keys()
    for identity, answer in answers.items():
        assert answer["error"] is None
        assert answer["tokens"] == added(asked[identity])
    assert hops > 0
