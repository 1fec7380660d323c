"""Rows in files, and commands that end with an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resofilter_trainer.cli.entry import main

ROWS = [{"prompt": f"what is {i} + 2 ?", "completion": " answer:" + " 3" * (1 + i % 5), "id": i} for i in range(12)]


QUESTIONS = [{"question": row["prompt"], "answer": row["completion"], "kind": "ab"[row["id"] % 2]} for row in ROWS]


EMPTY = [{**row, "completion": " \n" if row["id"] in (3, 7) else row["completion"]} for row in ROWS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that cannot work, check that it prints one line and exits with 2, and return what the line says."""
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in argv])
    printed = capsys.readouterr()
    lines = printed.err.replace("\r", "\n").rstrip("\n").split("\n")

    assert stopped.value.code == 2
    assert "Traceback" not in printed.err
    assert lines[-1].startswith(f"resofilter {argv[0]}: error: ")
    assert [line for line in lines if line.startswith("resofilter")] == lines[-1:]
    assert printed.out == ""
    return lines[-1].removeprefix(f"resofilter {argv[0]}: error: ")


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
