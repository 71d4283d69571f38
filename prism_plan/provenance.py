"""Provenance of traces: the tool and the date that their files state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prism_plan import __version__


def stamped(source: Mapping[str, Any]) -> dict[str, Any]:
    """Add the tool and the date to ``source``; ``SOURCE_DATE_EPOCH``, if set, is the date."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    fixed = epoch.isascii() and epoch.isdigit() and len(epoch) < 12
    now = datetime.fromtimestamp(int(epoch), UTC) if fixed else datetime.now(UTC)
    return {
        "tool": f"prism-plan {__version__}",
        **source,
        "date": now.isoformat(timespec="seconds"),
    }
