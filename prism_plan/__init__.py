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

from typing import Any

import lazy_loader

from prism_plan.deprecated_names import renamed_names

__version__ = "0.1.0"
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
_current_name = renamed_names(
    __name__,
    {
        "Plan": "SolveReport",
        "SolverRefused": "UnsupportedFeature",
        "Step": "MigrationStep",
        "Workload": "TokenRates",
        "expected_workload": "expected_token_rates",
        "load_model": "load_model_spec",
    },
)


def __getattr__(name: str) -> Any:
    if (current := _current_name(name)) in __all__:
        return _load(current)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
