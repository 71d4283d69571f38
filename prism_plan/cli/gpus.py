"""``prism-plan gpus``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from prism_plan.cli.options_dataclass import TableOptions, options_as
from prism_plan.cli.tables import format_option

if TYPE_CHECKING:
    from prism_plan.io.gpu_table import GpuFigures


class GpuName(click.types.StringParamType):
    """The name of a GPU, or a part of one; shells complete it."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from prism_plan.io.gpu_table import gpu_table

        return [CompletionItem(name) for name in gpu_table() if name.startswith(incomplete)]


@dataclass(frozen=True, kw_only=True)
class GpusOptions(TableOptions):
    """The options and arguments of ``prism-plan gpus``."""

    name: str | None


@click.command("gpus")
@click.argument("name", required=False, metavar="[NAME]", type=GpuName())
@format_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@options_as(GpusOptions)
def command(args: GpusOptions) -> int:
    """Show the table of GPUs that cluster files can name.

    A server's GPU is described by `gpu = "rtx-4090"` in the cluster file; other keys override the
    figures of the table. TFLOP/s are those of bf16 (fp16 where there is no bf16), dense, with fp32
    accumulation; "loads" is the rate at which experts come from the host's memory, 80 % of the
    link's.

    With the NAME of a GPU: all that is known of it, its source, and the lines for a cluster file.
    With a part of names or titles: the GPUs that have it.
    """
    from prism_plan.cli.console import print_json
    from prism_plan.io.gpu_table import gpu_figures, gpu_table, matching_gpus

    if args.name is None:
        gpus = tuple(gpu_table().values())
    elif args.name in gpu_table() or not (gpus := matching_gpus(args.name)):
        gpu = gpu_figures(args.name)  # which refuses a name that is not in the table
        if args.as_json:
            print_json(gpu.to_json())
        elif args.table_format == "table":
            _print_one(gpu)
        else:
            _print_table((gpu,), args.table_format)
        return 0
    if args.as_json:
        print_json([gpu.to_json() for gpu in gpus])
    else:
        _print_table(gpus, args.table_format)
    return 0


def _print_table(gpus: Sequence[GpuFigures], form: str) -> None:
    from prism_plan.cli.tables import number_column, print_table, text_column

    columns = [
        text_column("name", "name", [gpu.name for gpu in gpus]),
        text_column("GPU", "title", [f"{gpu.vendor} {gpu.title}" for gpu in gpus], rank=4),
        number_column("GiB", "memory_gib", [gpu.memory_gib for gpu in gpus], digits=0),
        number_column(
            "GB/s", "memory_bandwidth_gbs", [gpu.memory_bandwidth_gbs for gpu in gpus], digits=0
        ),
        number_column("TFLOP/s", "tflops", [gpu.tflops for gpu in gpus], digits=1),
        text_column("in", "dtype", [gpu.dtype for gpu in gpus], rank=2),
        number_column("loads GB/s", "load_gbs", [gpu.load_gbs for gpu in gpus], digits=1, rank=1),
        text_column("from host by", "host_link", [gpu.host_link for gpu in gpus], rank=3),
    ]
    print_table(columns, form=form)


def _print_one(gpu: GpuFigures) -> None:
    from prism_plan.cli.console import print_line

    unified = gpu.host_link == "shared memory"
    aside = "shared with the CPU and the system" if unified else "what vendors call GB"
    rows = [
        ("memory", f"{gpu.memory_gib:g} GiB ({aside})"),
        ("memory bandwidth", f"{gpu.memory_bandwidth_gbs:,g} GB/s"),
        ("compute", f"{gpu.tflops:,g} TFLOP/s in {gpu.dtype}, dense, accumulated in fp32"),
        ("loads from host", f"{gpu.load_gbs:g} GB/s over {gpu.host_link}"),
    ]
    if gpu.launch_overhead_us is not None:
        rows.append(("launch overhead", f"{gpu.launch_overhead_us:g} µs"))
    rows += [("source", gpu.source_title), ("", gpu.source_url), ("note", gpu.note)]
    print_line(f"{gpu.name}: {gpu.vendor} {gpu.title}")
    print_line("")
    for heading, text in rows:
        if text:
            print_line(f"  {heading:<16}  {text}")
    for line in ("", "In a cluster file:", "", "[[server.gpu]]", f'gpu = "{gpu.name}"'):
        print_line(line)
    print_line("# which stands for these, unless they are given:")
    for key, value in gpu.cluster_keys().items():
        print_line(f"# {key} = {value:g}")
