"""Whether `latency` is as good as the best of the others in a cell, and the table that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from studies.grid.measure import BASELINES, JUDGED, Run
from studies.grid.record import SEEDS, CellRecord

#: How far behind the best baseline the mean may be, and p99 and the worst home.
MEAN_MARGIN, TAIL_MARGIN = 0.02, 0.05
#: Cells whose best baseline is at this load or above are not judged: queues grow without end.
MAX_LOAD = 0.8

Runs = Mapping[str, Mapping[int, Run]]


@dataclass(frozen=True)
class Verdict:
    """What a cell says.

    ``result`` is "PASS", "FAIL", "loaded" (no baseline fits below :data:`MAX_LOAD`, not judged) or
    "open" (runs are missing); ``why`` names what failed or is missing. ``best`` is the baseline of
    the best mean over ``seeds``, with ``best_s`` seconds at a load of ``load``; ``second`` and
    ``behind`` the next one and how far it is behind, 0.1 for ten percent. The ratios are those of
    the judged solver to the best baseline; ``by_seed`` [seeds] that of the mean of each seed.
    """

    result: str
    why: str = ""
    best: str = ""
    best_s: float = 0.0
    load: float = 0.0
    second: str = ""
    behind: float | None = None
    seeds: int = 0
    ratio: float | None = None
    by_seed: tuple[float, ...] = ()
    p99_ratio: float | None = None
    home_ratio: float | None = None


@dataclass(frozen=True)
class Summary:
    """One solver in one cell: means over seeds, ``home_s`` of the home that is worst in them."""

    by_seed: tuple[float, ...]
    p99_s: float
    home_s: float
    load: float

    @property
    def mean_s(self) -> float:
        """Mean over the seeds."""
        return mean(self.by_seed)


def summary(runs: Sequence[Run]) -> Summary | None:
    """Means over some seeds; ``None`` where the solver found no plan in one of them."""
    if any(run.mean_s is None for run in runs):
        return None
    homes = zip(*(run.homes_s for run in runs), strict=True)
    return Summary(
        tuple(_number(run.mean_s) for run in runs),
        mean(_number(run.p99_s) for run in runs),
        max(mean(of_home) for of_home in homes),
        mean(_number(run.busiest) for run in runs),
    )


def _number(value: float | None) -> float:
    assert value is not None
    return value


def verdict(runs: Runs, judged: str = JUDGED, baselines: Iterable[str] = BASELINES) -> Verdict:
    """What the runs of a cell say; seeds that a solver lacks are left out for all of them.

    A baseline counts where it has a plan in every seed.
    """
    baselines = list(baselines)
    if missing := [name for name in baselines if not runs.get(name)]:
        return Verdict("open", f"not run: {', '.join(missing)}")
    of_all = [runs[name] for name in (*baselines, *[judged] * bool(runs.get(judged)))]
    seeds = sorted(set.intersection(*(set(rows) for rows in of_all)))
    if not seeds:
        return Verdict("open", "no seed that every solver has")

    def over_seeds(name: str) -> Summary | None:
        return summary([runs[name][seed] for seed in seeds])

    found = {name: over_seeds(name) for name in baselines}
    fitting = {name: row for name, row in found.items() if row is not None}
    if not fitting:
        return Verdict("loaded", "no baseline fits", seeds=len(seeds))
    first, *others = sorted(fitting, key=lambda name: fitting[name].mean_s)
    best = fitting[first]
    told = Verdict(
        "open",
        f"not run: {judged}",
        first,
        best.mean_s,
        best.load,
        others[0] if others else "",
        fitting[others[0]].mean_s / best.mean_s - 1 if others else None,
        len(seeds),
    )
    return _judged(told, best, over_seeds(judged)) if runs.get(judged) else told


def _judged(told: Verdict, best: Summary, own: Summary | None) -> Verdict:
    """The verdict with the judged solver's ratios to the best baseline."""
    judgeable = best.load < MAX_LOAD
    if own is None:
        return replace(told, result="FAIL" if judgeable else "loaded", why="no plan in some seed")
    ratios = {
        "mean": (own.mean_s / best.mean_s, MEAN_MARGIN),
        "p99": (own.p99_s / best.p99_s, TAIL_MARGIN),
        "worst home": (own.home_s / best.home_s, TAIL_MARGIN),
    }
    failed = [name for name, (ratio, margin) in ratios.items() if ratio > 1 + margin]
    return replace(
        told,
        result=("FAIL" if failed else "PASS") if judgeable else "loaded",
        why=", ".join(failed),
        ratio=ratios["mean"][0],
        by_seed=tuple(a / b for a, b in zip(own.by_seed, best.by_seed, strict=True)),
        p99_ratio=ratios["p99"][0],
        home_ratio=ratios["worst home"][0],
    )


