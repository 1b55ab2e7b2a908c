"""What README tells people to type about units is typed in a booted system."""

from __future__ import annotations

import sys

from tests.systemd.box import MODEL, Box
from tests.test_readme import _commands


def test_the_commands_about_units(box: Box) -> None:
    box.write("/usr/local/bin/sudo", '#!/bin/sh\nexec "$@"\n')
    box.write("/usr/local/bin/mdeploy", f'#!/bin/sh\nexec {sys.executable} -m mdeploy "$@"\n')
    box.ok("chmod", "755", "/usr/local/bin/sudo", "/usr/local/bin/mdeploy")
    assert box.mdeploy("serve", "llm", MODEL, "--name", "chat", "-d").code == 0
    dry_run, install, ps, uninstall = _commands("### As units of systemd")
    outputs = {line: box.ok("sh", "-c", line) for line in (dry_run, install, ps, uninstall)}
    assert "$ systemctl start mdeploy@chat.service" in outputs[dry_run]
    assert "installed" in outputs[install]
    assert "systemd" in outputs[ps]
    assert outputs[uninstall] == "chat\n"
    box.ok("rm", "/usr/local/bin/sudo", "/usr/local/bin/mdeploy")
