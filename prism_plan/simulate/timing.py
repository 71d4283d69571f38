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
    """Tables of GPU times, which both engines and the runtime use. Arrays are read-only.

    ``kind`` int32 [G] is the row of each GPU (GPUs that are alike share one). The dense part of one
    MoE layer, attention included: ``prefill_s`` [kinds, classes, T + 1] of a prompt by its tokens,
    ``attention_s``, of these the seconds that attention adds; ``decode_s`` [kinds, classes, C + 1]
    of a decode step by the tokens before it; ``dense_class`` int32 [L] is the class of each layer.
    ``expert_s`` [kinds, sizes, T + 1] is one expert's batch, ``size`` int32 [L] the expert size of
    each layer; ``load_s`` [G, L] bringing one expert from host memory.
    """

    kind: Ints
    dense_class: Ints
    size: Ints
    prefill_s: Floats
    attention_s: Floats
    decode_s: Floats
    expert_s: Floats
    load_s: Floats

    def __post_init__(self) -> None:
        for array in vars(self).values():
            array.setflags(write=False)

    def dense_s(self, gpu: int, layer: int, tokens: int, context: int | None = None) -> float:
        """Seconds of the dense part of a layer on a GPU: of a prompt of so many tokens.

        With ``context`` of a decode step after so many tokens.
        """
        of = self.kind[gpu], self.dense_class[layer]
        return float(self.prefill_s[of][tokens] if context is None else self.decode_s[of][context])


def timing(
    cluster: Cluster,
    model: ModelSpec,
    tokens: int,
    calibration: Calibration | None = None,
    *,
    context: int = 0,
) -> Timing:
    """Tables for steps of up to ``tokens`` tokens, and decode steps after up to ``context``.

    Without a calibration each GPU follows its roofline (:func:`roofline_prefill_s`,
    :func:`roofline_decode_s`, :func:`roofline_expert_s`); a calibration has one dense time by
    tokens, to which no attention is added. Loading times are those of the cluster file always.

    Raises
    ------
    InputError
        A figure of a GPU is not a positive number; the calibration lacks a server or GPU.
    """
    gpus = [
        (n, g, gpu) for n, server in enumerate(cluster.servers) for g, gpu in enumerate(server.gpus)
    ]
    sizes, size = np.unique(model.expert_bytes_by_layer, return_inverse=True)
    classes, dense_class = np.unique(model.decoder_layers_by_layer, return_inverse=True)
    rows: dict[object, int] = {}
    kind = np.empty(len(gpus), np.int32)
    prefill: list[list[Floats]] = []
    attention: list[list[Floats]] = []
    decode: list[list[Floats]] = []
    expert: list[list[Floats]] = []
    counts = np.arange(tokens + 1, dtype=np.float64)
    contexts = np.arange(context + 1, dtype=np.float64)
    for index, (n, g, gpu) in enumerate(gpus):
        _require_figures(gpu, f"server[{n}].gpu[{g}]")
        curves = None if calibration is None else calibration.of(cluster.servers[n].name, g)
        figures = (gpu.memory_bandwidth_gbs, gpu.tflops, gpu.launch_overhead_us)
        key = figures if curves is None else curves
        if key not in rows:
            rows[key] = len(prefill)
            if curves is None:
                prefill.append([roofline_prefill_s(model, gpu, counts, int(c)) for c in classes])
                without = roofline_prefill_s(model, gpu, counts, 0)
                attention.append([with_it - without for with_it in prefill[-1]])
                decode.append([roofline_decode_s(model, gpu, contexts, int(c)) for c in classes])
                expert.append([roofline_expert_s(model, gpu, int(b), counts) for b in sizes])
            else:
                measured = interpolate(curves.dense_s, counts)
                prefill.append([measured] * len(classes))
                attention.append([np.zeros_like(counts)] * len(classes))
                decode.append([np.full(len(contexts), measured[1])] * len(classes))
                expert.append([interpolate(curves.expert_s, counts)] * len(sizes))
        kind[index] = rows[key]
    layer_bytes = np.array(model.expert_bytes_by_layer, np.float64)
    return Timing(
        kind=kind,
        dense_class=dense_class.astype(np.int32),
        size=size.astype(np.int32),
        prefill_s=np.array(prefill),
        attention_s=np.array(attention),
        decode_s=np.array(decode),
        expert_s=np.array(expert),
        load_s=np.array([layer_bytes / (gpu.load_gbs * 1e9) for _, _, gpu in gpus]),
    )


def roofline_prefill_s(model: ModelSpec, gpu: Gpu, tokens: Floats, decoder_layers: int) -> Floats:
    """Seconds of the dense part of one MoE layer for a prompt of so many tokens, same shape.

    The model's dense bytes are taken to be spread evenly over its MoE layers, embeddings and
    output head among them. ``decoder_layers`` execute with the layer: attention costs each of them
    ``attention_flops`` for half of the pairs of tokens, where the model spec has them.
    """
    pairs = tokens * tokens / 2
    attention = float(model.attention_flops or 0) * decoder_layers * pairs
    weight_bytes = model.dense_bytes / model.num_layers
    return _roofline_s(gpu, weight_bytes, _flops(model, weight_bytes) * tokens + attention)


def roofline_decode_s(model: ModelSpec, gpu: Gpu, context: Floats, decoder_layers: int) -> Floats:
    """Seconds of the dense part of one MoE layer for one token after so many, same shape.

    As :func:`roofline_prefill_s`; keys and values of the ``context`` are read as the weights are.
    """
    weight_bytes = model.dense_bytes / model.num_layers
    share = model.kv_bytes_per_token * decoder_layers / model.num_decoder_layers
    return _roofline_s(gpu, weight_bytes + context * share, _flops(model, weight_bytes))


def roofline_expert_s(model: ModelSpec, gpu: Gpu, expert_bytes: int, tokens: Floats) -> Floats:
    """Seconds of one expert's batch by tokens, same shape (docs/design.md, section 4, rule 4)."""
    return _roofline_s(gpu, expert_bytes, _flops(model, expert_bytes) * tokens)


def _flops(model: ModelSpec, weight_bytes: float) -> float:
    """Operations of a token: two a weight, which is taken to have ``dtype_bytes`` bytes."""
    return 2.0 * weight_bytes / model.dtype_bytes


def _roofline_s(gpu: Gpu, read_bytes: float | Floats, flops: float | Floats) -> Floats:
    """Launch overhead + max(bytes that are read / memory bandwidth, FLOPs / peak)."""
    read_s = read_bytes / (gpu.memory_bandwidth_gbs * 1e9)
    seconds: Floats = gpu.launch_overhead_us * 1e-6 + np.maximum(
        read_s, flops / (gpu.tflops * 1e12)
    )
    return seconds


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
