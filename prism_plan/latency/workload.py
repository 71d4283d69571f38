"""What the formula of a plan's latency is given besides the plan: requests, GPUs and links."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.network import Network
from prism_plan.simulate.requests import Prompts
from prism_plan.simulate.routing_policies import Route
from prism_plan.simulate.timing import Timing

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Workload:
    """What the users of each home ask for.

    ``members`` [classes, P] is the share of each prompt in the requests of a class (rows of sum 1),
    ``shares`` [N, classes] that of each class in the requests of a home, zero without users;
    ``rates`` [N] requests per second, zero for a cluster that is planned as idle; ``weights`` [N]
    the share of each home in all requests; ``places`` [N] requests in progress at most.
    """

    prompts: Prompts
    members: Floats
    shares: Floats
    rates: Floats
    weights: Floats
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """What GPUs and links cost; ``gpu_start`` [N + 1] and ``dense_gpu`` [N] as in a scenario."""

    model: ModelSpec
    network: Network
    timing: Timing
    gpu_start: npt.NDArray[np.int32]
    dense_gpu: npt.NDArray[np.int32]
    route: Route = "cover"
