"""The scenario of one simulation run: everything that it depends on, validated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster
from prism_plan.errors import InputError
from prism_plan.execution_table import executes_at_home
from prism_plan.model_spec import ModelSpec, require_same_model
from prism_plan.placement import Placement, gpu_offsets
from prism_plan.simulate.calibration import Calibration
from prism_plan.simulate.network import Network
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.routing_policies import ROUTES, Route
from prism_plan.simulate.timing import Timing, timing

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Scenario:
    """Everything one simulation run depends on; make it with :meth:`build`, which validates it.

    The cluster is kept as what follows from it: ``network``, ``timing``, ``concurrency`` [N] and
    the two GPU arrays. G counts the GPUs of all servers, L the MoE layers.

    ``execution`` int32 [N, L]: the server where the dense part of a layer runs for requests of each
    home server, at the start of the run (docs/design.md, section 4, rule 6, and section 10).
    ``offload``: servers do not call each other; an expert that is not resident is loaded from host
    memory (rule 8), and ``placement`` says what is resident at the start. Without it ``placement``
    holds every expert that the requests call.
    ``load_blocks_compute`` bool [G]: loads occupy the GPU as work does.
    ``dense_gpu`` int32 [N]: which of the G GPUs computes each server's dense parts.
    """

    model: ModelSpec
    placement: Placement
    requests: Requests
    network: Network
    timing: Timing
    concurrency: tuple[int, ...]
    route: Route
    execution: Ints
    offload: bool
    load_blocks_compute: npt.NDArray[np.bool_]
    dense_gpu: Ints

    @classmethod
    def build(
        cls,
        placement: Placement,
        requests: Requests,
        cluster: Cluster,
        model: ModelSpec,
        *,
        route: Route = "cover",
        calibration: Calibration | None = None,
        execution: Ints | None = None,
        offload: bool = False,
        restarts: bool = False,
    ) -> Scenario:
        """Build and validate the scenario of a run.

        ``execution`` replaces the table of the placement. ``restarts``: requests may be started
        again from their prompt and tokens, so that one step may have all tokens of a request.

        Raises
        ------
        InputError
            The placement is of other servers or GPUs, or lacks an expert that the requests call;
            the calibration is of a server or GPU that the cluster does not have; a figure of the
            cluster is not a positive number; an unknown route.
        WrongModel
            The placement is of another model.
        """
        require_same_model(placement.model, model, source="", other="the trace")
        names = tuple(server.name for server in cluster.servers)
        if placement.servers != names:
            raise InputError(
                f"servers {', '.join(placement.servers)}",
                place="servers",
                expected=f"those of {cluster.name}, in order: {', '.join(names)}",
            )
        for n, (held, server) in enumerate(
            zip(placement.gpu_capacity, cluster.servers, strict=True)
        ):
            if len(held) != len(server.gpus):
                raise InputError(
                    f"{len(held)} GPUs",
                    place=f"servers[{n}].gpus",
                    expected=f"{len(server.gpus)}, as {cluster.name} gives {server.name!r}",
                )
        if route not in ROUTES:
            raise InputError(
                f"{route!r:.60}", parameter="route", expected=f"one of {', '.join(ROUTES)}"
            )
        if calibration is not None:
            cluster = calibration.applied(cluster)
        prompts = requests.prompts
        tokens = max(int(prompts.prefill_tokens.max(initial=0)), 1)
        context = int((prompts.prefill_tokens + prompts.decode_tokens).max(initial=0))
        if restarts:
            tokens = max(tokens, context)
        if not offload:
            require_covered(placement, requests)
        else:
            _require_slots(placement)
        first_gpu = gpu_offsets(len(server.gpus) for server in cluster.servers)
        where = placement.execution_table if execution is None else execution
        return cls(
            model=model,
            placement=placement,
            requests=requests,
            network=Network.of(cluster, model),
            timing=timing(cluster, model, tokens, calibration, context=context),
            concurrency=tuple(server.concurrency for server in cluster.servers),
            route=route,
            execution=where.astype(np.int32),
            offload=offload,
            dense_gpu=first_gpu[:-1] + np.array([s.dense_gpu for s in cluster.servers], np.int32),
            load_blocks_compute=np.array(
                [gpu.load_blocks_compute for server in cluster.servers for gpu in server.gpus]
            ),
        )

    @property
    def has_table(self) -> bool:
        """Whether any layer executes elsewhere than at the home of its request."""
        return not executes_at_home(self.execution)

    @property
    def gpu_start(self) -> Ints:
        """Index of each server's first GPU, and their number at the end, int32 [N + 1]."""
        return gpu_offsets(len(gpus) for gpus in self.placement.gpu_capacity)


def called_pairs(requests: Requests, num_experts: int) -> npt.NDArray[np.bool_]:
    """Which (layer, expert) pairs the prompts of the requests call, bool [L, E]."""
    prompts = requests.prompts
    layers = prompts.experts.shape[1]
    called = np.zeros((layers, num_experts), bool)
    lengths = prompts.prefill_tokens + prompts.decode_tokens
    for index in np.unique(requests.prompt):
        first = int(prompts.first_row[index])
        rows = prompts.experts[first : first + int(lengths[index])]
        for layer in range(layers):
            called[layer, rows[:, layer]] = True
    return called


def _require_slots(placement: Placement) -> None:
    for n, gpus in enumerate(placement.gpu_capacity):
        if not sum(gpus):
            raise InputError(
                f"server {placement.servers[n]!r} has no slots",
                place=f"servers[{n}]",
                expected="room for one expert at least, to load what it calls",
            )


def require_covered(placement: Placement, requests: Requests) -> None:
    """Refuse a placement that lacks an expert that the requests call.

    Raises
    ------
    InputError
        Names the first such expert.
    """
    held = placement.local.any(axis=0)
    if held.all():  # as in most plans: no need to look at every prompt
        return
    uncovered = np.flatnonzero(called_pairs(requests, placement.model.num_experts) & ~held)
    if len(uncovered):
        more = f" (and {len(uncovered) - 1} more)" if len(uncovered) > 1 else ""
        raise InputError(
            f"{placement.model.pair_text(int(uncovered[0]))}{more} is called and held nowhere",
            place="servers",
            expected="a server for every expert that the trace calls",
            remedy="plan again with this trace",
        )
