"""publish=auto: both ways to publish by turns in the first versions, then the one that costs a step less."""

from collections.abc import Sequence
from dataclasses import dataclass, field

WAYS = ("merged", "hotswap")
WARM_UP = 1  # versions of each way that are not counted
VERSIONS = 3  # of each way that are tried, these included


@dataclass
class Trial:
    """Says which of `ways` the next version goes; told what each one cost, settles on one."""

    ways: Sequence[str] = WAYS
    loads: dict[str, list[float]] = field(init=False)  # seconds
    calls: dict[str, list[tuple[float, int]]] = field(init=False)  # seconds, tokens
    fresh: bool = False  # nothing was sampled since the last load

    def __post_init__(self) -> None:
        self.loads, self.calls = {way: [] for way in self.ways}, {way: [] for way in self.ways}

    @property
    def settled(self) -> bool:
        return all(len(calls) == VERSIONS for calls in self.calls.values())

    def next_way(self) -> str:
        """The way tried less so far; once settled the cheaper one."""
        if self.settled:
            return min(self.ways, key=self.step_seconds)
        return min(self.ways, key=lambda way: len(self.loads[way]))

    def loaded(self, way: str, seconds: float) -> None:
        """A version was loaded in this way."""
        self.fresh = True
        if not self.settled:
            self.loads[way].append(seconds)

    def sampled(self, way: str, seconds: float, num_tokens: int) -> None:
        """A call sampled with it: (seconds, tokens). The first call after each load counts, which is a step's."""
        if self.fresh and len(self.calls[way]) < VERSIONS:
            self.calls[way].append((seconds, num_tokens))
        self.fresh = False

    def step_seconds(self, way: str) -> float:
        """Seconds of loading a version in this way and sampling as many tokens as a call does in the mean."""
        counted = [call for calls in self.calls.values() for call in calls[WARM_UP:]]
        mean_tokens = sum(num_tokens for _, num_tokens in counted) / len(counted)
        token_seconds = min(seconds / max(1, num_tokens) for seconds, num_tokens in self.calls[way][WARM_UP:])
        return min(self.loads[way][WARM_UP:]) + token_seconds * mean_tokens
