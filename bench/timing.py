"""Timing: calls taken in turns, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """The durations of one call, in seconds."""

    samples: Sequence[float]

    def percentile(self, percent: float) -> float:
        """Linear between the two nearest samples; 50 is the median."""
        ordered = sorted(self.samples)
        position = percent / 100 * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    @property
    def median(self) -> float:
        return self.percentile(50)


def wall(call: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    min_time: float,
    sample: Callable[[Callable[[], object]], float] = wall,
) -> dict[str, Timing]:
    """Time every call by sample, in rounds, one sample of each per round, after one round that does not count.

    Rounds go on until there are ``repeats`` of them and they took ``min_time`` seconds per call. Each round has its
    own order, so that no call always finds the caches as the same other one left them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order, shuffle = list(calls), random.Random(0).shuffle
    spent, rounds = 0.0, 0
    while calls and (rounds < repeats or spent < min_time * len(calls)):
        shuffle(order)
        for name in order:
            samples[name].append(sample(calls[name]))
            spent += samples[name][-1]
        rounds += 1
    return {name: Timing(durations) for name, durations in samples.items()}
