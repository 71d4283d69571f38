"""Lines of the runtime's log: one printable line each, as text or JSON, from a level on."""

from __future__ import annotations

import json

import pytest

from runtime_adapter import log_output


@pytest.fixture(autouse=True)
def _default() -> object:
    yield
    log_output.configure()


def test_text_lines_name_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """A message with line ends and control characters is one printable line."""
    log_output.configure()
    log_output.log_info("a\nb \x1b[31m")
    log_output.log_debug("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("prism-runtime: a b ")
    assert "\x1b" not in lines[0]


def test_json_lines_are_objects(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is a JSON object with time, level, server and message."""
    log_output.configure("warning", "json", "edge-a")
    log_output.log_info("not shown")
    log_output.log_warning('says "x"\nand more')
    (line,) = capsys.readouterr().err.splitlines()
    values = json.loads(line)
    assert values.pop("time") > 0
    assert values == {"level": "warning", "server": "edge-a", "message": 'says "x" and more'}
