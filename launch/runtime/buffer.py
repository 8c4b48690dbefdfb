"""The buffer between sampling and learning: bounds how many groups are alive, and so how stale one can be."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from actor.rollout import Sampling
from common.types import Group, Prompt


class PromptStream:
    """The task's prompts, shuffled anew each pass: what stands at a place depends on seed and place alone."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, cursor: int = 0) -> None:
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor  # prompts drawn so far; all that a checkpoint needs

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts, numbered by their place."""
        drawn = []
        for index in range(self.cursor, self.cursor + count):
            epoch, place = divmod(index, len(self.prompts))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            drawn.append(replace(self.prompts[order[place]], index=index))
        self.cursor += count
        return drawn


class Buffer:
    """Groups between the actors that sample them and the learner that takes them.

    At most (max_staleness + 1) * P groups are alive, from the start of their sampling to their release. Where each
    release follows a publish, no group is more than max_staleness versions old when it is taken.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        stream: PromptStream,
        sampling: Sampling,
        *,
        prompts_per_step: int,
        num_steps: int,
        max_staleness: int = 0,
        drop_reason: Callable[[Group], str | None] = lambda group: None,
        refill_rounds: int = 0,
    ) -> None:
        assert not (max_staleness and refill_rounds), "a refill would wait behind what is sampled ahead"
        self.actors = list(actors)
        self.stream = stream
        self.sampling = sampling
        self.drop_reason = drop_reason  # of a group from which nothing is learned, and which is sampled anew
        self.refill_rounds = refill_rounds  # times at most in a take
        self.discarded: list[Group] = []  # of the last take
        self.prompt_cursor = stream.cursor  # of the first prompt not yet taken: where a resumed run begins
        self.num_left = prompts_per_step * num_steps  # prompts to start yet: none is sampled in vain
        self.requests: deque[list[Any]] = deque()  # a step each: references to lists of groups, in prompt order
        for _ in range(max_staleness + 1):
            self.release(prompts_per_step)

    def take(self, count: int) -> list[Group]:
        """The next `count` groups, in the order of their prompts; waits for them.

        Those with a reason to be dropped are replaced by new prompts, as long as there are rounds left, and put
        into `discarded`.
        """
        groups = self._wait(self.requests.popleft())
        assert len(groups) == count, "a take has the size of the release that started it"
        self.discarded = []
        for _ in range(self.refill_rounds):
            dropped = [group for group in groups if self.drop_reason(group)]
            if not dropped:
                break
            self.discarded += dropped
            groups = [group for group in groups if not self.drop_reason(group)]
            groups += self._wait(self._start(self.stream.draw(len(dropped))))
        self.prompt_cursor += count + len(self.discarded)
        return groups

    def wait_ahead(self) -> None:
        """Returns when nothing is being sampled."""
        for request in self.requests:
            self._wait(request)

    def release(self, count: int) -> None:
        """`count` taken groups are done with: as many new ones start, with the adapter that the actors hold."""
        prompts = self.stream.draw(min(count, self.num_left))
        self.num_left -= len(prompts)
        self.requests.append(self._start(prompts))

    def _start(self, prompts: Sequence[Prompt]) -> list[Any]:
        share = math.ceil(len(prompts) / len(self.actors)) or 1
        parts = [prompts[start : start + share] for start in range(0, len(prompts), share)]
        return [actor.rollout.remote(part, self.sampling) for actor, part in zip(self.actors, parts, strict=False)]

    def _wait(self, request: list[Any]) -> list[Group]:
        return [group for part in ray.get(request) for group in part]
