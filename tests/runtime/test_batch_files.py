"""Batch files: what is answered, what is refused, and going on after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from irc.core.errors import StorageError
from irc.runtime.batch_files import run_batch
from irc.runtime.engine import Engine, EngineOptions
from tests.runtime.driving import model
from tests.runtime.test_generation import Words


def engine() -> Engine:
    return Engine(model(), EngineOptions(max_sequences=4))


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    return {a["id"]: a for a in map(json.loads, path.read_text().splitlines())}


def lines(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"id": f"r{n}", "prompt": f"{n} 7 9", "max_tokens": 5, "temperature": n % 2, "seed": n} for n in range(count)
    ]


def test_answers(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*lines(), {"id": "ids", "prompt": [1, 2], "max_tokens": 2}])
    seen: list[tuple[int, int]] = []
    result = run_batch(
        engine(),
        source,
        tmp_path / "out.jsonl",
        tokenizer=Words(),
        progress=lambda done, total: seen.append((done, total)),
    )
    found = answers(tmp_path / "out.jsonl")
    assert (result.answered, result.failed, result.skipped) == (13, 0, 0)
    assert seen == [(n + 1, 13) for n in range(13)]
    assert set(found) == {*(f"r{n}" for n in range(12)), "ids"}
    one = found["r0"]
    assert (one["prompt_tokens"], len(one["token_ids"]), one["finish_reason"]) == (3, 5, "length")
    assert one["text"] == "".join(f" {i}" for i in one["token_ids"])


def test_a_cut_run_goes_on(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", lines()), tmp_path / "out.jsonl"
    run_batch(engine(), source, tmp_path / "whole.jsonl", tokenizer=Words())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out.write_bytes(whole[: len(whole) // 2])  # within a line
    kept = whole[: len(whole) // 2].count(b"\n")
    result = run_batch(engine(), source, out, tokenizer=Words())
    assert (result.answered, result.skipped) == (12 - kept, kept)
    assert answers(out) == answers(tmp_path / "whole.jsonl")
    again = run_batch(engine(), source, out, tokenizer=Words())
    assert (again.answered, again.skipped) == (0, 12)


def test_lines_that_cannot_be_served_do_not_stop_the_others(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"id": "long", "prompt": [1] * 40}, {"id": "typo", "prompt": "1", "temprature": 1}, {"id": "none"},
        {"id": "hot", "prompt": "1", "temperature": -1}, {"id": "two", "prompt": ["1", "2"]},
        {"id": "kind", "prompt": "1", "max_tokens": "many"},
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", [*wrong, *lines(3)])
    result = run_batch(engine(), source, tmp_path / "out.jsonl", tokenizer=Words())
    found = answers(tmp_path / "out.jsonl")
    assert (result.answered, result.failed) == (3, 6)
    assert "the cache holds at most 32" in found["long"]["error"]
    assert "unknown field 'temprature' (did you mean 'temperature'?)" in found["typo"]["error"]
    assert "no prompt" in found["none"]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1 is no JSON"), ("[1]", "line 1 is no JSON object"),
     ('{"id": 1, "prompt": "1"}\n{"id": "1", "prompt": "2"}', "line 2: the id '1' was there before")],
)  # fmt: skip
def test_damaged_sources(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(StorageError, match=message):
        run_batch(engine(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", tokenizer=Words())


@pytest.mark.parametrize("text", ["my diary\n", "{}\n", "notes without an end"])
def test_other_files_are_not_written_to(tmp_path: Path, text: str) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(1)), tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(StorageError, match="not adding to it"):
        run_batch(engine(), source, out, tokenizer=Words())
    assert out.read_text() == text
