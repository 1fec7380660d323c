"""A table that the main process reads is every process's, and the others read nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from resofilter_trainer import InputError
from resofilter_trainer.data import together

AT_ONCE = together.SENT
TABLE = pa.table({"unit": range(10), "value": [[i / 7] * (i % 3) for i in range(10)], "text": [None, "a"] * 5})


def in_two_processes(read: Callable[[], pa.Table], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the main process and another one get, or the InputError that they raise, and the number of messages."""
    messages, found = list[Any](), list[Any]()
    as_main = {True: lambda values: messages.append(list(values)) or values, False: lambda values: messages.pop(0)}
    for is_main, send in as_main.items():
        monkeypatch.setattr(
            together, "PartialState", lambda is_main=is_main: SimpleNamespace(num_processes=2, is_main_process=is_main)
        )
        monkeypatch.setattr(together, "broadcast_object_list", send)
        try:
            found.append(together.table_from_main(read if is_main else pytest.fail))
        except InputError as error:
            found.append(str(error))
        found.append(len(messages))
    return found


@pytest.mark.parametrize("sent", [1, 100, AT_ONCE])
@pytest.mark.parametrize("table", [TABLE, TABLE.slice(0, 0), TABLE.slice(3, 4), pa.concat_tables([TABLE, TABLE])])
def test_every_process_gets_the_table_that_the_main_one_reads(table, sent, monkeypatch):
    monkeypatch.setattr(together, "SENT", sent)
    main, messages, other, left = in_two_processes(lambda: table, monkeypatch)
    assert main is table
    assert other.equals(table)
    assert other.schema == table.schema
    assert left == 0
    assert messages - 1 == {1: max(table.num_rows, 1), AT_ONCE: 1}.get(sent, messages - 1)


def test_what_the_main_process_cannot_read_is_told_in_every_process(monkeypatch):
    def refused() -> pa.Table:
        raise InputError("a part is damaged")

    assert in_two_processes(refused, monkeypatch) == ["a part is damaged", 1, "a part is damaged", 0]
