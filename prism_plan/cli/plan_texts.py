"""What ``prism-plan solve`` says of a plan in words, beside the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_plan.cluster import Cluster
    from prism_plan.evaluate.user_figures import UserFigures
    from prism_plan.placement import Placement

#: From this share of time on queues take so long to become steady that short simulations miss it.
NEAR_LIMIT = 0.8


def latency_text(placement: Placement, figures: UserFigures | None, cluster: Cluster | None) -> str:
    """Mean latency, first token and speed for a user, for the title; empty where not known."""
    if figures is not None:
        speed = ""
        if figures.tokens_per_s is not None:
            speed = f", then {figures.tokens_per_s:.3g} tokens/s"
        return f"{figures.latency_s:.3g} s a request, first token {figures.ttft_s:.2g} s{speed}; "
    if (seconds := placement.plan.extra.get("expected_latency_s")) is not None:
        without = " without bursts" if _has_bursts(cluster) else ""
        return f"{seconds:.3g} s a request on an idle cluster{without}, "
    return ""


def plan_texts(placement: Placement, cluster: Cluster | None) -> Iterator[str]:
    """Lines about a plan: why it is so, its bounds, and where requests come too fast."""
    extra = placement.plan.extra
    if (because := extra.get("reason")) is not None:
        yield because
    if extra.get("limits") is not None:
        yield _bound_text(extra)
    elif "limits" in extra and _has_bursts(cluster):
        yield _burst_text(extra)
    share = extra.get("busiest_share", 0.0)
    if share >= 1:
        yield (
            f"overloaded: {extra['busiest']} would be busy for {share:.0%} of the time, so that "
            "requests wait longer and longer; seconds of a request are those of the first ones"
        )
    elif share >= NEAR_LIMIT:
        yield (
            f"near its limit: {extra['busiest']} would be busy for {share:.0%} of the time by the "
            "formula, so that queues grow for long before they are steady; seconds of a request "
            "are those of the first ones, and too low"
        )


def _bound_text(extra: Mapping[str, Any]) -> str:
    """What the plan's seconds are spent on, and lower bounds."""
    from prism_plan.cli.console import percent

    shares = dict(extra["limits"])
    memory = shares.pop("memory")
    largest = [f"{name} {percent(share, 0)}" for name, share in shares.items() if share >= 0.05]
    text = f"{extra['expected_latency_s']:.3g} s by the formula: {', '.join(largest)}"
    if memory >= 0.05:
        text += f"; {percent(memory, 0)} less if every server had memory for all experts"
    return (
        f"{text}. Lower bounds without queues: {extra['latency_bound_s']:.3g} s for any plan, "
        f"{extra['whole_layers_bound_s']:.3g} s for whole layers"
    )


def _burst_text(extra: Mapping[str, Any]) -> str:
    """Why there are no bounds, and how the plan was chosen, where links have bursts."""
    text = "bursts (burst_kb) are not in the formula: no lower bounds and no reason are given, and "
    if "simulated_s" in extra:
        return f"{text}short simulations chose the plan"
    return f"{text}the plan was chosen as if there were none; another may be faster"


def _has_bursts(cluster: Cluster | None) -> bool:
    return cluster is not None and cluster.link.burst_kb > 0
