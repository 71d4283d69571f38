"""The records of the compiled engine: one for each thing, with its numbers side by side.

A kernel is compiled for every array it is given, and takes long where there are many; one array of
records takes as long as one array of numbers, and what is read together lies together in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_KINDS = {"i2": np.int16, "i4": np.int32, "i8": np.int64, "f8": np.float64, "bool": np.bool_}


def _record(**kinds: str) -> np.dtype[Any]:
    """A record of numbers of the kinds that are named, aligned as a C compiler does it."""
    return np.dtype([(name, _KINDS[kind]) for name, kind in kinds.items()], align=True)


# ----------------------------------------------------------------------------- what a run reads

PROMPT = _record(first_row="i8", prefill_tokens="i4", decode_tokens="i4")
REQUEST = _record(arrival_s="f8", home="i4", prompt="i4")
#: GPUs of a server are those from ``first_gpu`` up to, not with, ``end_gpu``.
SERVER = _record(
    up_bytes_per_s="f8", down_bytes_per_s="f8", concurrency="i8", first_gpu="i4", end_gpu="i4",
    dense_gpu="i4",
)  # fmt: skip
#: ``kind`` is the GPU's row of the timing tables.
GPU = _record(server="i4", kind="i4", load_blocks_compute="bool")
#: ``size_class`` and ``dense_class`` are the layer's columns of the timing tables.
LAYER = _record(expert_bytes="i8", size_class="i4", dense_class="i4")
LINK = _record(seconds_per_byte="f8", half_rtt_s="f8")

# ---------------------------------------------------------------------------- what a run writes

#: The run as a whole: the time; when the latest migration was complete; events processed; the
#: latest request that arrived; requests that are finished; unused messages; messages that ever
#: waited; steps of a migration not yet complete, those of a new one that can start, the one that
#: dropped a last replica; experts loaded and their bytes; lines of the log.
RUN = _record(
    now_s="f8", migration_end_s="f8", processed="i8", latest_arrival="i8", finished="i8",
    free_messages="i8", enqueued="i8", open_steps="i8", new_steps="i8", failed_step="i8",
    loads="i8", loaded_bytes="i8", log_lines="i8", table_row="i8", next_table_row="i8",
    begins_after="i8", waits_from="i8", num_on_older_tables="i8",
)  # fmt: skip
#: Where a request is in its steps and layers. ``table_row`` is its row of the execution tables.
#: ``ids_left`` counts token ids that are not yet at home, ``context`` the tokens before the step.
#: ``pending_parts`` are batches of the layer that are not yet computed; ``next_queued`` is the next
#: that waits for admission at its home, or -1.
REQUEST_STATE = _record(
    token_row="i8", layer_start_s="f8", start_s="f8", first_token_s="f8", done_s="f8",
    location="i4", table_row="i4", step_tokens="i4", steps_left="i4", ids_left="i4", context="i4",
    pending_parts="i4", remote_experts="i4", next_queued="i4", layer="i2", decoding="bool",
)  # fmt: skip
#: The admission queue, requests admitted and present, the token buckets of both directions (level
#: and time of it), and the measurements of a home server and of its line.
SERVER_STATE = _record(
    num_active="i8", num_present="i8", present_since_s="f8", present_s="f8", up_bucket_bytes="f8",
    up_bucket_s="f8", down_bucket_bytes="f8", down_bucket_s="f8", calls="i8", remote_calls="i8",
    steps="i8", waiting="i8", destinations="i8", bytes_out="i8", bytes_in="i8", up_busy_s="f8",
    down_busy_s="f8", queue_head="i4", queue_tail="i4",
)  # fmt: skip
#: When the compute queue and the load channel are free next, the measurements, and the first and
#: last of its slots, by the end of their last use, then by number.
GPU_STATE = _record(
    free_s="f8", load_free_s="f8", gpu_busy_s="f8", served="i8", lru_first="i4", lru_last="i4"
)
#: A queue of a port lists messages in the order in which they were ready.
PORT = _record(free_s="f8", queue_head="i4", queue_tail="i4", busy="bool")
#: A message of one of the kinds below. ``sender`` and ``receiver`` are those of the way out, also
#: while it is ``returning``. ``ready`` numbers messages in the order in which they began to wait.
#: ``begins_pass``: the receiver begins a pass with it.
MESSAGE = _record(
    payload_bytes="i8", reply_bytes="i8", ready="i8", request="i4", layer="i4", sender="i4",
    receiver="i4", kind="i4", begins_pass="bool", returning="bool",
)  # fmt: skip
#: Kinds of messages: a call; hidden states on their way to the next span; ids of tokens, of a
#: prompt on their way to the first span or of a new token.
CALL, STATES, IDS = range(3)
#: Neighbours of a message in the queue of a port, or -1.
QUEUE_LINK = _record(next="i4", previous="i4")
#: A load or a drop of a pair on a GPU; needs that are not complete; the steps that need it are
#: those of ``step_dependents`` from ``first_dependent`` up to, not with, ``end_dependent``.
STEP = _record(
    pair="i8", first_dependent="i8", end_dependent="i8", gpu="i4", open_needs="i4", is_load="bool"
)
#: A slot's pair or -1, the end of its last use, its GPU, its neighbours in that GPU's list.
SLOT = _record(pair="i8", used_s="f8", gpu="i4", lru_next="i4", lru_previous="i4")
#: An event as :class:`prism_plan.simulate.events.Event` has it.
LOG_LINE = _record(time_s="f8", kind="i4", request="i4", layer="i4", at="i4", to="i4")
#: With losses: pairs that nobody holds; calls that wait for one; the request for which Python is
#: to go on.
LOSS_FLAGS = _record(held_nowhere="i8", waiting="i8", request="i8")
#: See :mod:`prism_plan.simulate.compiled.heap`.
HEAP_ENTRY = _record(time_s="f8", key="i8", event="i8")
