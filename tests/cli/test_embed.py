"""`mdeploy embed` against a service that is slow, busy, dying, or not there."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdeploy.cli import main
from mdeploy.errors import ExitCode
from tests.fakes import embedding
from tests.fakes.embed_server import DIM, MODEL, vector
from tests.fakes.embedding import Fake
from tests.support import Result, free_port, mdeploy, running, until

Matrix = np.ndarray[Any, np.dtype[np.float32]]
TEXTS = [f"text number {i}" for i in range(3000)]


@pytest.fixture(scope="module")
def quick() -> Iterator[Fake]:
    with embedding.service() as fake:
        yield fake


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def embed(url: str, *words: str | Path, key: str = "") -> Result:
    return mdeploy("embed", url, *words, MDEPLOY_API_KEY=key)


def expected(texts: list[str]) -> Matrix:
    return np.array([vector(text) for text in texts], np.float32)


# a few texts


def test_json_is_one_document(quick: Fake) -> None:
    result = embed(quick.url, "a cat", "一只猫", "--json")
    assert result.json["schema"] == 1
    assert sum("[" in line and "]" in line for line in result.stdout.splitlines()) == 2  # a vector a line
    assert (result.json["model"], result.json["dim"]) == (MODEL, DIM)
    assert result.json["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert np.allclose(result.json["embeddings"], expected(["a cat", "一只猫"]))


def test_people_see_how_alike_texts_are(quick: Fake) -> None:
    result = embed(f"{quick.url}/v1/", "a cat", "a dog " * 20)
    assert "hash-8: 8 numbers a text, 42 tokens" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    cosine = float(np.dot(*expected(["a cat", "a dog " * 20])))
    assert ["1", "1.000", f"{cosine:.3f}"] in rows and ["2", f"{cosine:.3f}", "1.000"] in rows
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_wishes_reach_the_service(quick: Fake) -> None:
    def first(*words: str) -> list[float]:
        found: list[float] = embed(quick.url, "text", "--json", *words).json["embeddings"][0]
        return found

    assert np.allclose(first("--prompt-name", "code", "--dimensions", "3"), vector("text", "code", dim=3))
    assert np.allclose(first("--instruction", "find it", "--query"), vector("text", "find itquery"))


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        ((), ExitCode.USAGE, "name texts, or a file"),
        (("text", "-f", "file"), ExitCode.USAGE, "--file does not go with texts"),
        (("text", "-o", "out.npy"), ExitCode.USAGE, "go with --file"),
        (("text", "--dimensions", "9"), ExitCode.USAGE, "dimensions is at most 8"),
        (("text", "--model", "other"), ExitCode.NOT_FOUND, "no model other"),
        (("w " * 60,), ExitCode.FAILURE, "60 tokens, at most 50"),
        (("--image", "gone.png"), ExitCode.NOT_FOUND, "no file gone.png"),
        (("--image", "notes.txt"), ExitCode.USAGE, "no picture by its name"),
        (("-f", "gone.txt"), ExitCode.NOT_FOUND, "no file gone.txt"),
        (("-f", "-", "-o", "out.csv"), ExitCode.USAGE, "cannot tell the format"),
        (("-f", "-", "-o", "gone/out.npy"), ExitCode.CONFIG, "mkdir -p gone"),
    ],
)
def test_mistakes(
    quick: Fake, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: ExitCode, why: str
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        found = main.run(["embed", quick.url, *words])  # in this process: there are many of them
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stdout, stderr = capsys.readouterr()
    assert (found, stdout) == (code, ""), stderr
    assert why in stderr


def test_nobody_listens() -> None:
    result = embed(f"127.0.0.1:{free_port()}", "text")
    assert result.code == ExitCode.UNAVAILABLE and "cannot reach" in result.stderr


def test_an_unknown_name() -> None:
    result = embed("nobody", "text")
    assert result.code == ExitCode.NOT_FOUND


def test_keys() -> None:
    with embedding.service("--key", "sk-1") as fake:
        assert embed(fake.url, "text", key="sk-1").code == ExitCode.OK
        result = embed(fake.url, "text", key="sk-2")
        assert result.code == ExitCode.CONFIG and "refuses the key" in result.stderr


# files


def test_a_file_becomes_a_matrix(quick: Fake, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    result = embed(quick.url, "-f", texts, "-o", out)
    assert result.code == 0, result.stderr
    found = np.load(out)
    assert found.dtype == np.float32 and np.array_equal(found, expected(TEXTS))
    assert result.stdout.startswith(f"{out}: 3,000 rows of 8 numbers")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.npy"]
    again = embed(quick.url, "-f", texts, "-o", out)
    assert again.code == ExitCode.USAGE and "--overwrite" in again.stderr
    few = tmp_path / "few.txt"
    few.write_text("one\r\ntwo")
    assert embed(quick.url, "-f", few, "-o", out, "--overwrite").code == 0
    assert np.array_equal(np.load(out), expected(["one", "two"]))


def test_json_lines_in_and_out(quick: Fake, tmp_path: Path) -> None:
    given = tmp_path / "given.jsonl.gz"
    rows = [{"id": f"a{i}", "title": text} for i, text in enumerate(TEXTS[:100])]
    given.write_bytes(gzip.compress("\n".join(map(json.dumps, [*rows, "a plain string"])).encode()))
    out = tmp_path / "out.jsonl"
    result = embed(quick.url, "-f", given, "--field", "title", "-o", out, "--json", "--batch", "7")
    assert {**result.json, "seconds": 0} == {
        "schema": 1,
        "model": MODEL,
        "dim": DIM,
        "output": str(out),
        "rows": 101,
        "failed": 0,
        "tokens": 303,
        "resumed_rows": 0,
        "seconds": 0,
        "errors": [],
    }
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["index"], row.get("id")) for row in found] == [*((i, f"a{i}") for i in range(100)), (100, None)]
    assert np.allclose([row["embedding"] for row in found], expected([*TEXTS[:100], "a plain string"]))


def test_standard_input_to_standard_output(quick: Fake) -> None:
    command = [sys.executable, "-m", "mdeploy", "embed", quick.url, "-f", "-"]
    done = subprocess.run(command, input="one\ntwo\n\n", capture_output=True, text=True, timeout=60, check=True)
    found = [json.loads(line)["embedding"] for line in done.stdout.splitlines()]
    assert np.allclose(found, expected(["one", "two"]))


def test_requests_run_at_once_and_rows_keep_their_order(texts: Path, tmp_path: Path) -> None:
    with embedding.service("--delay", "0.02") as fake:
        result = embed(fake.url, "-f", texts, "-o", tmp_path / "out.npy", "-c", "6", "--batch", "20")
        assert 3 <= fake.most_at_once() <= 6
    assert result.code == 0, result.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected(TEXTS))


BAD = b"""{"text": "fine"}
{"text": "%s"}
no json

