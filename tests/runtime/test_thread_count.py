"""How many threads passes are given, on pretended machines: `passes` tells what each would take."""

from __future__ import annotations

import pytest
import torch

from early_exit_cli.runtime.thread_count import LATE, ThreadCount


class Machine:
    """cores, and how many of them other programs keep busy. A pass that is given none of these takes 1 / threads."""

    def __init__(self, cores, monkeypatch):
        self.cores, self.busy, self.threads = cores, 0, ThreadCount()
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)

    def passes(self, count, kind="", scale=1.0):
        """Threads and seconds of so many passes."""
        found = []
        for _ in range(count):
            used = self.threads.now
            alone = used <= self.cores - self.busy
            seconds = scale * (1 / used if alone else 8 / used)
            self.threads.observe(kind, seconds)
            found.append((used, seconds))
        return found


@pytest.fixture
def two(monkeypatch):
    return Machine(2, monkeypatch)


@pytest.fixture
def eight(monkeypatch):
    return Machine(8, monkeypatch)


def test_all_threads_where_nothing_else_runs(eight):
    assert {used for used, _ in eight.passes(1000)} == {8}


def test_one_fewer_soon_after_a_program_takes_a_core_and_all_again_soon_after_it_ended(two):
    two.passes(50)
    two.busy = 1
    assert {used for used, _ in two.passes(40)[30:]} == {1}
    taken = sum(seconds for _, seconds in two.passes(1000))
    assert taken < 1000 * 1.12  # what trying two again costs
    two.busy = 0
    assert {used for used, _ in two.passes(LATE + 20)[-5:]} == {2}


def test_as_many_fewer_as_cores_are_busy(eight):
    eight.passes(50)
    eight.busy = 3
    assert [used for used, _ in eight.passes(150)[-10:]].count(5) >= 7
    eight.busy = 1
    assert [used for used, _ in eight.passes(400)[-10:]].count(7) >= 7


def test_a_longer_text_is_no_busy_machine(eight):
    eight.passes(50)
    longer = [used for used, _ in eight.passes(2000, scale=3.0)]
    assert longer.count(7) <= 9
    assert longer[-1] == 8


def test_passes_of_another_width_are_compared_with_their_own(eight):
    for _ in range(100):
        assert eight.passes(1, "one") == [(8, 1 / 8)]
        assert eight.passes(1, "four", 1.9) == [(8, 1.9 / 8)]


def test_a_new_number_of_threads_is_taken_at_once(two, monkeypatch):
    two.passes(50)
    two.busy = 1
    two.passes(100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert two.threads.now == 4
