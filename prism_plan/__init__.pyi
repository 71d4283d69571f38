"""The public names and where each is defined; `prism_plan` imports them when they are used."""

from .cluster import (
    Cluster as Cluster,
)
from .cluster import (
    Gpu as Gpu,
)
from .cluster import (
    Link as Link,
)
from .cluster import (
    PairLink as PairLink,
)
from .cluster import (
    Server as Server,
)
from .errors import (
    Infeasible as Infeasible,
)
from .errors import (
    InputError as InputError,
)
from .errors import (
    LimitReached as LimitReached,
)
from .errors import (
    OutputError as OutputError,
)
from .errors import (
    PrismError as PrismError,
)
from .errors import (
    UnsupportedFeature as UnsupportedFeature,
)
from .errors import (
    WrongModel as WrongModel,
)
from .evaluate.comparison import Comparison as Comparison
from .evaluate.comparison import compare as compare
from .evaluate.data_frames import (
    comparison_frame as comparison_frame,
)
from .evaluate.data_frames import (
    simulation_frame as simulation_frame,
)
from .evaluate.data_frames import (
    sweep_frame as sweep_frame,
)
from .evaluate.offload_baseline import offload_placement as offload_placement
from .evaluate.simulation import (
    Simulation as Simulation,
)
from .evaluate.simulation import (
    simulate_placements as simulate_placements,
)
from .evaluate.simulation import (
    write_simulation as write_simulation,
)
from .evaluate.simulation_options import SimulationOptions as SimulationOptions
from .evaluate.sweep import SweepOptions as SweepOptions
from .evaluate.sweep_grid import Grid as Grid
from .instance import Instance as Instance
from .io.calibration import read_calibration as read_calibration
from .io.cluster import parse_cluster as parse_cluster
from .io.cluster import read_cluster as read_cluster
from .io.comparison import read_comparison as read_comparison
from .io.gpu_table import GpuFigures as GpuFigures
from .io.gpu_table import gpu_figures as gpu_figures
from .io.migration import read_migration as read_migration
from .io.migration import write_migration as write_migration
from .io.placement import (
    placement_schema as placement_schema,
)
from .io.placement import (
    read_placement as read_placement,
)
from .io.placement import (
    write_placement as write_placement,
)
from .io.simulation import read_simulation as read_simulation
from .io.sweep import read_sweep as read_sweep
from .io.sweep import write_sweep as write_sweep
from .io.trace_reader import read_trace as read_trace
from .io.trace_writer import TraceWriter as TraceWriter
from .io.trace_writer import write_trace as write_trace
from .latency.expected_latency import PlanLatency as PlanLatency
from .latency.expected_latency import expected_latency as expected_latency
from .migration.order.find_order import migration_plan as migration_plan
from .migration.plan import MigrationPlan as MigrationPlan
from .migration.repair import repair_placement as repair_placement
from .migration_step import MigrationStep as MigrationStep
from .migration_step import ReplicaDip as ReplicaDip
from .model_spec import PRESETS as PRESETS
from .model_spec import ModelShape as ModelShape
from .model_spec import ModelSpec as ModelSpec
from .objective import (
    RemoteScore as RemoteScore,
)
from .objective import (
    StepScore as StepScore,
)
from .objective import (
    remote_score as remote_score,
)
from .objective import (
    score as score,
)
from .objective import (
    step_score as step_score,
)
from .placement import InputFile as InputFile
from .placement import Placement as Placement
from .placement import SolveReport as SolveReport
from .placement_check import Violation as Violation
from .placement_check import violations as violations
from .placement_diff import PlacementDiff as PlacementDiff
from .placement_diff import diff as diff
from .profiling.recording.checkpoint_run import profile_checkpoint as profile_checkpoint
from .profiling.recording.hf_options import HfOptions as HfOptions
from .profiling.recording.recorder import Recorder as Recorder
from .profiling.recording.recorder import record as record
from .simulate.calibration import Calibration as Calibration
from .simulate.requests import Prompts as Prompts
from .simulate.requests import Requests as Requests
from .simulate.sampling import sample_requests as sample_requests
from .simulate.scenario import Scenario as Scenario
from .sizes.load import load_model_spec as load_model_spec
from .solvers.contract import Options as Options
from .solvers.entropy import entropy_counts as entropy_counts
from .solvers.entropy import lemma1_bound as lemma1_bound
from .solvers.greedy import greedy_with_coverage as greedy_with_coverage
from .solvers.registry import SOLVER_NAMES as SOLVER_NAMES
from .solvers.run import solve as solve
from .token_rates import (
    TokenRates as TokenRates,
)
from .token_rates import (
    activations as activations,
)
from .token_rates import (
    expected_token_rates as expected_token_rates,
)
from .trace import (
    TokenBatch as TokenBatch,
)
from .trace import (
    Trace as Trace,
)
from .trace import (
    trace_from_batches as trace_from_batches,
)

__version__: str
