"""The shipped table of GPUs: its figures agree with each other, and names find them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prism_plan as pp
from prism_plan.errors import InputError
from prism_plan.io.gpu_table import (
    GpuPart,
    GpuTableFile,
    gpu_figures,
    gpu_table,
    matching_gpus,
    read_gpu_table,
)
from prism_plan.io.pydantic_base import validate

FILE = read_gpu_table()
PARTS = [pytest.param(part, id=part.name) for part in FILE.gpu]
NAMES = [part.name for part in FILE.gpu]


def test_it_covers_what_it_should() -> None:
    """Sixty GPUs and more, of all three vendors, in order and each name once."""
    assert len(NAMES) >= 60
    assert len(set(NAMES)) == len(NAMES) == len(gpu_table())
    assert list(gpu_table()) == NAMES
    vendors = Counter(part.vendor for part in FILE.gpu)
    assert set(vendors) == {"NVIDIA", "AMD", "Apple"}
    assert min(vendors.values()) >= 7
    kinds = ("rtx-", "jetson-", "a100-", "h100-", "m4-", "mi300x", "rx-", "l4", "v100-")
    assert all(any(name.startswith(kind) for name in NAMES) for kind in kinds)
    titles = [(part.vendor, part.title) for part in FILE.gpu]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("part", PARTS)
def test_figures_agree_with_each_other(part: GpuPart) -> None:
    """Bandwidth is bus width times data rate, compute is cores times clock, within 1 %."""
    if part.bus_width_bits is not None:
        product = part.bus_width_bits * part.memory_rate_gbps / 8
        assert part.memory_bandwidth_gbs == pytest.approx(product, rel=0.01)
    if part.cores is not None:
        product = part.cores * part.boost_mhz * part.flops_per_core_clock / 1e6
        assert part.tflops == pytest.approx(product, rel=0.01)


def test_most_figures_are_checked() -> None:
    """The check above is not empty: it holds for four fifths of bandwidths and of TFLOP/s."""
    assert sum(part.bus_width_bits is not None for part in FILE.gpu) >= 0.8 * len(FILE.gpu)
    assert sum(part.cores is not None for part in FILE.gpu) >= 0.8 * len(FILE.gpu)


@pytest.mark.parametrize("part", PARTS)
def test_figures_are_plausible(part: GpuPart) -> None:
    """Figures lie between those of the smallest and the largest device; sizes fit into titles."""
    assert 8 <= part.memory_gib <= 512
    assert 60 <= part.memory_bandwidth_gbs <= 8000
    assert 5 <= part.tflops <= 2600
    # operations for each byte that is read
    assert 20 <= part.tflops * 1e3 / part.memory_bandwidth_gbs <= 1000
    for size in re.findall(r"(\d+) GB", part.title):
        assert float(size) == part.memory_gib or part.name == "ryzen-ai-max-395-128gb"
    for size in re.findall(r"-(\d+)gb", part.name):
        assert float(size) == part.memory_gib or part.name == "ryzen-ai-max-395-128gb"


@pytest.mark.parametrize("part", PARTS)
def test_every_entry_has_its_source(part: GpuPart) -> None:
    """Each names a publication of its vendor, with a title and an address at the vendor's site."""
    source = FILE.source[part.source]
    assert source.title.startswith(part.vendor)
    site = {"NVIDIA": "nvidia.com", "AMD": "amd.com", "Apple": "apple.com"}[part.vendor]
    host = source.url.split("/")[2]
    assert host == site or host.endswith(f".{site}")


def test_no_source_is_unused() -> None:
    """Each publication is the source of some GPU."""
    assert {part.source for part in FILE.gpu} == set(FILE.source)


def test_known_figures() -> None:
    """Figures that data sheets are known to say, in bf16 or fp16, dense, accumulated in fp32."""
    known = {
        "rtx-4090": (24, 1008, 165.2, 25.2),
        "rtx-3090": (24, 936, 71, 25.2),
        "a100-40gb": (40, 1555, 312, 25.2),
        "a100-80gb-sxm": (80, 2039, 312, 25.2),
        "h100-sxm": (80, 3350, 989.5, 50.4),
        "l40s": (48, 864, 362, 25.2),
        "t4": (16, 320, 65, 12.6),
        "v100-sxm2-16gb": (16, 900, 125, 12.6),
        "jetson-agx-orin-64gb": (64, 204.8, 42.5, 50),
        "jetson-orin-nano-8gb": (8, 68, 10, 34),
        "mi300x": (192, 5300, 1307.4, 50.4),
        "rx-7900-xtx": (24, 960, 122.8, 25.2),
        "m2-ultra-192gb": (192, 800, 27.2, 50),
    }
    for name, figures in known.items():
        gpu = gpu_figures(name)
        found = (gpu.memory_gib, gpu.memory_bandwidth_gbs, gpu.tflops, gpu.load_gbs)
        assert found == figures, name


