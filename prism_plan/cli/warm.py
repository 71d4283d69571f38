"""``python -m prism_plan.warm``: what it says, and its exit code."""

from __future__ import annotations

import sys
import time

from prism_plan.cli.console import PROGRAM
from prism_plan.evaluate.kernel_compilation import compile_kernels
from prism_plan.jit import code_is_kept


def main() -> None:
    """Compile all kernels; exit with 1 where the machine code cannot be kept."""
    _require_cache()  # as far as kernels are known now: compiling would be of no use
    print(f"{PROGRAM}: compiling what is not compiled yet: half a minute", file=sys.stderr)
    begin = time.perf_counter()
    compile_kernels()
    _require_cache()
    print(f"{PROGRAM}: compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr)


def _require_cache() -> None:
    """Exit with 1 where the machine code of a kernel cannot be kept."""
    if not code_is_kept():
        sys.exit(
            f"{PROGRAM}: the compiled code cannot be kept, for no cache folder can be written; "
            "set NUMBA_CACHE_DIR to one that can"
        )
