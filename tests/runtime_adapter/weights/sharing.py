"""What a spawned process of the tests runs; imports little, so that it starts quickly."""

from __future__ import annotations

from typing import Any

import torch

from runtime_adapter.weights.expert_store import Change, ExpertStore, NotHeld


def child(store: ExpertStore, pipe: Any) -> None:
    """Compute with a store of another process, as it says, until it sends None."""
    torch.set_num_threads(1)
    while (asked := pipe.recv()) is not None:
        change, layer, expert, x = asked
        if change is not None:
            store.apply(Change(*change))
        try:
            pipe.send(store.compute(layer, expert, torch.tensor(x)).tolist())
        except NotHeld as error:
            pipe.send(str(error))
