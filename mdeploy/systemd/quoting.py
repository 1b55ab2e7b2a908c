"""Any text in a unit file, so that systemd reads back exactly what was meant.

Rules from systemd.syntax(7), systemd.service(5) and systemd's config parsers: every value goes
through specifiers (`%`), words are separated by blanks and may stand in double quotes, inside of
which only `\\\\` and `\\"` mean the same to every directive. `ExecStart=` alone expands `$`.
"""

from __future__ import annotations

import re

from mdeploy.errors import ConfigError

_PLAIN = r"[A-Za-z0-9_./+=,-]+"
_UNSAFE_PROGRAM = "\"'\\$"
"""systemd refuses the first three in the program's own path, and would expand the last in argv[0]."""


def raw(text: str) -> str:
    """A value that stands alone on its line and is not split into words, as LoadCredential's path."""
    if text != text.strip() or text.endswith("\\"):
        raise ConfigError(f"{text!r} cannot stand in a systemd unit: it begins or ends with a blank or a backslash")
    return _checked(text).replace("%", "%%")


def word(text: str) -> str:
    """One word of Environment=, ReadWritePaths=, BindPaths=, RequiresMountsFor= …"""
    if re.fullmatch(_PLAIN, text):
        return text
    return '"' + _checked(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def member(path: str, options: str) -> str:
    """`PATH:OPTIONS` of TemporaryFileSystem=, which is first split into words and then at colons."""
    return word(path.replace("\\", "\\\\").replace(":", "\\:") + f":{options}")


def command(*words: str) -> str:
    """The command of ExecStart=; a program whose path systemd would not take is started through env(1)."""
    program = words[0]
    safe = not set(_UNSAFE_PROGRAM) & set(program)
    first = word(program) if safe else f"/usr/bin/env {argument(program)}"
    return " ".join([first, *(argument(text) for text in words[1:])])


def argument(text: str) -> str:
    """One argument of a command: as a word, and `$` is no variable."""
    return word(text).replace("$", "$$")


def _checked(text: str) -> str:
    """Raises ConfigError for what no unit file can hold: line ends, other control characters, no UTF-8."""
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in text):
        hint = "give the file or directory another name"
        raise ConfigError(f"{text!r} cannot stand in a systemd unit: it holds a control character", hint=hint)
    return text
