"""The command line: the only part of the package that prints or exits."""

import gc
import os
import sys

#: Objects between two searches for cycles. Loading modules and compiling make hundreds of thousands
#: that stay; looking through them every 700, as Python does, takes a sixth of a short command.
OBJECTS_BETWEEN_COLLECTIONS = 200_000


def main() -> None:
    """Run the command line; see :mod:`prism_plan.cli.main`."""
    # a thread for each core costs more to start than the little linear algebra of commands takes
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    try:
        from prism_plan.cli.main import run

        code = run()
    except KeyboardInterrupt:  # while modules are still being loaded
        print("prism-plan: interrupted; nothing was written", file=sys.stderr)
        code = 130
    if code == 130:
        # without waiting for the thread of a solver that is slow to notice it
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
