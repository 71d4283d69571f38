"""Find the modules of a loaded model that hold its routed experts, and read their arguments.

In transformers 5 an experts module is called with the tokens' hidden states [T, H], the chosen
experts [T, K] and their gate weights [T, K]. It is recognised by the names of these arguments,
which are the same in all families (read in 5.24.0; in 5.0.0 AFMoE and Aria have others and are
refused), not by its path: ``mlp.experts``, ``block_sparse_moe.experts``, ``mixer.experts``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError
from prism_plan.io.location import Location
from prism_plan.torch_private import is_expert_parallel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Arguments of the chosen experts and of their gate weights; the second of each is gpt-oss's.
ID_ARGUMENTS = ("top_k_index", "router_indices")
WEIGHT_ARGUMENTS = ("top_k_weights", "routing_weights")

USE_ENGINE = "record it with an engine: vLLM, SGLang or TensorRT-LLM"


@dataclass(frozen=True)
class ExpertsModule:
    """The routed experts of one decoder layer.

    ``name`` is the module's path within the model; ``num_experts`` is ``None`` where the module
    does not show it (experts that are held elsewhere).
    """

    name: str
    module: torch.nn.Module
    num_experts: int | None


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that runs the decoder layers; of a multimodal model its language model.

    Raises
    ------
    InputError
        The model has an encoder and a decoder, its decoder does not take tokens in order (text by
        diffusion), it has several decoders, or its experts are spread over processes.
    """
    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise Location(kind).error("has an encoder and a decoder", "a decoder-only language model")
    if any(is_expert_parallel(module) for module in model.modules()):
        raise Location(kind).error(
            "experts are sharded over processes, which renumbers them",
            remedy=f"load it in one process (device_map='auto' uses all its GPUs), or {USE_ENGINE}",
        )
    decoder: Any = model.get_decoder()
    takes = inspect.signature(type(decoder).forward).parameters
    if list(takes) == ["self", "input"]:  # that of torch's modules, which raises
        raise Location(kind).error(
            "has no forward pass of its own", "the part that generates text, such as model.thinker"
        )
    if "input_ids" not in takes and "inputs_embeds" not in takes:
        raise Location(kind).error(
            f"its decoder takes {', '.join(list(takes)[1:4])}",
            "input_ids or inputs_embeds, token after token",
        )
    return decoder


def find_experts(model: PreTrainedModel) -> dict[int, ExpertsModule]:
    """The experts modules by decoder layer, in ascending order.

    Only modules in the decoder's list of layers count, so that a vision tower's experts and those
    of layers for multi-token prediction are left out.

    Raises
    ------
    InputError
        There are none; they are not called with the ids of experts; a layer has several; tokens can
        be routed to something that is not an expert.
    """
    decoder = decoder_of(model)
    kind = model.config.model_type
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists: dict[str, dict[int, list[tuple[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for name, module in decoder.named_modules():
        if _takes_ids(type(module)):
            layer_of = _find_layer(decoder, name)
            if layer_of is None:
                raise Location(kind).error(f"experts module {name} is in no decoder layer")
            lists[layer_of[0]][layer_of[1]].append((name, module))
    if not lists:
        raise _unrecordable(model, decoder)
    layers = lists[_decoder_list(model, decoder, list(lists))]
    found = {}
    for layer, modules in sorted(layers.items()):
        if len(modules) > 1:
            raise Location(kind, f"layer {layer}").error(
                f"{len(modules)} experts modules: {', '.join(name for name, _ in modules)}",
                "one in a layer: a trace cannot tell their experts apart",
            )
        name, module = modules[0]
        _refuse_non_experts(decoder, name, module, f"{kind}: layer {layer}")
        path = f"{prefix}.{name}" if prefix else name
        found[layer] = ExpertsModule(path, module, _num_experts(module))
    return found


def _decoder_list(model: PreTrainedModel, decoder: torch.nn.Module, names: list[str]) -> str:
    """The one of several lists of layers with experts that is the decoder's."""
    if len(names) == 1:
        return names[0]
    config = model.config.get_text_config()
    length = getattr(config, "num_hidden_layers", None)
    fitting = [n for n in names if len(decoder.get_submodule(n)) == length]
    if len(fitting) != 1:
        raise Location(model.config.model_type).error(
            f"experts modules in several lists of layers: {', '.join(sorted(names))}",
            f"one list of {length} layers",
        )
    return fitting[0]


def argument_reader(module: torch.nn.Module, names: tuple[str, ...]) -> Callable[..., Any]:
    """A function that returns the argument of one of these names from a call's args and kwargs."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
    at, name = next((at, name) for at, name in enumerate(parameters) if name in names)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return args[at] if at < len(args) else kwargs.get(name)

    return read


def _takes_ids(kind: type) -> bool:
    parameters = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return any(name in parameters for name in ID_ARGUMENTS) and any(
        name in parameters for name in WEIGHT_ARGUMENTS
    )


def _find_layer(decoder: torch.nn.Module, name: str) -> tuple[str, int] | None:
    """Path of the outermost list of layers that holds a module, and the layer's index in it."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:at]), int(part)
    return None


def _num_experts(module: torch.nn.Module) -> int | None:
    declared = getattr(module, "num_experts", None)
    if isinstance(declared, int):
        return declared
    # weights of all experts are stacked along the first dimension
    stacked = {len(weight) for weight in module.parameters(recurse=False) if weight.ndim >= 3}
    return stacked.pop() if len(stacked) == 1 else None


def _refuse_non_experts(decoder: Any, name: str, module: Any, place: str) -> None:
    """Refuse routers that can choose something that is no expert: no trace can hold it."""
    zero = getattr(module, "zero_expert_num", None) or 0
    if zero:
        raise Location(place).error(
            f"{zero} zero-computation experts beside the routed ones",
            "top-k routed experts for every token",
        )
    block = decoder.get_submodule(name.rpartition(".")[0])
    for router in block.children():
        classes = getattr(router, "num_router_classes", None)
        experts = getattr(router, "num_experts", None)
        if classes is not None and classes != experts:
            raise Location(place).error(
                f"its router chooses among {classes} classes for {experts} experts, so a token can "
                "skip them",
                "top-k routed experts for every token",
            )


def _unrecordable(model: PreTrainedModel, decoder: torch.nn.Module) -> InputError:
    """The error for a decoder without experts modules that are called with ids."""
    kind = model.config.model_type
    for name, module in _named_experts(decoder):
        takes = [p for p in inspect.signature(type(module).forward).parameters if p != "self"]
        called = f"is called with {', '.join(takes)}"
        if not getattr(type(module), "forward", None) or takes == ["input"]:
            called = "is a list that the layer goes through"
        return Location(kind).error(
            f"{name} ({type(module).__name__}) {called}, not with the ids of the chosen experts",
            remedy=USE_ENGINE,
        )
    values = model.config.get_text_config().to_dict()
    if any("experts" in key and isinstance(n, int) and n > 1 for key, n in values.items()):
        return Location(kind).error("its experts are no modules of their own", remedy=USE_ENGINE)
    return Location(kind).error("has no MoE layers", "a model with experts")


def _named_experts(decoder: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith("experts") and "shared" not in last:
            yield name, module
