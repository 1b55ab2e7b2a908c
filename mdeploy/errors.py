"""Every failure a user can see, with its exit code and the way out.

    MdeployError              1   something failed that has no better name
    ├── AlreadyRunningError   1   the service has a supervisor already
    ├── UsageError            2   the request itself makes no sense
    ├── NotFoundError         3   no such model, revision, service, engine
    ├── NotReadyError         4   it did not become ready, or ran out of time
    ├── DoesNotFitError       5   no GPU, or the model does not fit
    ├── InvalidResultError    6   a measurement that must not be believed, a missed gate
    ├── UnavailableError     69   a server we depend on cannot be reached
    └── ConfigError          78   files or settings that must change before a retry

An error says what went wrong and why in `message`, and in `hint` what mends it,
preferably as a command. 69 and 78 are EX_UNAVAILABLE and EX_CONFIG of sysexits.h:
systemd's RestartPreventExitStatus keeps 78 from being retried.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What the shell, systemd and CI see."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_READY = 4
    DOES_NOT_FIT = 5
    INVALID = 6
    UNAVAILABLE = 69
    CONFIG = 78
    INTERRUPTED = 130


class MdeployError(Exception):
    """Base of all errors shown to the user: one sentence, one way out."""

    exit_code = ExitCode.FAILURE
    code = "failure"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class AlreadyRunningError(MdeployError):
    """The name is taken: a supervisor holds the lock of the service."""


class UsageError(MdeployError):
    """The request itself makes no sense: a bad id, a flag that cannot be."""

    exit_code = ExitCode.USAGE
    code = "usage"


class NotFoundError(MdeployError):
    """What was named does not exist."""

    exit_code = ExitCode.NOT_FOUND
    code = "not_found"


class NotReadyError(MdeployError):
    """A service did not become ready, or did not answer in time."""

    exit_code = ExitCode.NOT_READY
    code = "not_ready"


class DoesNotFitError(MdeployError):
    """The machine has no GPU, or not enough of it."""

    exit_code = ExitCode.DOES_NOT_FIT
    code = "does_not_fit"


class InvalidResultError(MdeployError):
    """A measurement that must not be believed, or a gate that was missed."""

    exit_code = ExitCode.INVALID
    code = "invalid_result"


class UnavailableError(MdeployError):
    """A server we depend on (hub, package index, service) cannot be reached."""

    exit_code = ExitCode.UNAVAILABLE
    code = "unavailable"


class ConfigError(MdeployError):
    """Something on disk or in the settings must change before trying again helps."""

    exit_code = ExitCode.CONFIG
    code = "configuration"
