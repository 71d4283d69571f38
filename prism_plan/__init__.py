"""Expert placement for Mixture-of-Experts models on a few unequal edge servers.

Everything the command line does is a plain call first::

    import prism_plan as pp

    trace = pp.read_trace("v2.parquet")
    cluster = pp.read_cluster("cluster.toml")
    instance = pp.Instance.build(trace, cluster)
    placement = pp.solve(instance, solver="exact")
    pp.write_placement("placement.json", placement)
    print(pp.score(placement, instance).share)

Names are imported when they are first used, so that ``import prism_plan`` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster, Gpu, Link, PairLink, Server
    from prism_plan.comparison import Comparison, compare
    from prism_plan.errors import (
        Infeasible,
        InputError,
        LimitReached,
        OutputError,
        PrismError,
        SolverRefused,
        WrongModel,
    )
    from prism_plan.frames import comparison_frame, simulation_frame, sweep_frame
    from prism_plan.instance import Instance
    from prism_plan.io.calibration import read_calibration
    from prism_plan.io.cluster import parse_cluster, read_cluster
    from prism_plan.io.comparison import read_comparison
    from prism_plan.io.migration import read_migration, write_migration
    from prism_plan.io.placement import placement_schema, read_placement, write_placement
    from prism_plan.io.simulation import read_simulation
    from prism_plan.io.sweep import read_sweep, write_sweep
    from prism_plan.io.trace_reader import read_trace
    from prism_plan.io.trace_writer import TraceWriter, write_trace
    from prism_plan.migration.order import migration_plan
    from prism_plan.migration.plan import MigrationPlan
    from prism_plan.model import PRESETS, ModelShape, ModelSpec
    from prism_plan.moves import PlacementDiff, Step, diff
    from prism_plan.objective import (
        RemoteScore,
        StepScore,
        Violation,
        remote_score,
        score,
        step_score,
        violations,
    )
    from prism_plan.placement import InputFile, Placement, Plan
    from prism_plan.profiling.hf import HfOptions, profile_checkpoint
    from prism_plan.profiling.recorder import Recorder, record
    from prism_plan.simulate.calibration import Calibration
    from prism_plan.simulate.requests import Prompts, Requests
    from prism_plan.simulate.workload import sample_requests
    from prism_plan.simulation import (
        Simulation,
        SimulationOptions,
        offload_placement,
        simulate_placements,
        write_simulation,
    )
    from prism_plan.sizes import load_model, load_model_spec
    from prism_plan.solvers.contract import Options
    from prism_plan.solvers.entropy import entropy_counts, lemma1_bound
    from prism_plan.solvers.greedy import greedy_with_coverage
    from prism_plan.solvers.registry import SOLVER_NAMES
    from prism_plan.solvers.run import solve
    from prism_plan.sweep import Grid, SweepOptions
    from prism_plan.trace import TokenBatch, Trace, trace_from_batches
    from prism_plan.workload import Workload, activations, expected_workload

_HOME = {
    "cluster": ("Cluster", "Gpu", "Link", "PairLink", "Server"),
    "io.cluster": ("parse_cluster", "read_cluster"),
    "comparison": ("Comparison", "compare"),
    "io.comparison": ("read_comparison",),
    "frames": ("comparison_frame", "simulation_frame", "sweep_frame"),
    "migration.order": ("migration_plan",),
    "migration.plan": ("MigrationPlan",),
    "io.migration": ("read_migration", "write_migration"),
    "moves": ("PlacementDiff", "Step", "diff"),
    "errors": (
        "Infeasible",
        "InputError",
        "LimitReached",
        "OutputError",
        "PrismError",
        "SolverRefused",
        "WrongModel",
    ),
    "instance": ("Instance",),
    "model": ("PRESETS", "ModelShape", "ModelSpec"),
    "sizes": ("load_model", "load_model_spec"),
    "objective": (
        "RemoteScore",
        "StepScore",
        "Violation",
        "remote_score",
        "score",
        "step_score",
        "violations",
    ),
    "profiling.hf": ("HfOptions", "profile_checkpoint"),
    "profiling.recorder": ("Recorder", "record"),
    "placement": ("InputFile", "Placement", "Plan"),
    "io.placement": ("placement_schema", "read_placement", "write_placement"),
    "simulate.calibration": ("Calibration",),
    "io.calibration": ("read_calibration",),
    "simulate.requests": ("Prompts", "Requests"),
    "simulate.workload": ("sample_requests",),
    "simulation": (
        "Simulation",
        "SimulationOptions",
        "offload_placement",
        "simulate_placements",
        "write_simulation",
    ),
    "io.simulation": ("read_simulation",),
    "solvers.contract": ("Options",),
    "solvers.entropy": ("entropy_counts", "lemma1_bound"),
    "solvers.greedy": ("greedy_with_coverage",),
    "solvers.registry": ("SOLVER_NAMES",),
    "solvers.run": ("solve",),
    "sweep": ("Grid", "SweepOptions"),
    "io.sweep": ("read_sweep", "write_sweep"),
    "trace": ("TokenBatch", "Trace", "trace_from_batches"),
    "io.trace_reader": ("read_trace",),
    "io.trace_writer": ("TraceWriter", "write_trace"),
    "workload": ("Workload", "activations", "expected_workload"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "PRESETS",
    "SOLVER_NAMES",
    "Calibration",
    "Cluster",
    "Comparison",
    "Gpu",
    "Grid",
    "HfOptions",
    "Infeasible",
    "InputError",
    "InputFile",
    "Instance",
    "LimitReached",
    "Link",
    "MigrationPlan",
    "ModelShape",
    "ModelSpec",
    "Options",
    "OutputError",
    "PairLink",
    "Placement",
    "PlacementDiff",
    "Plan",
    "PrismError",
    "Prompts",
    "Recorder",
    "RemoteScore",
    "Requests",
    "Server",
    "Simulation",
    "SimulationOptions",
    "SolverRefused",
    "Step",
    "StepScore",
    "SweepOptions",
    "TokenBatch",
    "Trace",
    "TraceWriter",
    "Violation",
    "Workload",
    "WrongModel",
    "__version__",
    "activations",
    "compare",
    "comparison_frame",
    "diff",
    "entropy_counts",
    "expected_workload",
    "greedy_with_coverage",
    "lemma1_bound",
    "load_model",
    "load_model_spec",
    "migration_plan",
    "offload_placement",
    "parse_cluster",
    "placement_schema",
    "profile_checkpoint",
    "read_calibration",
    "read_cluster",
    "read_comparison",
    "read_migration",
    "read_placement",
    "read_simulation",
    "read_sweep",
    "read_trace",
    "record",
    "remote_score",
    "sample_requests",
    "score",
    "simulate_placements",
    "simulation_frame",
    "solve",
    "step_score",
    "sweep_frame",
    "trace_from_batches",
    "violations",
    "write_migration",
    "write_placement",
    "write_simulation",
    "write_sweep",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"prism_plan.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'prism_plan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
