"""Every MoE family of the installed transformers is recorded right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prism_plan.errors import InputError  # noqa: E402
from tests.profiling.recording.families import REFUSED, moe_families  # noqa: E402
from tests.profiling.recording.witness import require_right_recording  # noqa: E402

#: Well-known ones; that none of them is lost shows that families are found at all.
KNOWN = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "olmoe", "gpt_oss"),
    *("deepseek_v2", "deepseek_v3", "dbrx", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe"),
    *("granitemoe", "granitemoehybrid", "hunyuan_v1_moe", "jamba", "lfm2_moe", "minimax"),
    *("minimax_m2", "nemotron_h", "phimoe", "aria", "jetmoe", "llama4", "longcat_flash"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than these models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", moe_families())
def test_every_row_is_the_routers(family: str, tmp_path: Path) -> None:
    """Prefill and decode of a left-padded batch: the routers' own ids, or one line why not."""
    path = tmp_path / "t.parquet"
    if family not in REFUSED:
        require_right_recording(family, path)
        return
    with pytest.raises(InputError) as caught:
        require_right_recording(family, path)
    assert REFUSED[family] in str(caught.value)
    assert not path.exists()


def test_the_families_are_found() -> None:
    """The list of families is made from transformers' own code; known ones are in it."""
    assert moe_families().keys() >= KNOWN | REFUSED.keys()