{"other": 1}
{"text": 5}
\xff
{"text": "nan"}
{"text": "good"}


"""


def test_lines_without_a_vector(quick: Fake, tmp_path: Path) -> None:
    given, out = tmp_path / "bad.jsonl", tmp_path / "out.npy"
    given.write_bytes(BAD % (b"w " * 60))
    result = embed(quick.url, "-f", given, "-o", out)
    assert result.code == ExitCode.FAILURE and "bad.jsonl, line 2: 60 tokens, at most 50" in result.stderr
    assert "--skip-errors" in result.stderr and not out.exists()
    result = embed(quick.url, "-f", given, "-o", out, "--skip-errors", "--json")
    assert result.code == ExitCode.FAILURE
    assert (result.json["rows"], result.json["failed"], result.json["resumed_rows"]) == (9, 7, 1)
    assert [error["line"] for error in result.json["errors"]] == [2, 3, 4, 5, 6, 7, 8]
    found = np.load(out)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(found[[0, 8]], expected(["fine", "good"]))
    rows = embed(quick.url, "-f", given, "--skip-errors", "--truncate")
    errors = {row["index"]: row["error"] for row in map(json.loads, rows.stdout.splitlines()) if "error" in row}
    assert sorted(errors) == [2, 3, 4, 5, 6, 7]
    assert errors[3] == "the line is empty" and errors[4] == "the line has no text in 'text'; it has other"
    assert errors[5] == "'text' of the line is no text"


def test_a_line_can_be_mended(quick: Fake, tmp_path: Path) -> None:
    given, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    given.write_text("\n".join([*TEXTS[:50], "w " * 60, *TEXTS[50:90]]))
    assert embed(quick.url, "-f", given, "-o", out).code == ExitCode.FAILURE
    given.write_text("\n".join([*TEXTS[:50], "mended", *TEXTS[50:90]]))
    result = embed(quick.url, "-f", given, "-o", out, "--json")
    assert result.json["resumed_rows"] == 50
    assert np.array_equal(np.load(out), expected([*TEXTS[:50], "mended", *TEXTS[50:90]]))


def test_an_empty_file(quick: Fake, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert embed(quick.url, "-f", "empty.txt", "-o", tmp_path / "out.npy").code == 0
    assert np.load(tmp_path / "out.npy").shape == (0, DIM)


def test_half_a_gzip_file(quick: Fake, tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(3000).hex().encode())
    (tmp_path / "half.txt.gz").write_bytes(whole[:1000])
    result = embed(quick.url, "-f", "half.txt.gz", "-o", "out.npy")
    assert result.code == ExitCode.CONFIG and "no whole gzip file" in result.stderr


# what goes wrong on the way


def test_a_busy_service_is_waited_for(texts: Path, tmp_path: Path) -> None:
    with embedding.service("--busy", "12") as fake:
        result = embed(fake.url, "-f", texts, "-o", tmp_path / "out.npy")
        assert result.code == 0, result.stderr
        text = embed(fake.url, "broken")
        assert text.code == 0, text.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected(TEXTS))


def test_patience_ends(tmp_path: Path, texts: Path) -> None:
    with embedding.service("--busy", "1000000") as fake:
        result = embed(fake.url, "-f", texts, "-o", tmp_path / "out.npy", "--patience", "0.5")
    assert result.code == ExitCode.UNAVAILABLE and "too much to do, for 0.5 s now" in result.stderr


def test_a_service_that_restarts(texts: Path, tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "out.npy"
    with (
        embedding.service("--die-after", "20", port=port) as fake,
        running("embed", fake.url, "-f", texts, "-o", out) as us,
    ):
        fake.process.wait(20)
        with embedding.service(port=port):
            assert us.wait(30) == 0
    assert np.array_equal(np.load(out), expected(TEXTS))


@contextmanager
def half_done(fake: Fake, texts: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has written something it can go on from."""
    with running("embed", fake.url, "-f", texts, "-o", out, "-c", "2", "--batch", "10") as process:
        until(lambda: rows_done(out), 20, "the first mark")
        yield process


