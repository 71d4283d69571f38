"""Losses drawn at random for the tests of the engines: when, of whom, and what is done then."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.migration_step import MigrationStep
from prism_plan.simulate.losses import Loss, LossPlan
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import contended_scenario, drawn_scenario


def drawn_run(
    rng: np.random.Generator, *, ties: bool = False, contended: bool = False
) -> tuple[Scenario, LossPlan]:
    """A scenario of the requests that are served, and losses; see the functions that draw them."""
    if contended:
        short_kb = float(rng.choice([0.0, 0.262, 0.6]))
        scenario = contended_scenario(rng, ties=ties, short_kb=short_kb, restarts=True)
    else:
        scenario = drawn_scenario(rng, ties=ties, most=20, restarts=True)
    plan = drawn_plan(rng, scenario, ties=ties)
    return dataclasses.replace(scenario, requests=plan.served(scenario.requests)), plan


def drawn_plan(rng: np.random.Generator, scenario: Scenario, *, ties: bool = False) -> LossPlan:
    """Up to four losses of all servers but one that stays; ``ties``: at whole seconds."""
    servers = scenario.placement.servers
    stays = int(rng.integers(len(servers)))
    losses = []
    for n, name in enumerate(servers):
        at_s = 0.0
        while n != stays and len(losses) < 4 and rng.random() < 0.7:
            at_s += float(rng.integers(0, 6)) if ties else float(rng.uniform(0, 8))
            back_s = at_s + (float(rng.integers(1, 6)) if ties else float(rng.uniform(0.1, 8)))
            comes_back = bool(rng.random() < 0.6)
            losses.append(Loss(name, at_s, back_s if comes_back else None))
            if not comes_back:
                break
            at_s = back_s + 0.5
    timeout_s = float(rng.choice([0.0, 1.0, 3.0]))
    return LossPlan(tuple(losses), timeout_s, float(rng.choice([0.5, 60.0])))


def run_with_losses(
    engine: Any, plan: LossPlan, rng: np.random.Generator, *, repair: bool = True,
    moves: bool = True, max_events: int | None = None,
) -> None:  # fmt: skip
    """Run to the end; each notice and return begins random tables, and with ``moves`` a migration.

    With ``repair`` it loads experts that nobody holds.
    """
    scenario: Scenario = engine.scenario
    server_of = scenario.placement.server_of_gpu
    away: set[int] = set()
    for event in plan.events(scenario.placement.servers):
        while not engine.advance(event.at_s, max_events):
            pass
        if event.kind == "loss":
            engine.lose(event.server)
            continue
        (away.add if event.kind == "notice" else away.discard)(event.server)
        held = engine.on_gpu().reshape(len(server_of), -1)
        there = [n for n in range(len(scenario.concurrency)) if n not in away]
        gpus = [g for g, n in enumerate(server_of) if n not in away]
        held[[g for g, n in enumerate(server_of) if n in away]] = False
        steps = drawn_steps(rng, held, gpus, repair) if moves else []
        tables = [drawn_table(rng, scenario.execution, there, event.server) for _ in range(2)]
        do = engine.notice if event.kind == "notice" else engine.rejoin
        do(event.server, steps, tables[0], tables[1] if rng.random() < 0.5 else None)
    while not engine.advance(np.inf, max_events):
        pass


def drawn_steps(
    rng: np.random.Generator, held: npt.NDArray[np.bool_], gpus: list[int], repair: bool
) -> list[MigrationStep]:
    """Loads of some pairs, and drops of copies that others keep; some wait for one before them."""
    steps: list[MigrationStep] = []

    def needs() -> tuple[int, ...]:
        return (int(rng.integers(len(steps))),) if steps and rng.random() < 0.3 else ()

    missing = np.flatnonzero(~held.any(axis=0)) if repair else []
    for pair in missing:
        steps.append(MigrationStep("load", int(rng.choice(gpus)), int(pair), needs()))
    for pair in rng.permutation(held.shape[1])[: int(rng.integers(4))].tolist():
        free = [g for g in gpus if not held[g, pair]]
        if free and held[:, pair].any():
            steps.append(MigrationStep("load", int(rng.choice(free)), pair, needs()))
            holders = np.flatnonzero(held[:, pair])
            if rng.random() < 0.5:
                need = (len(steps) - 1,)
                steps.append(MigrationStep("drop", int(rng.choice(holders)), pair, need))
    return steps


def drawn_table(
    rng: np.random.Generator, planned: npt.NDArray[np.int32], there: list[int], server: int
) -> npt.NDArray[np.int32]:
    """The planned table, with other servers in place of those that are away."""
    table = planned.copy()
    away = ~np.isin(table, there) & (table != np.arange(len(table))[:, None])
    table[away] = rng.choice(there, int(away.sum()))
    living = np.isin(np.arange(len(table)), there)
    own = ~np.isin(table, there) & living[:, None]
    table[own] = rng.choice(there, int(own.sum()))
    return table
