"""Processes that work together: each unit is taken once, a failure reaches all, and silence is noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from resofilter_trainer.scoring.team import LostError, Team


def together(processes: int, work: Callable[[Team], object], timeout: float = 5.0) -> list[object]:
    """The result or the error of each process, which is a thread here."""
    values, found = dist.HashStore(), [None] * processes

    def run(rank: int) -> None:
        try:
            with Team(timeout, values, rank, processes) as team:
                found[rank] = work(team)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_one_process_takes_everything():
    with Team(1.0) as team:
        assert [team.take() for _ in range(3)] == [0, 1, 2]
        team.wait()


def test_a_process_that_works_apart_still_gives_signs_of_life():
    values = dist.HashStore()
    team = Team(1.0, values, rank=0, processes=2)
    with team.apart(), Team(1.0) as inner:
        inner.beat()
        assert inner.take() == 0
    assert values.add("beat-0", 0) == 2
    Team(1.0).beat()
    assert values.add("beat-0", 0) == 2


def test_each_unit_is_taken_once():
    def work(team: Team) -> list[int]:
        mine = []
        while (number := team.take()) < 100:
            mine.append(number)
            time.sleep(0.001 * (team.rank + 1))
        team.wait()
        return mine

    found = together(4, work)
    assert sorted(number for mine in found for number in mine) == list(range(100))
    assert len(found[0]) > len(found[3])  # a slow process takes fewer


def test_all_wait_for_the_last():
    ends: dict[int, float] = {}

    def work(team: Team) -> None:
        for _ in range(10 * team.rank):
            time.sleep(0.02)
            team.beat()
        ends[team.rank] = time.monotonic()
        team.wait()
        assert time.monotonic() >= ends[1] if team.rank else True

    assert together(2, work, timeout=0.15) == [None, None]  # longer than the timeout, but never silent so long


def test_a_failure_reaches_the_others():
    def work(team: Team) -> None:
        if team.rank == 1:
            raise ValueError("broken row")
        team.wait()

    found = together(3, work)
    assert isinstance(found[1], ValueError)
    for rank in (0, 2):
        assert isinstance(found[rank], LostError)
        assert str(found[rank]) == "Process 1 of 3 has failed: ValueError: broken row"


def test_a_failure_is_noticed_at_work():
    def work(team: Team) -> None:
        if team.rank == 1:
            raise ValueError("broken row")
        for _ in range(1000):
            time.sleep(0.005)
            team.beat()

    assert isinstance(together(2, work)[0], LostError)


def test_silence_is_noticed_and_named():
    silent = threading.Event()

    def work(team: Team) -> None:
        if team.rank == 1:
            silent.wait(3)
            return
        with pytest.raises(LostError, match=r"Process 1 of 2 has given no sign of life for 0\.3 s") as lost:
            team.wait()
        assert "\n" not in str(lost.value)
        silent.set()

    assert together(2, work, timeout=0.3)[0] is None
