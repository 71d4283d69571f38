"""The file of the trials' records, studies/faults.json: a trial a line, with its seed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studies.faults.run import keep_logs
from studies.machine import commit, processor

FILE = Path(__file__).resolve().parents[1] / "faults.json"
SPANS_FILE = FILE.with_name("faults-spans.json")
#: Scripted trials, power cuts, random ones, those of the network.
ORDER = "sprn"


def read_records(path: Path) -> dict[str, Any]:
    """Records by the names of trials; none where there is no file."""
    if not path.exists():
        return {}
    records: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["trials"]
    return records


def write_records(path: Path, records: Mapping[str, Any]) -> None:
    """Write the file of records."""
    ordered = sorted(records.items(), key=lambda item: (ORDER.index(item[0][0]), item[0]))
    lines = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in ordered]
    path.write_text('{"trials": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def run_and_record(
    name: str, run: Callable[[Path], dict[str, Any]], path: Path, logs: Path | None
) -> bool:
    """Run a trial in a folder of its own and write its record; returns whether it went well.

    What earlier runs of it at other commits found wrong stays in the record.
    """
    with tempfile.TemporaryDirectory(prefix=f"prism-faults-{name}-") as folder:
        record = run(Path(folder))
        if logs is not None and not record["well"]:
            keep_logs(Path(folder), logs / name)
    records = read_records(path)
    before = records.get(name, {})
    earlier = list(before.get("earlier", []))
    if before.get("problems"):
        earlier.append({"commit": before["commit"], "problems": before["problems"]})
    record |= {"commit": commit(f"studies/{path.name}"), "processor": processor()}
    records[name] = record | ({"earlier": earlier} if earlier else {})
    write_records(path, records)
    print(
        f"  {'well' if record['well'] else 'NOT WELL'} in {record['seconds']:.0f} s: "
        f"{record['answered']} answered, {record['failed']} failed; "
        f"{'; '.join(record['problems'])[:400]}",
        flush=True,
    )
    return bool(record["well"])


def table(records: Mapping[str, Any]) -> str:
    """A Markdown table of the records, and their sums."""
    lines = ["| trial | answered | failed | lost with their home | well after | |"]
    lines.append("|---" * 6 + "|")
    for record in records.values():
        after = record.get("well_after_s")
        lines.append(
            f"| {record['text']} | {record['answered']} | {record['failed']} "
            f"| {record['lost_with_home']} | {'–' if after is None else f'{after:.1f} s'} "
            f"| {'; '.join(record['problems'])[:200]} |"
        )
    lines.append(
        f"\n{len(records)} trials, {sum(record['well'] for record in records.values())} well; "
        f"{sum('hang' in record for record in records.values())} hangs; "
        f"{sum(len(record['wrong']) for record in records.values())} wrong answers of "
        f"{sum(record['answered'] for record in records.values())}"
    )
    return "\n".join(lines)
