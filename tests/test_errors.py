"""Exit codes are a contract with shells, systemd and CI."""

from __future__ import annotations

import json

import pytest

from mdeploy import errors
from mdeploy.cli import output
from tests.support import mdeploy


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.MdeployError, 1),
        (errors.UsageError, 2),
        (errors.NotFoundError, 3),
        (errors.NotReadyError, 4),
        (errors.DoesNotFitError, 5),
        (errors.InvalidResultError, 6),
        (errors.UnavailableError, 69),
        (errors.ConfigError, 78),
    ],
)
def test_every_error_has_its_exit_code(kind: type[errors.MdeployError], code: int) -> None:
    assert output.fail(kind("why", hint="how"), as_json=False) == code


def test_all_subclasses_are_in_the_tree_of_the_docstring() -> None:
    for kind in errors.MdeployError.__subclasses__():
        assert f"{kind.__name__} " in (errors.__doc__ or "")


def test_an_error_under_json_is_a_document_on_stdout_with_the_same_code() -> None:
    plain = mdeploy("logs", "nobody")
    assert (plain.code, plain.stdout) == (3, "")
    assert "no service 'nobody'" in plain.stderr
    as_json = mdeploy("bench", "nobody", "--json")
    assert as_json.code == 3
    assert set(json.loads(as_json.stdout)["error"]) == {"code", "message", "hint"}


@pytest.mark.parametrize(
    "args", [["nonsense"], ["ps", "--nonsense"], ["serve", "nonsense"], ["stop"], ["engines", "x"]]
)
def test_a_command_line_that_makes_no_sense_is_2_with_a_hint(args: list[str]) -> None:
    result = mdeploy(*args)
    assert result.code == 2
    assert result.stderr.startswith("error: ")
    assert "hint:" in result.stderr