def rows_done(out: Path) -> int:
    """Rows that are known to be on disk."""
    progress = out.with_name(f"{out.name}.progress")
    return int(json.loads(progress.read_bytes())["rows"]) if progress.exists() else 0


@pytest.fixture(scope="module")
def slow() -> Iterator[Fake]:
    with embedding.service("--delay", "0.05") as fake:
        yield fake


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_a_killed_run_goes_on(quick: Fake, slow: Fake, texts: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    marks = [0]
    for _ in range(2):
        with half_done(slow, texts, out) as process:
            until(lambda: rows_done(out) > marks[-1], 20, "more is done")
            process.kill()
            process.wait()
        marks.append(rows_done(out))
        assert not out.exists()
    rows = marks[-1]
    assert rows < len(TEXTS)
    with out.with_name(f"{name}.partial").open("ab") as file:
        file.write(b"half a row")
    result = embed(quick.url, "-f", texts, "-o", out, "--json")
    assert result.code == 0, result.stderr
    assert (result.json["resumed_rows"], result.json["rows"], result.json["tokens"]) == (rows, 3000, 9000)
    whole = tmp_path / f"whole{out.suffix}"
    assert embed(quick.url, "-f", texts, "-o", whole).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob(f"{name}*")) == [name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_it_goes_on(
    quick: Fake, slow: Fake, texts: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out.npy"
    with half_done(slow, texts, out) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=10)
    assert process.returncode == code
    assert f"what is done is in {out}.partial" in said and "Traceback" not in said
    assert embed(quick.url, "-f", texts, "-o", out).code == 0
    assert np.array_equal(np.load(out), expected(TEXTS))


def test_a_run_is_only_gone_on_from_where_it_fits(quick: Fake, slow: Fake, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    with half_done(slow, texts, out) as process:
        second = embed(quick.url, "-f", texts, "-o", out)
        assert second.code == ExitCode.FAILURE and "another command writes" in second.stderr
        process.kill()
        process.wait()
    kept = rows_done(out)
    other = embed(quick.url, "-f", texts, "-o", out, "--query")
    assert other.code == ExitCode.CONFIG and "input_type: None, now query" in other.stderr
    with embedding.service("--salt", "another model under the same name") as fake:
        other = embed(fake.url, "-f", texts, "-o", out)
    assert other.code == ExitCode.CONFIG and "does not give the vectors it gave before" in other.stderr
    original = texts.read_text()
    texts.write_text(original.replace("number 1\n", "number one\n"))
    other = embed(quick.url, "-f", texts, "-o", out)
    assert other.code == ExitCode.CONFIG and "has changed" in other.stderr and "goes on" not in other.stderr
    assert rows_done(out) == kept
    texts.write_text(original + "one more\n")
    assert embed(quick.url, "-f", texts, "-o", out, "--json").json["resumed_rows"] == kept
    assert np.array_equal(np.load(out), expected([*TEXTS, "one more"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk(quick: Fake, texts: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False)
    if mount.returncode:
        pytest.skip("mounts are not allowed here")
    try:
        out = disk / "out.npy"
        result = embed(quick.url, "-f", texts, "-o", out)
        assert result.code == ExitCode.FAILURE and "No space left on device" in result.stderr
        assert not out.exists()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        result = embed(quick.url, "-f", texts, "-o", out)
        assert result.code == 0, result.stderr
        assert np.array_equal(np.load(out), expected(TEXTS))
    finally:
        subprocess.run(["umount", disk], check=True)
