"""Solvers beside the optimum of small instances, which a dynamic programme proves.

    python -m studies.small_instances --count 100                       # ten to twenty minutes
    python -m studies.small_instances --count 100 --solver latency      # one solver more
    python -m studies.small_instances --count 100 --solver latency --again
    python -m studies.small_instances --table                           # what the file has
    python -m studies.small_instances --show 12                         # plans beside the optimum
    python -m studies.small_instances --count 100 --classes             # what each freedom is worth

Writes studies/small_instances.json after each instance; what the file has already is kept, so that
a run that was stopped goes on where it was. ``--again`` plans anew with the solvers that are named.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from studies.machine import commit, processor
from studies.small_instances.classes import class_optima
from studies.small_instances.gap import plan
from studies.small_instances.instances import SmallInstance, draw
from studies.small_instances.optimum import Measure, Parts, optimum
from studies.small_instances.record import read_record, write_record

SOLVERS = ("pipeline", "layer-partition+paths", "exact+paths", "prism+paths")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m studies.small_instances")
    parser.add_argument("--count", type=int, default=100, help="instances 0 to COUNT - 1")
    parser.add_argument("--first", type=int, default=0, help="begin with this instance")
    parser.add_argument("--solver", action="append", help="a solver; several times for several")
    parser.add_argument("--again", action="store_true", help="plan anew with these solvers")
    parser.add_argument("--classes", action="store_true", help="optima of restricted plans too")
    parser.add_argument("--table", action="store_true", help="print what the file has, run nothing")
    parser.add_argument("--show", type=int, metavar="NUMBER", help="print plans of an instance")
    asked = parser.parse_args()
    values = read_record()
    if asked.table:
        print(summary(values))
        return 0
    solvers = tuple(asked.solver or SOLVERS)
    if asked.show is not None:
        print(shown(draw(asked.show), solvers))
        return 0
    values |= {"commit": commit(), "processor": processor()}
    for number in range(asked.first, asked.count):
        small = draw(number)
        found = values["instances"].get(str(number), {})
        if found.get("digest") != small.digest():
            found = described(small)
        known = {} if asked.again else found["plans"]
        missing = [solver for solver in solvers if solver not in known]
        classes_missing = asked.classes and "classes" not in found
        if "optimum" in found and not missing and not classes_missing:
            continue
        if "optimum" not in found:
            found["optimum"] = _optimum(small)
        for solver in missing:
            found["plans"][solver] = _plan(small, solver)
        if classes_missing:
            found["classes"] = _classes(small)
        values["instances"][str(number)] = found
        write_record(values)
        told = {s: _above(found, s) for s in solvers}
        print(f"{number} {found['optimum']['seconds']:.0f} s {told}", flush=True)
    print(summary(values))
    return 0


def described(small: SmallInstance) -> dict[str, Any]:
    """What an instance is, without plans."""
    model = small.trace.model
    return {
        "digest": small.digest(),
        "layers": model.num_layers,
        "top_k": model.top_k,
        "prefill_tokens": small.prefill_tokens,
        "slots": list(small.slots),
        "equal_links": small.equal_links,
        "plans": {},
    }


def _optimum(small: SmallInstance) -> dict[str, Any]:
    proven = optimum(small)
    return {
        "value_s": proven.value_s,
        "bound_s": proven.bound_s,
        "seconds": round(proven.seconds, 2),
        "table": rows_text(proven.table),
        "held": proven.local.sum(axis=2).tolist(),
    }


def _classes(small: SmallInstance) -> dict[str, float | None]:
    measure = Measure(small)
    parts = Parts.of(small, measure, ties="worse")  # what a plan takes at most
    return class_optima(parts, measure, small.problem())


def _plan(small: SmallInstance, solver: str) -> dict[str, Any]:
    begin = time.perf_counter()
    placement = plan(small, solver)
    seconds = round(time.perf_counter() - begin, 3)
    if placement is None:
        return {"value_s": None, "seconds": seconds}
    return {
        "value_s": Measure(small).value_s(placement.on_gpu, placement.execution_table),
        "seconds": seconds,
        "table": rows_text(placement.execution_table),
    }


def _above(found: dict[str, Any], solver: str, of: str = "bound_s") -> float | None:
    """How far a plan is above the bound, as a share of it."""
    value = found["plans"].get(solver, {}).get("value_s")
    return None if value is None else round(value / found["optimum"][of] - 1, 6)


def summary(values: dict[str, Any]) -> str:
    """A Markdown table: how far solvers are above the bound, and the worst instance."""
    instances: dict[str, Any] = values["instances"]
    unproven = [
        own["optimum"]["value_s"] / own["optimum"]["bound_s"] - 1 for own in instances.values()
    ]
    lines = [
        f"{len(instances)} instances; the best plan is above the bound by at most "
        f"{max(unproven, default=0):.2%}, by more than 1e-9 in {sum(u > 1e-9 for u in unproven)}",
        "",
        "| solver | median | 95th of 100 | worst | within 1 % | within 6 % | no plan |",
        "|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys(solver for own in instances.values() for solver in own["plans"])
    for solver in names:
        above = {n: _above(own, solver) for n, own in instances.items() if solver in own["plans"]}
        lines.append(_line(f"`{solver}`", above))
    best: dict[str, float | None] = {}
    for number, own in instances.items():
        made = [a for solver in SOLVERS if (a := _above(own, solver)) is not None]
        best[number] = min(made, default=None)
    lines.append(_line("the best of " + ", ".join(f"`{s}`" for s in SOLVERS), best))
    classes = dict.fromkeys(name for own in instances.values() for name in own.get("classes", {}))
    for name in classes:
        known = {n: own for n, own in instances.items() if "classes" in own}
        above = {
            n: None if (seconds := own["classes"][name]) is None
            else seconds / own["optimum"]["bound_s"] - 1
            for n, own in known.items()
        }  # fmt: skip
        lines.append(_line(name, above))
    return "\n".join(lines)


def _line(name: str, above: dict[str, float | None]) -> str:
    made = {number: share for number, share in above.items() if share is not None}
    if not made:
        return f"| {name} | – | – | – | – | – | {len(above)} |"
    # instances without a plan are the worst
    shares = np.sort([np.inf if share is None else share for share in above.values()])
    worst = max(made, key=made.__getitem__)
    of_95 = shares[int(np.ceil(0.95 * len(shares))) - 1]
    return (
        f"| {name} | {_share(float(np.median(shares)))} | {_share(float(of_95))} "
        f"| {_share(made[worst])} (no. {worst}) | {(shares <= 0.01).sum()} "
        f"| {(shares <= 0.06).sum()} | {len(above) - len(made)} |"
    )


def _share(value: float) -> str:
    return "no plan" if np.isinf(value) else f"{value:.2%}"


def rows_text(table: npt.NDArray[np.integer]) -> list[str]:
    """A table [N, L] with one text a home, a digit a layer."""
    return ["".join(map(str, row)) for row in table.tolist()]


def shown(small: SmallInstance, solvers: tuple[str, ...]) -> str:
    """Plans of an instance beside its optimum: tables, and who holds each layer's experts.

    A letter is an expert, the most called of its layer first; capital where the server executes the
    layer for some home.
    """
    proven = optimum(small)
    calls = small.problem().activations.sum(axis=0)
    lines = [f"instance {small.number}: {described(small)}"]
    servers = ", ".join(f"{s.weight} {dict(s.tasks)}" for s in small.cluster.servers)
    lines += [
        f"{servers}; {small.cluster.link}, {small.cluster.pair_links}",
        f"calls {_rounded(calls)}",
    ]
    plans = [("optimum", proven.local, proven.table, proven.value_s)]
    measure = Measure(small)
    for solver in solvers:
        placement = plan(small, solver)
        if placement is None:
            lines.append(f"{solver}: no plan")
            continue
        table = placement.execution_table
        plans.append((solver, placement.local, table, measure.value_s(placement.on_gpu, table)))
    for name, local, table, value_s in plans:
        above = value_s / proven.bound_s - 1
        lines.append(
            f"{name}: {value_s * 1e3:.4g} ms, +{above:.1%}, table {' '.join(rows_text(table))}"
        )
        for n, held in enumerate(local):
            texts = [
                _letters(held[layer], calls[layer], n in table[_users(small), layer])
                for layer in range(len(calls))
            ]
            lines.append(f"   s{n}: " + " | ".join(texts))
    return "\n".join(lines)


def _users(small: SmallInstance) -> list[int]:
    return [n for n, server in enumerate(small.cluster.servers) if server.has_users]


def _letters(held: npt.NDArray[np.bool_], calls: npt.NDArray[np.float64], executes: bool) -> str:
    order = np.argsort(-calls, kind="stable")
    text = "".join("abcdefgh"[i] if held[e] else "." for i, e in enumerate(order))
    return text.upper() if executes else text


def _rounded(calls: npt.NDArray[np.float64]) -> list[list[float]]:
    """Share of each layer's calls, in the order of letters, in per cent."""
    ordered = -np.sort(-calls, axis=1)
    shares: list[list[float]] = np.rint(100 * ordered / ordered.sum(axis=1, keepdims=True)).tolist()
    return shares


if __name__ == "__main__":
    sys.exit(main())
