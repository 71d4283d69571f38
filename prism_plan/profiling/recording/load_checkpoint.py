"""Load a checkpoint with transformers: its tokenizer, its model, its spec."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_plan.errors import InputError, PrismError
from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.profiling.recording.hf_options import HfOptions
from prism_plan.profiling.recording.transformers_release import require_transformers
from prism_plan.sizes.checkpoint_folder import spec_from_folder
from prism_plan.sizes.hub import spec_from_hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def _loading(checkpoint: str, what: str) -> Iterator[None]:
    """Turn the exceptions of loading, which are of many classes, into InputError."""
    try:
        yield
    except (PrismError, MemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        gated = "gated" in words.lower() or "401" in words or "403" in words
        if os.path.isdir(checkpoint):
            reason, remedy = f"cannot load the {what}: {words[:120]}", "check the files in it"
        elif gated:
            reason = "the checkpoint is gated or private"
            remedy = "ask for access on its page and log in with: hf auth login"
        else:
            reason = "no such folder, and no checkpoint of that name can be had from the hub"
            remedy = "give a local folder, or a hub id and a network connection"
        raise Location(checkpoint).error(reason, remedy=remedy) from error


def load_tokenizer(checkpoint: str, options: HfOptions) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, padding on the left.

    Raises
    ------
    InputError
        It cannot be loaded, or has neither a padding nor an end-of-sequence token.
    """
    require_transformers()
    from transformers import AutoTokenizer

    _require_config(checkpoint)
    with no_progress_bars(), _loading(checkpoint, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint, trust_remote_code=options.trust_remote_code
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise Location(checkpoint).error(
                "the tokenizer has neither a padding nor an end-of-sequence token",
                remedy="set one in its tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_checkpoint_spec(checkpoint: str) -> ModelSpec:
    """The spec of a checkpoint folder or hub id, with the sizes as they are stored.

    Raises
    ------
    InputError
        Missing, gated, damaged, or without MoE layers.
    """
    require_transformers()
    _require_config(checkpoint)
    if os.path.exists(checkpoint):
        return spec_from_folder(Path(checkpoint))
    return spec_from_hub(checkpoint)


def load_hf_model(checkpoint: str, options: HfOptions) -> PreTrainedModel:
    """The checkpoint's model, ready to run.

    Raises
    ------
    InputError
        Missing, gated or damaged; the device cannot be used.
    """
    require_transformers()
    import torch
    from transformers import AutoConfig

    _require_config(checkpoint)
    if options.device != "auto":
        try:
            if torch.empty(1, device=options.device).is_meta:
                raise RuntimeError("it computes nothing")
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"{options.device!r} cannot be used: {str(error).splitlines()[0]:.80}",
                parameter="device",
                expected="auto, cpu, or an accelerator of this machine such as cuda:0",
            ) from error
    with no_progress_bars(), _loading(checkpoint, "model"):
        placement: dict[str, Any] = {}
        if options.device == "auto" and torch.accelerator.is_available():
            placement["device_map"] = "auto"  # over all accelerators, for models larger than one
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=options.trust_remote_code)
        model: PreTrainedModel = _auto_class(config).from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            **placement,
        )
        if options.device != "auto":
            model = model.to(options.device)
    return model.eval()


def _auto_class(config: Any) -> Any:
    """The one of transformers' automatic classes that makes a checkpoint's model.

    Most multimodal models are no ``AutoModelForCausalLM``; they generate from text alone too.
    """
    import transformers

    kind = type(config)
    if (
        kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _require_config(checkpoint: str) -> None:
    if os.path.exists(checkpoint) and not os.path.isfile(os.path.join(checkpoint, "config.json")):
        raise Location(checkpoint).error("has no config.json", "a checkpoint folder or a hub id")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the progress bars and logs of transformers, which would mix with ours."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
