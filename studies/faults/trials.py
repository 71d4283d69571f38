"""The trials: 48 that are scripted, four power cuts, and 52 drawn at random, each from a seed.

Scripted ones cross both checkpoints, serving and moving, the kind of process and what happens to
it. Of the 60 combinations those of the two harder faults are all there (40), and of pauses of two
seconds, which are shorter than the timeout, eight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Model = Literal["deepseek-v2", "mixtral"]
Moment = Literal["serving", "moving"]
#: ``front`` is a server's driver, which a worker does not outlive; ``both`` the whole process group
#: of the server; ``service`` and ``scheduler`` are the children of ``store``, which is all three.
Target = Literal["front", "worker", "both", "scheduler", "service", "store"]

MODELS: tuple[Model, ...] = ("deepseek-v2", "mixtral")
MOMENTS: tuple[Moment, ...] = ("serving", "moving")
SCRIPTED_TARGETS: tuple[Target, ...] = ("front", "worker", "both", "scheduler", "store")
TARGETS: tuple[Target, ...] = (*SCRIPTED_TARGETS, "service")
#: Targets of which each server has its own.
OF_SERVERS: tuple[Target, ...] = ("front", "worker", "both")
SERVERS = ("edge-0", "edge-1", "edge-2")
#: Seconds for which a process is stopped; None: it is killed.
SCRIPTED_STOPS_S = (None, 8.0, 2.0)
#: Pauses of two seconds that are tried.
SHORT_STOPS = {
    ("deepseek-v2", "serving"): ("front", "both"),
    ("deepseek-v2", "moving"): ("worker", "scheduler"),
    ("mixtral", "serving"): ("worker", "scheduler"),
    ("mixtral", "moving"): ("both", "store"),
}
#: Seconds without an answer after which a server is taken for lost.
TIMEOUT_S = 3.0
#: Before a server is missed, and after its loss was agreed.
RESTART_AFTER_S = (0.5, 6.0)
NUM_RANDOM = 52


@dataclass(frozen=True)
class Fault:
    """What happens to a kind of process, and when.

    ``stop_s`` are the seconds for which it is stopped before it continues; None kills it. ``wait``
    says whether all has to be well again before it happens; ``after_s`` are the seconds from then,
    or from the fault before, to this one.
    """

    target: Target
    server: str = ""
    stop_s: float | None = None
    wait: bool = True
    after_s: float = 0.0

    def __str__(self) -> str:
        what = "kill" if self.stop_s is None else f"stop {self.stop_s:g} s"
        return f"{what} {self.target}" + (f" of {self.server}" if self.server else "")


@dataclass(frozen=True)
class Trial:
    """A run of three servers and what happens to it.

    ``replicas`` is how many servers hold each expert; ``roomy`` whether two servers have room for
    as many replicas as three; ``own_store`` whether the first server starts the store; ``journal``
    whether servers write one, so that a restarted one goes on with its requests; ``peers`` whether
    weights come from servers rather than from the checkpoint. What was killed is started again
    ``restart_after_s`` later. With ``spans`` layers execute on servers that are drawn by the seed,
    and each move brings another table.
    """

    name: str
    model: Model
    moment: Moment
    faults: tuple[Fault, ...]
    seed: int = 0
    replicas: int = 2
    roomy: bool = False
    own_store: bool = False
    journal: bool = False
    peers: bool = True
    restart_after_s: float = RESTART_AFTER_S[0]
    spans: bool = False

    def __str__(self) -> str:
        parts = [self.model, self.moment, f"{self.replicas} replicas"]
        parts += [
            word for word in ("roomy", "own_store", "journal", "spans") if getattr(self, word)
        ]
        if not self.peers:
            parts.append("weights from the checkpoint")
        parts.append(f"restart after {self.restart_after_s:g} s")
        return f"{self.name}: {', '.join(parts)}: " + "; ".join(map(str, self.faults))

    def to_json(self) -> dict[str, Any]:
        """The trial as a JSON object."""
        return asdict(self)


def scripted() -> list[Trial]:
    """The 48 scripted trials, with two replicas of each expert."""
    found: list[Trial] = []
    servers = {target: itertools.cycle(SERVERS) for target in OF_SERVERS}
    for model, moment, stop_s, target in itertools.product(
        MODELS, MOMENTS, SCRIPTED_STOPS_S, SCRIPTED_TARGETS
    ):
        if stop_s == 2.0 and target not in SHORT_STOPS[model, moment]:
            continue
        number = len(found)
        found.append(
            Trial(
                name=f"s{number:02}",
                model=model,
                moment=moment,
                faults=(Fault(target, next(servers.get(target, iter(("",)))), stop_s),),
                seed=number,
                journal=number % 2 == 1,
                peers=number % 4 < 2,
                restart_after_s=RESTART_AFTER_S[number // 4 % 2],
            )
        )
    return found


def drawn(seed: int) -> Trial:
    """A trial drawn from a seed: one to three faults, which may overlap."""
    generator = np.random.default_rng(seed)

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(generator.integers(len(options)))]

    own_store = bool(generator.random() < 0.25)
    faults: list[Fault] = []
    for number in range(int(generator.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))):
        # the store of a first server dies with it, so that is a fault of a server there
        target = one_of(OF_SERVERS if own_store else TARGETS)
        killed = bool(generator.random() < 0.5)
        faults.append(
            Fault(
                target,
                one_of(SERVERS) if target in OF_SERVERS else "",
                None if killed else round(float(generator.uniform(0.5, 9.0)), 1),
                wait=number == 0 or bool(generator.random() < 0.5),
                after_s=round(float(generator.uniform(0.0, 3.0)), 1),
            )
        )
    return Trial(
        name=f"r{seed:02}",
        model=one_of(MODELS),
        moment=one_of(MOMENTS),
        faults=tuple(faults),
        seed=seed,
        replicas=one_of((1, 2, 2)),
        roomy=one_of((False, True)),
        own_store=own_store,
        journal=one_of((False, True)),
        peers=one_of((False, True)),
        restart_after_s=one_of(RESTART_AFTER_S),
    )


def power_cuts() -> list[Trial]:
    """All servers are killed at once, without the store's processes and with them."""
    found: list[Trial] = []
    for model, with_store in itertools.product(MODELS, (False, True)):
        hit = [Fault("both", SERVERS[0])]
        hit += [Fault("both", server, wait=False) for server in SERVERS[1:]]
        if with_store:
            hit.append(Fault("store", wait=False))
        number = len(found)
        found.append(
            Trial(
                name=f"p{number:02}",
                model=model,
                moment="serving",
                faults=tuple(hit),
                seed=number,
                journal=True,
                peers=number % 2 == 0,
                restart_after_s=RESTART_AFTER_S[number // 2],
            )
        )
    return found


def all_trials(first_seed: int = 0) -> list[Trial]:
    """The scripted trials, the power cuts, and the random ones of consecutive seeds."""
    drawn_ones = [drawn(first_seed + number) for number in range(NUM_RANDOM)]
    return [*scripted(), *power_cuts(), *drawn_ones]
