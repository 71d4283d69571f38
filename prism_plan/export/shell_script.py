"""The shell scripts of exports: one file for all machines, called with the name of a server."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prism_plan.errors import InputError
from prism_plan.printable_text import printable

#: Words that the shell replaces; all others are quoted.
_VARIABLE = re.compile(r"\$[A-Z_]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_DEFAULT = re.compile(r': "\$\{(?P<name>[A-Z_]+):=(?P<value>[^{}"$`\\]*)\}"')
_EXPORT = re.compile(r"export (?P<name>[A-Z_]+)=(?P<value>.*)")
_SIDE_BY_SIDE = ' "$@" & pids="${pids:-} $!"'
_HEAD = "if [ $# -gt 0 ]; then shift; fi"
_TAIL = ["*)", '  echo "unknown server: $server" >&2', "  exit 2", "  ;;", "esac"]
_TRAP = ["  trap 'kill $pids 2>/dev/null || :' INT TERM EXIT", "  wait"]
EXPECTED = "a script as prism-plan export writes it; options go after the server's name"


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
        """The script, for any POSIX shell.

        Raises
        ------
        InputError
            A server's name has characters that no line of a script can have.
        """
        for name in self.commands:
            if _CONTROL.search(name) is not None:
                raise InputError(
                    f"server {name!r:.60}", place="servers",
                    expected="a name without line breaks and control characters, for a script",
                )  # fmt: skip
        lines = ["#!/bin/sh", *(f"# {printable(comment)}" for comment in self.comments), "set -eu"]
        lines += [f': "${{{name}:={value}}}"' for name, value in self.variables.items()]
        lines += [f"export {name}={shlex.quote(v)}" for name, v in self.exported.items()]
        first = next(iter(self.commands))
        lines += [_default_line(first), _HEAD, "case $server in"]
        for name, commands in self.commands.items():
            lines.append(f"{_quoted(name)})")
            for command in commands:
                words = " ".join(
                    f'"{word}"' if _VARIABLE.fullmatch(word) else shlex.quote(word)
                    for word in command
                )
                alone = len(commands) == 1
                lines.append(f'  exec {words} "$@"' if alone else f"  {words}{_SIDE_BY_SIDE}")
            if len(commands) > 1:
                lines += _TRAP
            lines.append("  ;;")
        return "\n".join([*lines, *_TAIL, ""])


def _default_line(first: str) -> str:
    """The first server is meant where none is named."""
    return f"server=${{1:-{_quoted(first)}}}"


def _quoted(name: str) -> str:
    """A name in quotes, which ``*`` and words of the shell need too."""
    return "'" + name.replace("'", "'\"'\"'") + "'"


def parse_script(text: str, source: str) -> ShellScript:
    """The reverse of :meth:`ShellScript.text`.

    Raises
    ------
    InputError
        It is no such script: a line is none that :meth:`ShellScript.text` writes.
    """
    lines = text.split("\n")
    if lines[-1:] != [""] or lines[-1 - len(_TAIL) : -1] != _TAIL:
        raise InputError("no end", source=source, place="the last lines", expected=EXPECTED)
    variables: dict[str, str] = {}
    exported: dict[str, str] = {}
    commands: dict[str, list[list[str]]] = {}
    name: str | None = None
    in_case = False
    default = ""
    for number, line in enumerate(lines[: -1 - len(_TAIL)], 1):
        where = f"line {number}"
        if name is not None:
            if line == "  ;;":
                name = None
            elif line not in _TRAP:
                commands[name].append(_words(line, source, where))
        elif in_case:
            name = _case(line, source, where)
            if name in commands:
                raise InputError(f"{name!r:.40} again", source=source, place=where)
            commands[name] = []
        elif line == "case $server in":
            in_case = True
        elif (found := _DEFAULT.fullmatch(line)) is not None:
            variables[found["name"]] = found["value"]
        elif (found := _EXPORT.fullmatch(line)) is not None and found["name"] not in exported:
            values = _split(found["value"], source, where)
            if len(values) != 1 or shlex.quote(values[0]) != found["value"]:
                raise InputError(f"{line:.60}", source=source, place=where, expected=EXPECTED)
            exported[found["name"]] = values[0]
        elif line not in ("set -eu", _HEAD) and not line.startswith("#"):
            if default or not line.startswith("server="):
                raise InputError(f"{line:.60}", source=source, place=where, expected=EXPECTED)
            default = line
    if default != _default_line(next(iter(commands), "")):
        raise InputError(f"{default:.60}", source=source, place="server=", expected=EXPECTED)
    for line in ("set -eu", _HEAD, *(_TRAP if max(map(len, commands.values())) > 1 else ())):
        if line not in lines:
            raise InputError(f"no line {line.strip()!r}", source=source, expected=EXPECTED)
    if not commands or name is not None or not all(commands.values()):
        raise InputError("a server without a command", source=source, expected=EXPECTED)
    return ShellScript((), variables, exported, commands)


def _split(line: str, source: str, where: str) -> list[str]:
    try:
        return shlex.split(line) or [""]
    except ValueError as error:
        raise InputError(f"{error}", source=source, place=where, expected=EXPECTED) from error


def _case(line: str, source: str, where: str) -> str:
    words = _split(line, source, where)
    if len(words) != 1 or not line.startswith("'") or not line.endswith("')"):
        raise InputError(f"{line:.60}", source=source, place=where, expected=EXPECTED)
    return words[0][:-1]


def _words(line: str, source: str, where: str) -> list[str]:
    if line.startswith("  exec ") and line.endswith(' "$@"'):
        inner = line[len("  exec ") : -len(' "$@"')]
    elif line.startswith("  ") and line.endswith(_SIDE_BY_SIDE):
        inner = line[2 : -len(_SIDE_BY_SIDE)]
    else:
        raise InputError(f"{line.strip():.60}", source=source, place=where, expected=EXPECTED)
    words = _split(inner, source, where)
    again = " ".join(
        f'"{word}"' if _VARIABLE.fullmatch(word) else shlex.quote(word) for word in words
    )
    if again != inner:  # the shell would do something else with it
        raise InputError(f"{inner:.60}", source=source, place=where, expected=EXPECTED)
    return words


def options_of(
    words: Sequence[str], known: Collection[str], source: str, place: str,
    switches: Collection[str] = (), repeated: Collection[str] = (),
) -> dict[str, list[str]]:  # fmt: skip
    """Values by option of a command's words, each option of ``known`` at most once.

    ``switches`` have no value, ``repeated`` may be given again.

    Raises
    ------
    InputError
        Another option, which may undo what these say; a value is missing; an option twice.
    """
    found: dict[str, list[str]] = {}
    at = 0
    while at < len(words):
        word = words[at]
        if word not in known and word not in switches:
            raise InputError(
                f"{word!r:.60}", source=source, place=place,
                expected=f"one of {', '.join([*known, *switches])}; others go after the name",
            )  # fmt: skip
        if word in found and word not in repeated:
            raise InputError(f"{word} twice", source=source, place=place, expected="it once")
        found.setdefault(word, [])
        if word in switches:
            at += 1
            continue
        if at + 1 >= len(words):
            raise InputError(f"{word} at the end", source=source, place=place, expected="a value")
        found[word].append(words[at + 1])
        at += 2
    return found
