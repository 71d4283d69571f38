"""Checks of the inputs of a forward pass, whose rows would otherwise be recorded wrong."""

from __future__ import annotations

from typing import Any

from prism_plan.io.location import Location


def padding_mask(masks: tuple[Any, Any], shape: tuple[int, int], past: int) -> Any:
    """Which of a pass's tokens are no padding, bool [B, S]; None where all are.

    ``masks`` are those of the decoder and of the whole model: a multimodal model may give its
    decoder masks of attention, made from the one of padding.

    Raises
    ------
    InputError
        There are masks, but none [B, cached and new tokens].
    """
    present = [mask for mask in masks if mask is not None]
    flat = [mask for mask in present if getattr(mask, "ndim", 0) == 2]
    if not present:
        return None
    if not flat:
        raise Location("forward pass").error(
            "an attention mask that is not [sequences, tokens]",
            remedy="give the two-dimensional mask, which tells padding, and generate "
            "without a static cache, which replaces it",
        )
    mask = flat[0]
    if tuple(mask.shape) != (shape[0], past + shape[1]):
        raise Location("forward pass").error(
            f"an attention mask of shape {list(mask.shape)}",
            f"{[shape[0], past + shape[1]]}, cached and new tokens",
        )
    return mask[:, -shape[1] :].bool()


def require_start(positions: Any, mask: Any) -> None:
    """Refuse a pass without cached tokens that does not begin at the start of its sequences.

    It has a cache of an unknown kind or name; its tokens would become requests of their own. A
    padded sequence's tokens still begin at position 0. Positions that start anew within a row are
    sequences packed into it, which would become one request.

    Raises
    ------
    InputError
        Names the first position, or that sequences are packed.
    """
    if positions is None or not positions.numel():
        return
    if int(positions.min()) > 0:
        raise Location("forward pass").error(
            f"tokens from position {int(positions.min())} on without a cache",
            "a cache in past_key_values or cache, or sequences from their start",
            "generate with use_cache=True, with a release of transformers that works",
        )
    if positions.ndim != 2:
        return
    back = positions[:, 1:] < positions[:, :-1]
    if mask is not None:
        back = back & mask[:, :-1] & mask[:, 1:]
    if bool(back.any()):
        raise Location("forward pass").error(
            "positions start anew within a row",
            "one sequence in each row of the batch",
            "pad sequences instead of packing them",
        )
