"""Asking a run to move its experts: for whoever is not one of its servers."""

from __future__ import annotations

import uuid
from typing import Any

from runtime_adapter.changes import News, StoreLost
from runtime_adapter.links import Meeting, RuntimeFailure, get


def ask(meeting: Meeting, placement: Any) -> tuple[int, str]:
    """Ask for a placement (its JSON), wait until that is over: exit code and what happened.

    Raises
    ------
    RuntimeFailure
        There is no run, it does not move experts, or it ended meanwhile.
    """
    name = uuid.uuid4().hex
    news = News(meeting, f"move {name}")
    try:
        if not get(news.store, "movable", meeting.join_s):
            raise RuntimeFailure(
                f"--store {meeting.host}:{meeting.port}: a run that moves no experts; start its "
                "servers with --movable"
            )
        news.put(f"move/{name}", placement)
        news.follow()
        news.tell("move", move=name)
        while True:
            entry = news.next()
            if entry is not None and entry.what == "moved" and entry["move"] == name:
                return int(entry["code"]), str(entry["text"])
    except StoreLost as error:
        raise RuntimeFailure("the run ended before the move did") from error
