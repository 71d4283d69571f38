"""Recognise a checkpoint folder again by a digest of its files."""

from __future__ import annotations

import hashlib
import os

#: A larger weight file than this many samples is represented by samples, evenly spread.
_SAMPLE_BYTES, _NUM_SAMPLES = 65_536, 64


def fingerprint(checkpoint: str) -> str:
    """SHA-256 of a checkpoint folder's configuration and of the sizes and samples of its weights.

    Of a file beyond 4 MiB 64 samples of 64 KiB are read, so that large models take no minutes.
    Empty for a hub id.
    """
    if not os.path.isdir(checkpoint):
        return ""
    digest = hashlib.sha256()
    names = [n for n in sorted(os.listdir(checkpoint)) if n.endswith((".safetensors", ".bin"))]
    for name in ("config.json", *names):
        path = os.path.join(checkpoint, name)
        if not os.path.isfile(path):
            continue
        size = os.path.getsize(path)
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as stream:
            if size <= _SAMPLE_BYTES * _NUM_SAMPLES:
                digest.update(stream.read())
                continue
            for sample in range(_NUM_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
