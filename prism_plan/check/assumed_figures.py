"""The line of messages that names assumed figures of GPUs and links."""

from __future__ import annotations

from prism_plan.assumed_figures import assumed_texts
from prism_plan.cluster import Cluster


def assumed_figures(cluster: Cluster, **uses: bool) -> str:
    """A line that names the figures that are used and that the cluster file does not give.

    ``uses`` as in :func:`prism_plan.assumed_figures.assumed_texts`. Empty where nothing is assumed.
    """
    texts = assumed_texts(cluster, **uses)
    return f"not given and assumed: {'; '.join(texts)}" if texts else ""
