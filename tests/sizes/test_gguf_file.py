"""Sizes of GGUF files, against the sizes that the ``gguf`` package itself tells of them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from prism_plan.errors import InputError  # noqa: E402
from prism_plan.sizes.load import load_model_spec  # noqa: E402

HIDDEN, WIDTH, EXPERTS, LAYERS = 256, 512, 4, 3
Kind = gguf.GGMLQuantizationType


def add(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    """A tensor of zeros, stored as ``kind``."""
    stored = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor(name, np.zeros(stored, np.uint8), raw_dtype=kind)


def write(path: Path, kind: Any, down: Any = None, change: Callable[[Any], None] = lambda w: None,
          keep: Callable[[str], bool] = lambda name: True, heads: Any = 2) -> Path:  # fmt: skip
    """A Qwen3-MoE of three layers, the first dense; its experts are stored as ``kind``."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(heads)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_token_list([f"token {number}" for number in range(300)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 12_000)
    change(writer)
    tensors = [
        ("token_embd.weight", (300, HIDDEN), Kind.Q6_K),
        ("output_norm.weight", (HIDDEN,), Kind.F32),
    ]
    for n in range(LAYERS):
        tensors.append((f"blk.{n}.attn_norm.weight", (HIDDEN,), Kind.F32))
        tensors += [(f"blk.{n}.attn_{part}.weight", (256, HIDDEN), Kind.Q4_K) for part in "qkv"]
        if n == 0:
            tensors.append((f"blk.{n}.ffn_up.weight", (WIDTH, HIDDEN), kind))
            continue
        tensors.append((f"blk.{n}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), Kind.F32))
        tensors.append((f"blk.{n}.ffn_up_shexp.weight", (WIDTH, HIDDEN), kind))
        for part in ("gate", "up"):
            tensors.append((f"blk.{n}.ffn_{part}_exps.weight", (EXPERTS, WIDTH, HIDDEN), kind))
        last = down if down is not None and n == 2 else kind
        tensors.append((f"blk.{n}.ffn_down_exps.weight", (EXPERTS, HIDDEN, WIDTH), last))
    for name, shape, stored in tensors:
        if keep(name):
            add(writer, name, shape, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums(*paths: Path) -> tuple[int, int]:
    """Bytes of the routed experts and of everything else, as the package reads the files."""
    tensors = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
    experts = sum(tensor.n_bytes for tensor in tensors if "_exps" in tensor.name)
    return experts, sum(tensor.n_bytes for tensor in tensors) - experts


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q8_0, Kind.MXFP4, Kind.BF16, Kind.IQ2_XS])
def test_sizes_are_the_files_own(kind: Any, tmp_path: Path) -> None:
    """Types with blocks of 32, 64 and 256 numbers; all facts are those of the file's keys."""
    path = write(tmp_path / "moe-x.gguf", kind)
    spec = load_model_spec(path)
    experts, dense = sums(path)
    assert (spec.expert_bytes, spec.dense_bytes) == (experts // (2 * EXPERTS), dense)
    assert (spec.name, spec.moe_layers, spec.num_experts, spec.top_k) == ("moe-x", (1, 2), 4, 2)
    assert (spec.hidden_size, spec.num_decoder_layers, spec.dtype_bytes) == (HIDDEN, LAYERS, 2)
    assert (spec.kv_bytes_per_token, spec.attention_flops) == (3 * 2 * 128 * 2, 2 * 4 * 128)
    (tmp_path / "config.json").write_text("{}")
    assert load_model_spec(tmp_path) == spec


def test_a_type_a_layer(tmp_path: Path) -> None:
    """Q4_K_M stores some layers in Q6_K: one size a layer."""
    path = write(tmp_path / "m.gguf", Kind.Q4_K, down=Kind.Q6_K)
    sizes = load_model_spec(path).expert_bytes_by_layer
    assert sizes[0] < sizes[1]
    assert EXPERTS * sum(sizes) == sums(path)[0]


def test_a_split_file(tmp_path: Path) -> None:
    """All parts count, whichever is given; a missing one is named."""
    whole = load_model_spec(write(tmp_path / "m.gguf", Kind.Q4_K))
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    write(parts[0], Kind.Q4_K, keep=lambda name: "blk.2" not in name)
    write(parts[1], Kind.Q4_K, keep=lambda name: "blk.2" in name)
    assert load_model_spec(parts[0]) == load_model_spec(parts[1]) == whole
    with pytest.raises(InputError, match="expected one GGUF model in the folder; give the file"):
        (tmp_path / "config.json").write_text("{}")
        load_model_spec(tmp_path)
    parts[0].unlink()
    with pytest.raises(InputError, match="1 of 2 parts are missing"):
        load_model_spec(parts[1])


def test_layers_of_their_own(tmp_path: Path) -> None:
    """Key-value heads may differ by layer; layers of token prediction are left out."""
    path = write(tmp_path / "m.gguf", Kind.Q4_K, heads=[2, 0, 4])
    assert load_model_spec(path).kv_bytes_per_token == (2 + 0 + 4) * 128 * 2
    path = write(tmp_path / "n.gguf", Kind.Q4_K,
                 change=lambda w: w.add_uint32("qwen3moe.nextn_predict_layers", 1))  # fmt: skip
    spec = load_model_spec(path)
    assert (spec.moe_layers, spec.num_decoder_layers) == ((1,), 2)


# ----------------------------------------------------------------------------------------- hostile


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def array(kind: int, count: int) -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count)


def info(dims: int, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(sizes)}Q", dims, *sizes)
    return text("t") + packed + struct.pack("<IQ", kind, offset)


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "another format": b"PK\3\4" * 8,
    "an old version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "many tensors": head(2**60, 0),
    "many keys": head(0, 2**60),
    "a long name": head(0, 1) + struct.pack("<Q", 2**40),
    "an array of numbers": head(0, 1) + array(4, 2**60),
    "an array of short numbers": head(0, 1) + array(0, 2**63) + bytes(100_000),
    "an array of texts": head(0, 1) + array(8, 2**60),
    "texts that are not there": head(0, 1) + array(8, 2**20),
    "an array of arrays": head(0, 1) + array(9, 2**20) + bytes(10_000),
    "a value of no type": head(0, 1) + text("a") + struct.pack("<I", 77),
    "many dimensions": head(1, 0) + info(2**31, *[1] * 40),
    "a huge tensor": head(1, 0) + info(4, *[2**62] * 4),
    "no whole block": head(1, 0) + info(1, 7, kind=12) + bytes(400),
    "a type that is none": head(1, 0) + info(1, 8, kind=9999) + bytes(400),
    "an odd alignment": head(1, 1)
    + text("general.alignment")
    + struct.pack("<II", 4, 0)
    + info(1, 8),
    "nothing but a header": head(0, 0),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, tmp_path: Path) -> None:
    """Declared sizes are not believed: one line that names the file, at once and in no memory."""
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(InputError) as caught:
        load_model_spec(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_any_damage_is_refused_or_read(tmp_path: Path) -> None:
    """A file that is cut, or has a byte changed in its header, gives a spec or one line."""
    data = write(tmp_path / "m.gguf", Kind.Q4_K).read_bytes()
    path = tmp_path / "broken.gguf"
    random = np.random.default_rng(0)
    for at in [*random.integers(0, 400, 60), *random.integers(60_000, 66_000, 60)]:
        changed = bytearray(data)
        changed[at] ^= int(random.integers(1, 256))
        for content in (bytes(changed), data[:at]):
            path.write_bytes(content)
            try:
                load_model_spec(path)
            except InputError as error:
                assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra to install."""
    import sys

    from prism_plan.sizes import gguf_header

    path = write(tmp_path / "m.gguf", Kind.Q4_K)
    gguf_header.block_sizes.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(
        InputError, match=r"gguf is not installed; pip install 'prism-plan\[gguf\]'"
    ):
        load_model_spec(path)
