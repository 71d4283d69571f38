"""What engines hold on each GPU beside experts, as a cluster's servers with less memory.

Our runtime has the dense part once a server; engines have it on every GPU, or the part of a GPU's
own layers. Each GPU is charged the whole of it, and all KV caches, which no engine exceeds. GPUs
whose room is given in slots are taken at their word.
"""

from __future__ import annotations

import dataclasses

from prism_plan.cluster import Gpu, Server
from prism_plan.expert_capacity import bytes_for_experts
from prism_plan.model_spec import ModelSpec


def with_dense_on_every_gpu(server: Server, model: ModelSpec, tokens: int) -> Server:
    """The server with the dense part and KV caches of ``tokens`` tokens reserved on other GPUs too.

    On its dense GPU planners reserve them themselves.
    """
    more = model.dense_bytes + tokens * model.kv_bytes_per_token
    gpus = tuple(
        gpu
        if gpu.slots is not None or at == server.dense_gpu
        else dataclasses.replace(gpu, reserve_bytes=gpu.reserve_bytes + more)
        for at, gpu in enumerate(server.gpus)
    )
    return dataclasses.replace(server, gpus=gpus)


def with_whole_layers_a_gpu(server: Server, model: ModelSpec, tokens: int) -> Server:
    """The server with what none of its several GPUs can use for whole layers reserved.

    KV caches of ``tokens`` tokens are taken as if all layers executed there. Of a server with one
    GPU nothing is lost by rounding, for planners count whole layers themselves.

    Raises
    ------
    Infeasible
        A GPU is too small for what must reside on it.
    """
    if len(server.gpus) == 1:
        return server
    of_layer = model.num_experts * max(model.expert_bytes_by_layer)

    def rounded(at: int, gpu: Gpu) -> Gpu:
        if gpu.slots is not None:
            whole = gpu.slots // model.num_experts * model.num_experts
            return dataclasses.replace(gpu, slots=whole)
        left = bytes_for_experts(model, server, at, tokens * model.kv_bytes_per_token)
        return dataclasses.replace(gpu, reserve_bytes=gpu.reserve_bytes + left % of_layer)

    gpus = tuple(rounded(at, gpu) for at, gpu in enumerate(server.gpus))
    return dataclasses.replace(server, gpus=gpus)
