"""Table and plot of the recorded experiment on shaped lines.

    python -m studies.testbed.experiment --trace T.parquet --cluster studies/shaped-v2lite.toml
        --seeds 0,1,2 --requests 6 -o studies/shaped.json     # as root; 45 min of a quiet machine
    python -m studies.shaped            # prints the table, writes studies/shaped.png
    python -m studies.shaped shaped-spans-a100      # of plans that say where layers execute

Results: studies/shaped.json and those of the name that is given; discussed in README.md and
studies/README.md.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
#: The bound on prediction errors that the project promises, and the one that it aims at.
MAX_ERROR, TARGET_ERROR = 0.15, 0.05
Rows = dict[int, dict[str, Any]]  # by seed


def by_round_trip(values: dict[str, Any]) -> dict[float, dict[str, Rows]]:
    """Runs that are not void, by round trip, placement and seed."""
    found: dict[float, dict[str, Rows]] = {}
    for row in values["rows"]:
        if not row["void"]:
            found.setdefault(row["rtt_ms"], {}).setdefault(row["solver"], {})[row["seed"]] = row
    return found


def errors(rows: Rows, key: str = "mean") -> list[float]:
    """Predicted over measured latency, less 1, of each seed."""
    return [row["predicted"]["latency_s"][key] / row["latency_s"][key] - 1 for row in rows.values()]


def table(solvers: dict[str, Rows]) -> str:
    """A Markdown table of the placements at one round trip."""
    lines = [
        "| placement | measured mean | predicted | error, worst seed | p95 measured | predicted "
        "| p99 measured | predicted | remote | waiting | payload |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for solver, rows in solvers.items():
        runs = list(rows.values())
        measured = [run["latency_s"]["mean"] for run in runs]

        def average(key: str, predicted: bool, runs: list[Any] = runs) -> float:
            return mean((run["predicted"] if predicted else run)["latency_s"][key] for run in runs)

        error = average("mean", True) / average("mean", False) - 1
        worst = max(errors(rows), key=abs)
        lines.append(
            f"| `{solver}` | {mean(measured):.2f} s ({min(measured):.2f}–{max(measured):.2f}) "
            f"| {average('mean', True):.2f} s | {error:+.1%}, {worst:+.1%} "
            f"| {average('p95', False):.2f} s | {average('p95', True):.2f} s "
            f"| {average('p99', False):.2f} s | {average('p99', True):.2f} s "
            f"| {mean(run['remote_share'] for run in runs):.1%} "
            f"| {mean(run['waiting_share'] for run in runs):.1%} "
            f"| {mean(run['payload_bytes'] for run in runs) / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def short_table(found: dict[float, dict[str, Rows]]) -> str:
    """A Markdown table for the README: means over the seeds, all round trips side by side."""
    trips = [f"{rtt_ms:g} ms" for rtt_ms in found]
    head = [f"{trip}: measured | predicted | worst seed" for trip in trips]
    lines = [
        f"| placement | {' | '.join(head)} | remote | waiting | payload |",
        "|" + "---|" * (4 + 3 * len(trips)),
    ]
    for solver in next(iter(found.values())):
        cells = []
        for solvers in found.values():
            runs = list(solvers[solver].values())
            measured = mean(run["latency_s"]["mean"] for run in runs)
            predicted = mean(run["predicted"]["latency_s"]["mean"] for run in runs)
            worst = max(errors(solvers[solver]), key=abs)
            cells += [f"{measured:.2f} s", f"{predicted:.2f} s", f"{worst:+.1%}"]
        for key in ("remote_share", "waiting_share"):
            cells.append(f"{mean(run[key] for run in runs):.1%}")
        cells += [f"{mean(run['payload_bytes'] for run in runs) / 1e9:.2f} GB"]
        lines.append(f"| `{solver}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def ranking(solvers: dict[str, Rows]) -> tuple[int, list[str]]:
    """Count the pairs that all seeds measure in one order; list those predicted otherwise."""
    clear, wrong = 0, []
    for one, other in combinations(solvers, 2):
        seeds = sorted(solvers[one].keys() & solvers[other].keys())

        def gap(of: Any, one: str = one, other: str = other, seeds: list[int] = seeds) -> list[Any]:
            return [of(solvers[other][s]) - of(solvers[one][s]) for s in seeds]

        measured = gap(lambda row: row["latency_s"]["mean"])
        predicted = mean(gap(lambda row: row["predicted"]["latency_s"]["mean"]))
        if all(g > 0 for g in measured) or all(g < 0 for g in measured):
            clear += 1
            if predicted * measured[0] < 0:
                wrong.append(f"{one} and {other}")
    return clear, wrong


def draw(found: dict[float, dict[str, Rows]], path: Path) -> None:
    """Draw measured and predicted means of every seed, a panel for each round trip."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from prism_plan.plotting import save, solver_styles
    from prism_plan.plotting.style import matplotlib_settings

    with matplotlib_settings():
        figure = Figure(figsize=(11, 4.4), dpi=100, layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (rtt_ms, solvers) in zip(panels, found.items(), strict=True):
            styles = solver_styles((solver, solver) for solver in solvers)
            for at, (style, rows) in enumerate(zip(styles, solvers.values(), strict=True)):
                for nth, run in enumerate(rows.values()):
                    x = at + 0.22 * (nth - (len(rows) - 1) / 2)
                    measured = run["latency_s"]["mean"]
                    predicted = run["predicted"]["latency_s"]["mean"]
                    axes.bar(x, measured, 0.2, color=style.colour)
                    (within,) = axes.plot(
                        [x, x], [measured * (1 - MAX_ERROR), measured * (1 + MAX_ERROR)],
                        color="black", linewidth=1,
                    )  # fmt: skip
                    (mark,) = axes.plot(
                        x, predicted, linestyle="none", marker="D", color="white",
                        markeredgecolor="black", markersize=5,
                    )  # fmt: skip
            axes.set_xticks(range(len(solvers)), list(solvers), rotation=20)
            axes.set_title(f"round trip {rtt_ms:g} ms added to every call")
        slowest = max(
            run["latency_s"]["mean"]
            for solvers in found.values()
            for rows in solvers.values()
            for run in rows.values()
        )
        panels[0].set_ylim(0, 1.35 * slowest)  # of all panels
        panels[0].set_ylabel("mean request latency, s (a bar a seed)")
        handles = [Patch(facecolor="#999999"), mark, within]
        panels[0].legend(handles, ["measured", "predicted", f"measured ± {MAX_ERROR:.0%}"], ncols=3)
    save(figure, path)


def main() -> None:
    """Print the table and draw."""
    name = sys.argv[1] if sys.argv[1:] else "shaped"
    values = json.loads((HERE / f"{name}.json").read_text())
    found = by_round_trip(values)
    print(values["provenance"])
    for rtt_ms, solvers in found.items():
        print(f"\nround trip {rtt_ms:g} ms\n\n{table(solvers)}\n")
        every = [abs(error) for rows in solvers.values() for error in errors(rows)]
        clear, wrong = ranking(solvers)
        print(
            f"{len(every)} runs: error at most {max(every):.1%}, mean {mean(every):.1%}, "
            f"{sum(error <= TARGET_ERROR for error in every)} within {TARGET_ERROR:.0%}; "
            f"{clear} pairs in one order by every seed, predicted otherwise: {wrong or 'none'}"
        )
    print(f"\n{short_table(found)}")
    void = [row for row in values["rows"] if row["void"]]
    print(f"\nvoid: {len(void)} runs; repeated: {sum(r['attempts'] > 1 for r in values['rows'])}")
    draw(found, HERE / f"{name}.png")


if __name__ == "__main__":
    main()
