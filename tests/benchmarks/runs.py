"""Runs that alternate, and the medians of what they found."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.benchmarks.load import Figures


class Heat(NamedTuple):
    """Who does what, for how many connections."""

    who: str
    work: str
    connections: int


@dataclass(frozen=True)
class Runs:
    """What each heat found, in the order of the rounds."""

    found: dict[Heat, list[Figures]]

    def rate(self, heat: Heat) -> float:
        return statistics.median(figures.rate for figures in self.found[heat])

    def p99(self, heat: Heat) -> float:
        return statistics.median(figures.p99 for figures in self.found[heat])

    def ratio(self, heat: Heat, to: Heat) -> float:
        """How much faster one heat was than another: the median of the rounds' own ratios, for what slows the machine
        down for a while slows both."""
        pairs = zip(self.found[heat], self.found[to], strict=True)
        return statistics.median(one.rate / other.rate for one, other in pairs)

    def p99_ratio(self, heat: Heat, to: Heat) -> float:
        pairs = zip(self.found[heat], self.found[to], strict=True)
        return statistics.median(one.p99 / other.p99 for one, other in pairs)


def alternate(heats: Sequence[Heat], run: Callable[[Heat], Figures], rounds: int) -> Runs:
    """Runs all heats in each round, every other round from the last to the first: none always follows the same."""
    runs = Runs({heat: [] for heat in heats})
    for number in range(rounds):
        order: Iterable[Heat] = heats if number % 2 == 0 else reversed(heats)
        for heat in order:
            figures = run(heat)
            runs.found[heat].append(figures)
            print(f"{number + 1}/{rounds} {heat.who} {heat.work} {heat.connections}: {figures.rate:,.0f}/s", flush=True)
    return runs