# ------------------------------------------------------------------------------------------ report


def report(records: Mapping[str, CellRecord], names: Iterable[str]) -> tuple[str, bool]:
    """The table of these cells with what it adds up to, and whether the claim holds in all."""
    names = list(names)
    verdicts = {
        name: verdict(records[name].runs) if name in records else Verdict("open", "not run")
        for name in names
    }
    lines = [
        "| cell | every | best baseline | mean | load | next | `latency` | by seed | p99 | "
        "worst home | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(name, records.get(name), found) for name, found in verdicts.items()),
        "",
        *_sums(records, verdicts),
    ]
    holds = all(
        found.result in ("PASS", "loaded") and found.seeds == len(SEEDS)
        for found in verdicts.values()
    )
    return "\n".join(lines), holds


def _row(name: str, record: CellRecord | None, found: Verdict) -> str:
    ratios = [found.ratio, found.p99_ratio, found.home_ratio]
    ratio, p99, home = ("–" if value is None else f"{value:.3f}" for value in ratios)
    spread = f"{min(found.by_seed):.3f}–{max(found.by_seed):.3f}" if found.by_seed else "–"
    result = found.result + f": {found.why}" * bool(found.why)
    cells = [
        name,
        f"{record.interval_s:.3g} s" if record else "–",
        f"`{found.best}`" if found.best else "–",
        f"{found.best_s:.3g} s" if found.best else "–",
        f"{found.load:.0%}" if found.best else "–",
        f"`{found.second}` +{found.behind:.1%}" if found.behind is not None else "–",
        ratio, spread, p99, home,
        result,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _sums(records: Mapping[str, CellRecord], verdicts: Mapping[str, Verdict]) -> Iterable[str]:
    counted = {
        word: sum(found.result == word for found in verdicts.values())
        for word in ("PASS", "FAIL", "loaded", "open")
    }
    yield f"{len(verdicts)} cells: " + ", ".join(f"{n} {word}" for word, n in counted.items())
    few = [name for name, found in verdicts.items() if 0 < found.seeds < len(SEEDS)]
    if few:
        yield f"fewer than {len(SEEDS)} seeds, so not the claim: {', '.join(few)}"
    best: dict[str, int] = {}
    for found in verdicts.values():
        if found.best:
            best[found.best] = best.get(found.best, 0) + 1
    if best:
        ranked = sorted(best.items(), key=lambda item: -item[1])
        yield "best baseline: " + ", ".join(f"`{name}` {n}" for name, n in ranked)
    ratios = [
        found.ratio for found in verdicts.values() if found.ratio and found.result != "loaded"
    ]
    if ratios:
        yield f"`latency` to the best baseline: {min(ratios):.3f} to {max(ratios):.3f}"
    together: dict[str, list[str]] = {}
    for solver, commits in _commits(records, verdicts).items():
        told = ", ".join(f"{commit} ({n} runs)" for commit, n in commits.items())
        together.setdefault(told, []).append(f"`{solver}`")
    for told, solvers in together.items():
        yield f"commits of {', '.join(solvers)}: {told}"


def _commits(records: Mapping[str, CellRecord], names: Iterable[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name in names:
        if name in records:
            for solver, rows in records[name].runs.items():
                of_solver = found.setdefault(solver, {})
                for run in rows.values():
                    of_solver[run.commit] = of_solver.get(run.commit, 0) + 1
    return found
