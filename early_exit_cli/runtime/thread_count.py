"""How many threads a compiled pass is given: all, or fewer while another program keeps a core busy.

The threads of a pass wait for each other some 150 times. One whose core is taken holds up all of them each time, so that one
busy program beside two threads makes a pass four times as long, where one thread alone would take twice. Bits do not depend on
the number of threads, so it may follow what passes take.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

FORGETTING = 1.02
"""By so much a pass more counts as undisturbed, each time there was one: texts grow, and processors heat up."""
SLOWED = 1.5
"""Passes that take so much longer than undisturbed ones are reason to try fewer threads."""
BETTER = 0.9
"""Another number of threads is kept where passes take less than this share of what they took."""
SEEN, TRIED = 5, 3
"""Passes whose median counts: of the number that is used, of one that is tried."""
SOON, LATE = 16, 128
"""Passes between two trials at least; after each that was in vain twice as many, up to LATE."""


class ThreadCount:
    """Follows what passes take. One of a process: what it follows is the machine."""

    def __init__(self) -> None:
        self._begin(1)

    def _begin(self, threads: int) -> None:
        self.all = self.used = self.settled = threads
        self.least: dict[Hashable, float] = {}
        self.seen: deque[float] = deque(maxlen=SEEN)
        self.tried: list[float] = []
        self.passes, self.pause, self.step, self.climbs = 0, SOON, 1, False

    @property
    def now(self) -> int:
        """For the next pass, or a drafting head's step."""
        threads = torch.get_num_threads()
        if threads != self.all:
            self._begin(threads)
        return self.used

    @contextmanager
    def timed(self, kind: Hashable) -> Iterator[int]:
        """The threads for a pass, which the block runs. `kind`: passes of one kind take equally long, but for their texts."""
        threads = self.now
        started = time.perf_counter()
        yield threads
        self.observe(kind, time.perf_counter() - started)

    def observe(self, kind: Hashable, seconds: float) -> None:
        """A pass took so long with `now` threads."""
        undisturbed = self.least.setdefault(kind, seconds)
        slower = seconds / undisturbed
        if self.used != self.settled:
            self.tried.append(slower)
            if len(self.tried) == TRIED:
                self._judge()
            return
        self.least[kind] = min(seconds, undisturbed * FORGETTING)
        self.seen.append(slower)
        self.passes += 1
        if self.passes >= self.pause:
            self._try_another()

    def _try_another(self) -> None:
        """Fewer threads where passes are slowed, by 1, 2, 4 ... until that helps; else one more. Where both would do, in turns."""
        fewer = self.settled > 1 and median(self.seen) > SLOWED
        more = self.settled < self.all
        if not fewer and not more:
            return
        self.climbs = more and not (fewer and self.climbs)
        self.used = self.settled + 1 if self.climbs else max(1, self.settled - self.step)

    def _judge(self) -> None:
        if median(self.tried) < BETTER * median(self.seen):
            self.settled, self.pause, self.step = self.used, SOON, 1
            self.seen.clear()
        elif self.climbs or self.used == 1:
            self.pause, self.step = min(2 * self.pause, LATE), 1
        else:
            self.step *= 2
        self.used, self.passes, self.tried = self.settled, 0, []


pass_threads = ThreadCount()
