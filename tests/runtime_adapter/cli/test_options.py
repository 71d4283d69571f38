"""Options that commands share: files of answers, secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from prism_plan.cli.options_dataclass import options_as
from prism_plan.errors import InputError
from runtime_adapter.cli.options import SecretOptions, log_options, open_jsonl, secret_options


def test_answers_are_appended_behind_the_last_complete_line(tmp_path: Path) -> None:
    """A line that was cut is gone, what stands before it stays."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2}\n{"id": ')
    with open_jsonl(str(path), append=True) as write:
        write({"id": 3})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 2, 3]
    with open_jsonl(str(path)) as write:
        write({"id": 4})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [4]


def options(*words: str) -> SecretOptions:
    """The options of a command line."""
    found: list[Any] = []

    @click.command()
    @secret_options
    @log_options
    @options_as(SecretOptions)
    def command(args: SecretOptions) -> None:
        found.append(args)

    command.main(list(words), standalone_mode=False)
    kept: SecretOptions = found[0]
    return kept


def test_addresses_that_others_reach_need_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    """Without one only loopback is used, loudly, unless the user insists."""
    options().require_secret_for("127.0.0.1")
    assert "NO SECRET" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"10\.1\.2\.3"):
        options().require_secret_for("127.0.0.1", "10.1.2.3")
    options("--insecure").require_secret_for("10.1.2.3")
    assert "10.1.2.3" in capsys.readouterr().err
    options("--secret-file", "any").require_secret_for("10.1.2.3")
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="insecure"):
        options("--secret-file", "any", "--insecure")
