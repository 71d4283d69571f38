"""The shell scripts of exports: one file for all machines, called with the name of a server."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.printable_text import printable

#: Words that the shell replaces; all others are quoted.
_VARIABLE = re.compile(r"\$\{?[A-Z_]+\}?")
_CASE = re.compile(r"^(?P<name>.*)\)$")


@dataclass(frozen=True)
class ShellScript:
    """What each server runs; several commands of one server run side by side.

    ``variables`` have values that whoever runs it may replace from the environment, and
    ``exported`` ones are for the engine. The first server is the default; what is given after its
    name goes to the engine.
    """

    comments: Sequence[str]
    variables: Mapping[str, str]
    exported: Mapping[str, str]
    commands: Mapping[str, Sequence[Sequence[str]]]

    def text(self) -> str:
        """The script, for any POSIX shell."""
        lines = ["#!/bin/sh", *(f"# {printable(comment)}" for comment in self.comments), "set -eu"]
        lines += [f': "${{{name}:={value}}}"' for name, value in self.variables.items()]
        lines += [f"export {name}={shlex.quote(v)}" for name, v in self.exported.items()]
        first = next(iter(self.commands))
        lines += [f"server=${{1:-{shlex.quote(first)}}}", "if [ $# -gt 0 ]; then shift; fi"]
        lines.append("case $server in")
        for name, commands in self.commands.items():
            lines.append(f"{shlex.quote(name)})")
            for command in commands:
                words = " ".join(
                    f'"{word}"' if _VARIABLE.fullmatch(word) else shlex.quote(word)
                    for word in command
                )
                lines.append(f'  exec {words} "$@"' if len(commands) == 1 else f"  {words} &")
            if len(commands) > 1:
                lines.append("  wait")
            lines.append("  ;;")
        lines += ["*)", '  echo "unknown server: $server" >&2', "  exit 2", "  ;;", "esac", ""]
        return "\n".join(lines)


def parse_script(text: str, source: str) -> ShellScript:
    """The reverse of :meth:`ShellScript.text`, also of a script that was edited.

    Raises
    ------
    InputError
        It is no such script.
    """
    variables: dict[str, str] = {}
    exported: dict[str, str] = {}
    commands: dict[str, list[list[str]]] = {}
    name: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{error}", source=source, place=f"line {number}") from error
        ours = ("set", "case", "esac", "wait", "if", "fi", "echo", "exit")
        if not words or words[0] in ours or words[0].startswith("server="):
            continue
        if words[0] == ":" and len(words) == 2 and ":=" in words[1]:
            key, _, value = words[1].strip("${}").partition(":=")
            variables[key] = value
        elif words[0] == "export" and len(words) == 2 and "=" in words[1]:
            key, _, value = words[1].partition("=")
            exported[key] = value
        elif words == [";;"]:
            name = None
        elif name is None and (found := _CASE.match(" ".join(words))):
            name = found["name"]
            if name != "*":
                commands[name] = []
        elif name is not None and name != "*":
            commands[name].append([w for w in words if w not in ("exec", "&", "$@")])
        elif name is None:
            raise InputError(
                f"{line.strip():.60}",
                source=source,
                place=f"line {number}",
                expected="a script that prism-plan export has written",
            )
    if not commands:
        raise InputError(
            "no command of any server",
            source=source,
            expected="a script that prism-plan export has written",
        )
    return ShellScript((), variables, exported, commands)
