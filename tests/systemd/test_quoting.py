"""Whatever stands in a path, an argument or a value comes out of a real systemd as it went in."""

from __future__ import annotations

import json
import sys

import pytest

from mdeploy.errors import ConfigError
from mdeploy.systemd import quoting
from tests.systemd.box import Box

NASTY = (
    "a b",
    "100%",
    "%i%%n",
    "$HOME",
    "${HOME}x",
    "$$",
    '"double"',
    "it's",
    "back\\slash\\",
    "\\x41\\n",
    "ünï 模型 🚀",
    "a:b",
    "a\\:b",
    "#x;y",
    "=x",
    "-dash",
    "@at",
    "+plus",
    "!",
    "*?[a-z]{b,c}~",
    " blanks ",
    ";",
    "|",
)

_DUMP = """
import json, os, pathlib, sys
names = os.environ["NAMES"].split()
paths = json.loads(os.environ["PATHS"])
seen = {
    "argv": sys.argv[2:],
    "env": [os.environ[name] for name in names],
    "hidden": sorted(os.listdir("/srv/hidden")),
    "read": [pathlib.Path(path, "in").read_text() for path in paths],
    "written": [pathlib.Path(path, "out").write_text("x") for path in paths[:1]],
    "credential": pathlib.Path(os.environ["CREDENTIALS_DIRECTORY"], "s.key").read_text(),
}
pathlib.Path(sys.argv[1]).write_text(json.dumps(seen))
"""


def test_everything_comes_out_as_it_went_in(box: Box) -> None:
    directories = [f"/srv/hidden/{text.strip()}" for text in NASTY if "/" not in text]
    secret = "/srv/keys 100% $x/it's.key"
    for path in [*(f"{directory}/in" for directory in directories), secret]:
        box.write(path, path)
    out = "/srv/hidden/a b/result"
    names = [f"V{number}" for number in range(len(NASTY))]
    box.write("/srv/dump.py", _DUMP)
    command = quoting.command(sys.executable, "/srv/dump.py", out, *NASTY)
    unit = [
        "[Service]",
        "Type=oneshot",
        f"ExecStart={command}",
        f"Environment={quoting.word('NAMES=' + ' '.join(names))}",
        f"Environment={quoting.word('PATHS=' + json.dumps(directories))}",
        *(f"Environment={quoting.word(f'{name}={text}')}" for name, text in zip(names, NASTY, strict=True)),
        f"TemporaryFileSystem={quoting.member('/srv/hidden', 'ro')}",
        "ProtectSystem=strict",
        f"BindPaths={quoting.word(directories[0])}",
        f"ReadWritePaths={quoting.word(directories[0])}",
        *(f"BindReadOnlyPaths={quoting.word(path)}" for path in directories[1:]),
        f"LoadCredential=s.key:{quoting.raw(secret)}",
    ]
    box.write("/run/systemd/system/nasty@.service", "\n".join(unit) + "\n")
    box.ok("systemctl", "start", "nasty@i.service")
    seen = json.loads(box.ok("cat", out))
    assert seen["argv"] == list(NASTY)
    assert seen["env"] == list(NASTY)
    assert seen["read"] == [f"{path}/in" for path in directories]
    assert len(seen["hidden"]) == len(set(directories))
    assert seen["credential"] == secret


_LIST = 'ls "$1" >"$1/shown/listing"'
_EVERYTHING = """/srv/one $HOME ${X} "q" it's a\\b %i 100% a:b ü模型 #;"""


@pytest.mark.parametrize("directory", ["/srv/plain", "/srv/with space", _EVERYTHING])
def test_a_program_may_lie_anywhere(box: Box, directory: str) -> None:
    """systemd refuses quotes and backslashes in a program's path, and expands $ in what it is told it is called."""
    program, out = f"{directory}/prog", f"{directory}/out"
    box.write(program, '#!/bin/sh\nprintf "%s\\n" "$0" "$@" >"$(dirname "$0")/out"\n')
    box.ok("chmod", "+x", program)
    unit = ["[Service]", "Type=oneshot", f"ExecStart={quoting.command(program, '$1', 'two words')}"]
    box.write("/run/systemd/system/nasty-program.service", "\n".join(unit) + "\n")
    box.ok("systemctl", "start", "nasty-program")
    assert box.ok("cat", out).splitlines() == [program, "$1", "two words"]


def test_a_directory_of_any_name_is_hidden(box: Box) -> None:
    box.write(f"{_EVERYTHING}/secret", "x")
    box.write(f"{_EVERYTHING}/shown/file", "y")
    unit = [
        "[Service]",
        "Type=oneshot",
        f"TemporaryFileSystem={quoting.member(_EVERYTHING, 'ro')}",
        f"BindPaths={quoting.word(_EVERYTHING + '/shown')}",
        f"ExecStart={quoting.command('/bin/sh', '-c', _LIST, 'sh', _EVERYTHING)}",
    ]
    box.write("/run/systemd/system/nasty-hidden.service", "\n".join(unit) + "\n")
    box.ok("systemctl", "start", "nasty-hidden")
    assert box.ok("cat", f"{_EVERYTHING}/shown/listing") == "shown\n"


@pytest.mark.parametrize("text", ["two\nlines", "bell\x07", "\udcff", "delete\x7f"])
def test_what_no_unit_can_hold_is_refused(text: str) -> None:
    for quote in (quoting.word, quoting.raw, quoting.argument):
        with pytest.raises(ConfigError, match="control character"):
            quote(text)


@pytest.mark.parametrize("text", [" leading", "trailing ", "backslash\\"])
def test_a_bare_value_keeps_its_ends(text: str) -> None:
    with pytest.raises(ConfigError, match="begins or ends"):
        quoting.raw(text)
