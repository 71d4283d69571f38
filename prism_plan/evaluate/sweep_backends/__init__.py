"""Where the calls of a sweep run: in this process, in processes of this machine, on Dask, on Ray.

Back ends know nothing of sweeps: they run functions (:mod:`.contract`); :mod:`.in_order` spreads
work over one and gives its results in order. Dask and Ray are imported when they are used.
"""

from __future__ import annotations

import importlib
import importlib.util

from prism_plan.errors import InputError
from prism_plan.evaluate.sweep_backends.contract import Backend

#: Names of back ends, and the module that each needs beside those of prism-plan.
BACKENDS: dict[str, str | None] = {"processes": None, "dask": "distributed", "ray": "ray"}


def require_backend(name: str, scheduler: str | None) -> None:
    """Refuse a back end that cannot be used, before any work is done.

    Raises
    ------
    InputError
        An unknown name, an extra that is not installed, or an address for a back end without
        scheduler.
    """
    if name not in BACKENDS:
        raise InputError(
            f"{name!r:.60}", parameter="backend", expected=f"one of {', '.join(BACKENDS)}"
        )
    module = BACKENDS[name]
    if module is None:
        if scheduler is not None:
            raise InputError(
                "has no effect with the ``backend`` processes",
                parameter="scheduler",
                remedy="leave it out, or choose dask or ray",
            )
    elif importlib.util.find_spec(module) is None:
        raise InputError(
            f"{name} needs the module {module!r}",
            parameter="backend",
            remedy=f"install the extra: pip install 'prism-plan[{name}]'",
        )


def open_backend(name: str, jobs: int, scheduler: str | None) -> Backend:
    """Start workers, or connect to those of a scheduler.

    Parameters
    ----------
    name
        One of :data:`BACKENDS`.
    jobs
        Workers that are started on this machine; -1: one a core.
    scheduler
        Address of a running cluster of Dask (``tcp://host:8786``) or Ray (``host:6379``, or
        ``auto``); ``jobs`` then has no effect. ``None``: a cluster on this machine.

    Raises
    ------
    InputError
        See :func:`require_backend`; or there is no scheduler at the address.
    """
    require_backend(name, scheduler)
    if name == "dask":
        from prism_plan.evaluate.sweep_backends.dask import DaskBackend

        return DaskBackend(jobs, scheduler)
    if name == "ray":
        from prism_plan.evaluate.sweep_backends.ray import RayBackend

        return RayBackend(jobs, scheduler)
    from prism_plan.evaluate.sweep_backends.processes import open_processes

    return open_processes(jobs)
