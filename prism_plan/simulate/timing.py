"""GPU times by number of tokens: a roofline from the cluster file's figures, or a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.cluster import Cluster, Gpu
from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.calibration import Calibration, Curve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Timing:
    """Tables of GPU times by number of tokens, which both engines and the runtime use.

    ``kind`` int32 [G] is the row of each GPU (GPUs that are alike share one); ``dense_s``
    [kinds, T + 1] the dense part of one MoE layer; ``expert_s`` [kinds, sizes, T + 1] one
    expert's batch, ``size`` int32 [L] the expert size of each layer; ``load_s`` [G, L] bringing
    one expert from host memory. Arrays are read-only.
    """

    kind: Ints
    size: Ints
    dense_s: Floats
    expert_s: Floats
    load_s: Floats

    def __post_init__(self) -> None:
        for array in vars(self).values():
            array.setflags(write=False)


def timing(
    cluster: Cluster, model: ModelSpec, tokens: int, calibration: Calibration | None = None
) -> Timing:
    """Tables for steps of up to ``tokens`` tokens.

    Without a calibration each GPU follows its roofline (:func:`roofline_dense_s`,
    :func:`roofline_expert_s`). Loading times are those of the cluster file always.

    Raises
    ------
    InputError
        A figure of a GPU is not a positive number; the calibration lacks a server or GPU.
    """
    gpus = [
        (n, g, gpu) for n, server in enumerate(cluster.servers) for g, gpu in enumerate(server.gpus)
    ]
    sizes, size = np.unique(model.expert_bytes_by_layer, return_inverse=True)
    rows: dict[object, int] = {}
    kind = np.empty(len(gpus), np.int32)
    dense: list[Floats] = []
    expert: list[list[Floats]] = []
    counts = np.arange(tokens + 1, dtype=np.float64)
    for index, (n, g, gpu) in enumerate(gpus):
        _require_figures(gpu, f"server[{n}].gpu[{g}]")
        curves = None if calibration is None else calibration.of(cluster.servers[n].name, g)
        figures = (gpu.memory_bandwidth_gbs, gpu.tflops, gpu.launch_overhead_us)
        key = figures if curves is None else curves
        if key not in rows:
            rows[key] = len(dense)
            if curves is None:
                dense.append(roofline_dense_s(model, gpu, counts))
                expert.append([roofline_expert_s(model, gpu, int(b), counts) for b in sizes])
            else:
                dense.append(interpolate(curves.dense_s, counts))
                expert.append([interpolate(curves.expert_s, counts)] * len(sizes))
        kind[index] = rows[key]
    layer_bytes = np.array(model.expert_bytes_by_layer, np.float64)
    load_s = np.array([layer_bytes / (gpu.load_gbs * 1e9) for _, _, gpu in gpus])
    return Timing(kind, size.astype(np.int32), np.array(dense), np.array(expert), load_s)


def roofline_dense_s(model: ModelSpec, gpu: Gpu, tokens: Floats) -> Floats:
    """Seconds of the dense part of one MoE layer for a step of so many tokens, same shape.

    The model's dense bytes are taken to be spread evenly over its MoE layers, embeddings and
    output head among them. Reading the KV cache and the quadratic part of attention are left out.
    """
    return _roofline_s(gpu, model.dense_bytes / model.num_layers, model.dtype_bytes, tokens)


def roofline_expert_s(model: ModelSpec, gpu: Gpu, expert_bytes: int, tokens: Floats) -> Floats:
    """Seconds of one expert's batch by tokens, same shape (docs/design.md, section 4, rule 4)."""
    return _roofline_s(gpu, expert_bytes, model.dtype_bytes, tokens)


def _roofline_s(gpu: Gpu, weight_bytes: float, dtype_bytes: int, tokens: Floats) -> Floats:
    """Launch overhead + max(weight bytes / memory bandwidth, FLOPs / peak).

    A token costs two operations a weight; a weight is taken to have ``dtype_bytes`` bytes.
    """
    read_s = weight_bytes / (gpu.memory_bandwidth_gbs * 1e9)
    flops = 2.0 * weight_bytes / dtype_bytes * tokens
    return gpu.launch_overhead_us * 1e-6 + np.maximum(read_s, flops / (gpu.tflops * 1e12))


def interpolate(curve: Curve, tokens: Floats) -> Floats:
    """Seconds at numbers of tokens, interpolated linearly between the points of a curve.

    Before the first point its value; beyond the last, the slope of the last two points.
    """
    x, y = np.array(curve, np.float64).T
    slope = max((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.0)
    beyond: Floats = np.interp(tokens, x, y) + slope * np.maximum(tokens - x[-1], 0.0)
    return beyond


def _require_figures(gpu: Gpu, place: str) -> None:
    for key in ("memory_bandwidth_gbs", "tflops", "load_gbs"):
        value = getattr(gpu, key)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{value!r}", place=f"{place}.{key}", expected="a number above 0")
    if not (math.isfinite(gpu.launch_overhead_us) and gpu.launch_overhead_us >= 0):
        raise InputError(
            f"{gpu.launch_overhead_us!r}",
            place=f"{place}.launch_overhead_us",
            expected="a number of at least 0",
        )
