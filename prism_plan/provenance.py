"""Where a trace comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prism_plan import __version__


def stamped(source: Mapping[str, Any]) -> dict[str, Any]:
    """``source`` with the tool and the date; ``SOURCE_DATE_EPOCH`` fixes the date if it is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    fixed = epoch.isascii() and epoch.isdigit() and len(epoch) < 12
    now = datetime.fromtimestamp(int(epoch), UTC) if fixed else datetime.now(UTC)
    return {
        "tool": f"prism-plan {__version__}",
        **source,
        "date": now.isoformat(timespec="seconds"),
    }
