"""The options of an app survive the way through a command line, whatever is in them."""

import random
import string

import pytest

from mdeploy.serving.options import AppOptions, ClusterOptions, parse

_NASTY = string.printable + "äß日本'\"`$\\=-"


def _text(rng: random.Random) -> str:
    return "/" + "".join(rng.choices(_NASTY, k=rng.randint(1, 12)))  # argparse before 3.13 loses a value that is --


def _maybe(rng: random.Random, value: object) -> object:
    return rng.choice([None, value])


def _any_options(rng: random.Random) -> AppOptions:
    cluster = ClusterOptions(_text(rng), rng.choice([None, 3]), rng.random(), rng.random(), _text(rng), _text(rng))
    return AppOptions(
        service=_text(rng),
        host=_text(rng),
        port=rng.randint(1, 65535),
        handlers=tuple(_text(rng) for _ in range(rng.randint(1, 3))),
        paths=tuple(_text(rng) for _ in range(rng.randint(0, 3))),
        python=rng.choice(["", _text(rng)]),
        devices=rng.choice([("cpu",), ("0", "1")]),
        workers_per_device=_maybe(rng, rng.randint(1, 9)),  # type: ignore[arg-type]
        max_batch_size=_maybe(rng, rng.randint(1, 64)),  # type: ignore[arg-type]
        max_batch_cost=_maybe(rng, rng.random() * 1e6),  # type: ignore[arg-type]
        max_wait_ms=_maybe(rng, rng.choice([0.0, rng.random()])),  # type: ignore[arg-type]
        timeout=_maybe(rng, rng.random()),  # type: ignore[arg-type]
        queue_size=_maybe(rng, 0),  # type: ignore[arg-type]
        max_body_bytes=rng.choice([64 << 20, 1]),
        cors=tuple(_text(rng) for _ in range(rng.randint(0, 2))),
        drain_s=rng.choice([30.0, 0.0, rng.random()]),
        reload=rng.random() < 0.5,
        access_log=rng.random() < 0.5,
        config=rng.choice([{}, {_text(rng): {"path": _text(rng), "max_batch_size": 3, "timeout": 0.25}}]),
        cluster=rng.choice([None, cluster]),
    )


def test_parse_is_the_inverse_of_argv() -> None:
    rng = random.Random(4)
    for _ in range(500):
        options = _any_options(rng)
        assert parse(options.argv()) == options


def test_defaults_are_left_out_and_paths_are_words_of_their_own() -> None:
    options = AppOptions("cats", "127.0.0.1", 8000, ("/srv/cats/app.py:Cats",), ("/srv/cats",))
    assert options.argv() == (
        "--service=cats",
        "--host=127.0.0.1",
        "--port=8000",
        "--handler=/srv/cats/app.py:Cats",
        "--path=/srv/cats",
        "--device=cpu",
    )


def test_unknown_words_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--service=a", "--host=b", "--port=1", "--device=cpu", "--hand=x"])
    assert "--hand=x" in capsys.readouterr().err
