"""Threads of one interpreter kept together on one core: they run in turns anyway, and there each finds in the caches
what the last one left. On two cores they pass it to and fro, which took 40% of the speed."""

import contextlib
import os
import random
import time
from pathlib import Path

STAT = Path("/proc/stat")
THREADS = Path("/proc/self/task")

GAIN = 0.25
"""By what share of a core another must have more room for us before we move there."""


class Cores:
    """The core that this process keeps to, which changes as others come and go. Does nothing where there is only one
    to choose from, or no such choice."""

    def __init__(self) -> None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") and os.access(STAT, os.R_OK) else set()
        self._allowed = sorted(allowed) if len(allowed) > 1 else []
        self._mine = self._allowed[os.getpid() % len(self._allowed)] if self._allowed else None
        self._before = (time.monotonic(), time.process_time(), idle_seconds() if self._allowed else {})
        self.keep()

    def keep(self) -> None:
        """Has every thread of this process run on that core only; those that they start will, too."""
        if self._mine is not None:
            for thread in THREADS.iterdir():
                with contextlib.suppress(OSError):  # it has ended, or the core was taken away from us
                    os.sched_setaffinity(int(thread.name), {self._mine})

    def choose(self) -> None:
        """Looks for a core that had more room since the last time."""
        if self._mine is None:
            return
        then, used, idle = self._before
        self._before = now, using, idling = time.monotonic(), time.process_time(), idle_seconds()
        room = {core: (idling.get(core, 0) - idle.get(core, 0)) / (now - then) for core in self._allowed}
        room[self._mine] += (using - used) / (now - then)  # what we take ourselves is ours to have
        best = max(room, key=room.__getitem__)
        if room[best] > room[self._mine] + GAIN and random.random() < 0.5:  # noqa: S311 - or two would follow each other
            self._mine = best
            self.keep()


def idle_seconds() -> dict[int, float]:
    """For how long each core had nothing to do, since the machine started."""
    ticks = os.sysconf("SC_CLK_TCK")
    lines = (line.split() for line in STAT.read_text().splitlines())
    return {int(line[0][3:]): int(line[4]) / ticks for line in lines if line[0][3:].isdigit() and line[0][:3] == "cpu"}
