"""uniform, redundance, smartmoe, layer-partition and the packing onto GPUs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.solvers import Options, solve
from prism_plan.solvers.packing import expected_load, pack_on_gpus
from prism_plan.solvers.uniform import proportional_quotas


def instance_of(activations: np.ndarray, gpus: list[tuple[int, ...]]) -> Instance:
    """An instance with the given slots per GPU."""
    model = ModelShape("m", tuple(range(activations.shape[1])), activations.shape[2], 1, 1)
    names = tuple(f"s{n}" for n in range(len(activations)))
    return Instance(model, names, activations, tuple(gpus))


RANDOM = np.random.default_rng(0).gamma(0.5, size=(3, 6, 8))


def test_uniform_spreads_in_proportion() -> None:
    """One copy each, quotas by largest remainder, and every layer is spread too."""
    local = solve(instance_of(RANDOM, [(20,), (20,), (40,)]), "uniform").local
    assert local.sum(axis=0).tolist() == np.ones((6, 8)).tolist()
    assert local.sum(axis=(1, 2)).tolist() == [12, 12, 24]
    assert local.sum(axis=2).tolist() == [[2] * 6, [2] * 6, [4] * 6]


def test_quotas_never_exceed_capacity() -> None:
    """Over all small capacities: parts sum to the total, none above its capacity."""
    for capacity in itertools.product(range(6), repeat=3):
        array = np.array(capacity)
        for total in range(int(array.sum()) + 1):
            quotas = proportional_quotas(total, array)
            assert quotas.sum() == total
            assert (quotas <= array).all()
            if array.sum():
                assert (abs(quotas - total * array / array.sum()) < 1).all()


def test_redundance_adds_to_uniform() -> None:
    """All slots are used, the uniform copy stays, the rest is drawn by the seed."""
    instance = instance_of(RANDOM, [(20,), (30,), (40,)])
    base = solve(instance, "uniform").local
    filled = solve(instance, "redundance", Options(seed=3)).local
    assert (filled >= base).all()
    assert filled.sum(axis=(1, 2)).tolist() == [20, 30, 40]


def test_redundance_draws_evenly() -> None:
    """Over many seeds each expert that a server lacks is drawn equally often."""
    instance = instance_of(np.ones((2, 1, 6)), [(5,), (5,)])
    base = solve(instance, "uniform").local
    drawn = np.zeros((2, 1, 6))
    for seed in range(600):
        drawn += solve(instance, "redundance", Options(seed=seed)).local & ~base
    lacked = drawn[~base]
    assert lacked == pytest.approx(np.full(6, 400), rel=0.15)  # 2 of 3 lacking, 600 times


def test_smartmoe_balances_load() -> None:
    """One copy each; the load of GPUs with ample room differs by less than one expert."""
    instance = instance_of(RANDOM, [(48,), (48, 48), (48,)])
    placement = solve(instance, "smartmoe")
    local = placement.local
    assert (local.sum(axis=0) == 1).all()
    load = RANDOM.sum(axis=0)
    by_server = [(local[n] * load).sum() for n in range(3)]
    share = load.sum() / 4
    assert by_server == pytest.approx([share, 2 * share, share], abs=load.max())


def test_layer_partition_gives_whole_layers() -> None:
    """Owners in proportion, copies of the rarest layer first, left-over slots by frequency."""
    instance = instance_of(RANDOM, [(16,), (19,), (32,)])
    local = solve(instance, "layer-partition").local
    whole = local.all(axis=2)
    # quotas of 6 layers over 16, 19, 32 slots: 1, 2, 3; room for 2, 2, 4 whole layers
    assert np.flatnonzero(whole[0]).tolist() == [0, 1]  # owns 0, copies 1
    assert np.flatnonzero(whole[1]).tolist() == [1, 2]
    assert np.flatnonzero(whole[2]).tolist() == [0, 3, 4, 5]  # copies 0: one copy, lowest index
    rest = np.where(whole[1][:, None], -1, RANDOM[1])
    favourites = np.argsort(-rest.ravel())[:3]
    partly = local[1] & ~whole[1][:, None]
    assert sorted(favourites) == np.flatnonzero(partly).tolist()


def test_layer_partition_where_no_layer_fits() -> None:
    """Servers too small for one layer share the experts out; everything is covered."""
    instance = instance_of(RANDOM, [(7,)] * 2 + [(36,)])
    local = solve(instance, "layer-partition").local
    assert local.any(axis=0).all()
    assert local.sum(axis=(1, 2)).max() <= 36


def test_packing_balances_and_fills() -> None:
    """Largest load first on the least loaded GPU with room: loads differ by at most one expert."""
    instance = instance_of(RANDOM, [(48,), (40, 40), (30, 10, 30)])
    local = np.ones(RANDOM.shape, bool)
    on_gpu = pack_on_gpus(instance, local)
    load = expected_load(RANDOM, local)
    assert on_gpu[0].all()
    for n, gpus in ((1, [1, 2]), (2, [3, 4, 5])):
        assert (on_gpu[gpus].sum(axis=0) == 1).all()
        totals = [(on_gpu[g] * load[n]).sum() for g in gpus]
        full = [on_gpu[g].sum() == c for g, c in zip(gpus, instance.gpu_capacity[n], strict=True)]
        open_ = [t for t, f in zip(totals, full, strict=True) if not f]
        if len(open_) > 1:
            assert max(open_) - min(open_) <= load[n].max()
    assert on_gpu.sum(axis=(1, 2)).tolist()[4] <= 10


def test_expected_load_adds_up() -> None:
    """Every call is served once: own calls at home, others spread over the holders."""
    local = np.random.default_rng(1).random(RANDOM.shape) < 0.5
    local[0] |= ~local.any(axis=0)
    assert expected_load(RANDOM, local).sum(axis=0) == pytest.approx(RANDOM.sum(axis=0))


def test_packing_stays_near() -> None:
    """Experts that stay on a server stay on their GPU, so that nothing is loaded twice."""
    instance = instance_of(RANDOM, [(20, 20), (30, 10), (24, 24)])
    old = solve(instance, "prism")
    moved = instance.replace(activations=np.random.default_rng(2).gamma(0.5, size=RANDOM.shape))
    new = solve(moved, "exact", Options(reference=old))
    stayed = old.local & new.local
    for g, n in enumerate(new.server_of_gpu):
        assert (new.on_gpu[g] & stayed[n] == old.on_gpu[g] & stayed[n]).all()
