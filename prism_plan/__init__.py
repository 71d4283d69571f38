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

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
