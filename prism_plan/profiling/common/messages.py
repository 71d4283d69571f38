"""What readers of recordings say to the user: notices, and remedies that several of them give."""

from __future__ import annotations

from collections.abc import Callable

#: Called with each notice to the user: what was left out or looks wrong.
Notify = Callable[[str], None]

TRUNCATED = "the file may be truncated; record or copy it again"
CHECK_MODEL = "check that ``model`` is the model that was recorded"
