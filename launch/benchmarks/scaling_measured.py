"""What launch/benchmark.py scaling measures: steps with the times of their workers, sums over the ranks, publishes."""

from dataclasses import dataclass, field

PHASES = ("sample", "learn", "targets", "wait", "sums", "publish", "driver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one actor sampled in a step."""

    seconds: float
    tokens: int  # sampled
    longest: int  # tokens of its longest completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """One sum over the ranks, as one of them saw it."""

    what: str  # "reduce": of the gradient; "exchange": of the per-token statistics
    bytes: int  # of the summed values
    wait_seconds: float  # until the slowest rank had come
    seconds: float  # of the sum itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank's update."""

    seconds: float
    own_seconds: float  # in its own micro-batches: forward, backward; and the optimizer
    packed_tokens: int  # of its own micro-batches, prompts included
    sums: tuple[Sum, ...] = ()

    @property
    def wait_seconds(self) -> float:
        """Waiting for the slowest rank."""
        return sum(each.wait_seconds for each in self.sums)

    @property
    def sum_seconds(self) -> float:
        return sum(each.seconds for each in self.sums)

    @property
    def targets_seconds(self) -> float:
        """Packing, targets and loss of the whole step, which every rank computes."""
        return self.seconds - self.own_seconds - self.wait_seconds - self.sum_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A size of the run and of its step."""

    ranks: int
    actors: int
    prompts: int

    def devices(self, layout: str) -> int:
        """That the ranks and the actors take, colocated or separate."""
        return self.ranks + self.actors if layout == "separate" else max(self.ranks, self.actors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """One publish."""

    actors: int
    seconds: float
    load_seconds: float  # of the slowest actor
    sharing: int = 1  # actors on the processor that has most of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measured step."""

    point: Point
    seconds: float
    publish: Publish
    parts: tuple[Part, ...]
    ranks: tuple[Rank, ...]
    groups: tuple[tuple[int, ...], ...]  # of each prompt: its tokens, then those of its completions
    group_bytes: int  # of the groups, serialised

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each of PHASES: of the slowest worker; of waiting for it, the mean over the ranks."""
        sample, update = max(part.seconds for part in self.parts), max(rank.seconds for rank in self.ranks)
        return {
            "sample": sample,
            "learn": max(rank.own_seconds for rank in self.ranks),
            "targets": max(rank.targets_seconds for rank in self.ranks),
            "wait": sum(rank.wait_seconds for rank in self.ranks) / len(self.ranks),
            "sums": max(rank.sum_seconds for rank in self.ranks),
            "publish": self.publish.seconds,
            # what is in no worker: dispatch, and the transfer of groups
            "driver": max(1e-6, self.seconds - sample - update - self.publish.seconds),
        }


@dataclass(slots=True)
class Measured:
    """Everything that the model is fitted to."""

    steps: list[Step] = field(default_factory=list)
    sums: list[tuple[int, Sum]] = field(default_factory=list)  # number of ranks, and a sum that was timed alone
    publishes: list[Publish] = field(default_factory=list)
    num_nodes: int = 1
    adapter_bytes: int = 0  # of a published version
