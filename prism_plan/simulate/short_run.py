"""A run of the compiled engine from the first arrival to the last answer, without reviews."""

from __future__ import annotations

import math

from prism_plan.cluster import Cluster
from prism_plan.model_spec import ModelSpec
from prism_plan.placement import Placement
from prism_plan.simulate.compiled.compiled_engine import CHUNK, CompiledEngine
from prism_plan.simulate.engine_interface import Outcome
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.scenario import Scenario


def short_run(
    placement: Placement, requests: Requests, cluster: Cluster, model: ModelSpec
) -> Outcome:
    """The measurements of a placement, with its execution table, on these requests.

    Runs of several placements on the same requests are paired: they differ by the placements alone.

    Raises
    ------
    InputError
        A figure of a GPU or link is wrong, or the placement is not of this cluster and model.
    """
    engine = CompiledEngine(Scenario.build(placement, requests, cluster, model))
    while not engine.advance(math.inf, CHUNK):
        pass  # between chunks Python sees signals
    return engine.outcome()