@pytest.mark.parametrize("part", PARTS)
def test_loads_are_a_share_of_the_link(part: GpuPart) -> None:
    """80 % of PCI Express; half the bandwidth of shared memory, and 50 GB/s at most."""
    gpu = gpu_figures(part.name)
    if part.pcie is None:
        expected = min(part.memory_bandwidth_gbs / 2, 50)
        assert gpu.host_link == "shared memory"
    else:
        giga_transfers = {3: 8, 4: 16, 5: 32}[part.pcie]
        expected = 0.8 * giga_transfers * part.lanes / 8 * 128 / 130
        assert gpu.host_link == f"PCIe {part.pcie}.0 x{part.lanes}"
    assert gpu.load_gbs == pytest.approx(expected, abs=0.05)


def test_the_public_function() -> None:
    """`pp.gpu_figures` gives the figures in the units of cluster files, without unknown ones."""
    gpu = pp.gpu_figures("rtx-4090")
    assert isinstance(gpu, pp.GpuFigures)
    assert gpu.cluster_keys() == {
        "memory_gib": 24,
        "memory_bandwidth_gbs": 1008,
        "tflops": 165.2,
        "load_gbs": 25.2,
    }
    assert gpu.to_json()["source_url"].startswith("https://")
    assert "note" not in gpu.to_json()
    assert "launch_overhead_us" not in gpu.to_json()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rtx-409", "'rtx-4090'"),
        ("RTX 4090", "'rtx-4090'"),
        ("NVIDIA GeForce RTX 4090", "'rtx-4090'"),
        ("h200", "'h200-sxm' or 'h200-nvl'"),
        ("a100", "'a100-80gb-sxm' or 'a100-80gb-pcie' or 'a100-40gb'"),
        ("jetson_agx_orin", "'jetson-agx-orin-64gb' or 'jetson-agx-orin-32gb'"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, meant: str) -> None:
    """Spaces, capitals and vendors are no difference; a shared beginning is more than a typo."""
    with pytest.raises(InputError) as caught:
        gpu_figures(name)
    assert f"did you mean {meant}?" in str(caught.value)
    assert str(caught.value).endswith("prism-plan gpus lists them")


@given(name=st.text(max_size=200).filter(lambda text: text not in gpu_table()))
def test_any_other_name_is_refused_in_one_line(name: str) -> None:
    """Whatever the text is, the error is one printable line, and the search gives known GPUs."""
    with pytest.raises(InputError) as caught:
        gpu_figures(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert set(matching_gpus(name)) <= set(gpu_table().values())


def test_parts_of_names_and_titles() -> None:
    """A part of a name, of a title or the vendor finds all GPUs that have it, and no others."""
    found = [gpu.name for gpu in matching_gpus("4090")]
    assert found == ["rtx-4090"]
    assert {gpu.vendor for gpu in matching_gpus("amd")} == {"AMD"}
    assert {gpu.vendor for gpu in matching_gpus("NVIDIA")} == {"NVIDIA"}
    assert all("orin" in gpu.name for gpu in matching_gpus("Orin"))
    assert matching_gpus("") == matching_gpus("  ") == matching_gpus("4099") == ()


@pytest.mark.parametrize("lacking", ["boost_mhz", "memory_rate_gbps", "lanes"])
def test_a_half_check_is_refused(lacking: str) -> None:
    """Figures that are checked together, and a link, stand in the table whole or not at all."""
    part = {key: getattr(FILE.gpu[0], key) for key in FILE.gpu[0].model_fields_set}
    good = {"gpu": [part], "source": {}}
    validate(GpuTableFile, good)
    del part[lacking]
    with pytest.raises(InputError, match=f"all of .*{lacking}"):
        validate(GpuTableFile, good)


@pytest.mark.parametrize("document", ["README.md", "docs/design.md", "CHANGELOG.md"])
def test_documents_say_how_many_there_are(document: str) -> None:
    """The number of GPUs in the documents is that of the table."""
    text = (Path(pp.__file__).parent.parent / document).read_text(encoding="utf-8")
    pattern = r"gpus lists (\d+)|gpus\.toml`\) has (\d+) entries|table of (\d+) GPUs"
    numbers = [int("".join(found)) for found in re.findall(pattern, text)]
    assert numbers == [len(NAMES)]
