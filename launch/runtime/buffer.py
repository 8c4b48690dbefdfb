"""The buffer between sampling and learning: bounds how many groups are in flight, and so how stale one can be."""

from collections import deque
from collections.abc import Callable

from actor.rollout import Sampling
from common.types import Group
from launch.planning.prompts import PromptStream
from launch.runtime.fleet import Fleet, Request, finished


class Buffer:
    """Groups between the actors that sample them and the learner that takes them.

    At most (max_staleness + 1) * P groups are in flight, from the start of their sampling to their release. If each
    release follows a publish, no group is more than max_staleness versions old when it is taken.

    A group for which `drop_reason` returns a text teaches nothing; `take` replaces it by a new prompt, in at most
    `refill_rounds` rounds.
    """

    def __init__(
        self,
        fleet: Fleet,
        stream: PromptStream,
        sampling: Sampling,
        *,
        prompts_per_step: int,
        part_prompts: int | None = None,
        num_steps: int,
        max_staleness: int = 0,
        drop_reason: Callable[[Group], str | None] = lambda group: None,
        refill_rounds: int = 0,
    ) -> None:
        assert not (max_staleness and refill_rounds), "a refill would wait for the prefetched rollouts"
        self.fleet = fleet
        self.part_prompts = part_prompts
        self.stream = stream
        self.sampling = sampling
        self.drop_reason = drop_reason
        self.refill_rounds = refill_rounds
        self.discarded: list[Group] = []  # by the last take
        self.prompt_cursor = stream.cursor  # of the first prompt not yet taken: where a resumed run begins
        self.num_remaining = prompts_per_step * num_steps  # prompts still to start: none is sampled after the last step
        self.requests: deque[Request] = deque()  # one per step
        self.prompts_per_step, self.max_staleness = prompts_per_step, max_staleness

    def start(self) -> None:
        """Start the first rollouts."""
        for _ in range(self.max_staleness + 1):
            self.release(self.prompts_per_step)

    def take(self, count: int) -> list[Group]:
        """The next `count` groups, in the order of their prompts; waits for them.

        Dropped groups are put into `discarded` and replaced by groups of new prompts, as long as there are rounds left.
        """
        groups = finished(self.requests.popleft())
        assert len(groups) == count, "a take has the size of the release that started it"
        self.discarded = []
        for _ in range(self.refill_rounds):
            dropped = [group for group in groups if self.drop_reason(group)]
            if not dropped:
                break
            self.discarded += dropped
            groups = [group for group in groups if not self.drop_reason(group)]
            prompts = self.stream.draw(len(dropped))
            groups += self.fleet.sample(prompts, self.sampling, part_prompts=self.part_prompts)
        self.prompt_cursor = 1 + max(group.prompt.index for group in [*groups, *self.discarded])
        self.stream.learn([*groups, *self.discarded])
        return groups

    def release(self, count: int) -> None:
        """Free the capacity of `count` taken groups: as many new ones start, with the adapter that the actors hold."""
        prompts = self.stream.draw(min(count, self.num_remaining))
        self.num_remaining -= len(prompts)
        self.requests.append(self.fleet.start(prompts, self.sampling, part_prompts=self.part_prompts))
