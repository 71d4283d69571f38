"""Options of a run of a checkpoint with transformers."""

from __future__ import annotations

from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.input_limits import require_integer

#: Bound of new tokens, and of prompts of a batch: PyTorch counts both in 32 bits.
MAX_NUMBER = 2**31 - 1
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class HfOptions:
    """How to run the model.

    ``max_new_tokens`` of 0 records the prompts alone. ``device`` is ``"auto"`` (accelerators with
    ``device_map="auto"`` where there are any, else the CPU) or a PyTorch device.

    Raises
    ------
    InputError
        A number is out of range.
    """

    max_new_tokens: int = 32
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    weights: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_integer(self.max_new_tokens, 0, MAX_NUMBER, "max_new_tokens")
        require_integer(self.batch_size, 1, MAX_NUMBER, "batch_size")
        if self.dtype not in DTYPES:
            raise InputError(f"{self.dtype!r}", parameter="dtype", expected=", ".join(DTYPES))
