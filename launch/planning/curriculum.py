"""A curriculum: problems are drawn in shares, by how often they have been solved so far.

The running success rate of a problem is the mean of its last group's fraction of correct rollouts and the rate before.

| pool | running success rate |
|---|---|
| solved | at least SOLVED: retired, but for its share |
| easy | at least EASY |
| normal | between, or not drawn yet |
| hard | at most HARD |
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from common.types import Group, Prompt, UserError
from launch.planning.prompts import PromptStream, order_of_pass
from learner import checkpoint

SOLVED, EASY, HARD = 0.95, 0.75, 0.25


class State(BaseModel):
    """What a checkpoint keeps: of the problems that were drawn, and of the positions whose results are not known."""

    model_config = ConfigDict(extra="forbid")

    rates: dict[int, Annotated[float, Field(ge=0, le=1)]] = {}  # running success rate, by problem
    positions: dict[int, Annotated[int, Field(ge=0, lt=2**62)]] = {}  # where each problem was drawn last
    drawn: dict[int, int] = {}  # problem, by position


class Curriculum(PromptStream):
    """Draws each prompt from a pool; of the pool, the problem that was not drawn for longest.

    A pool is chosen with the probability of its share, among those that have a problem. A problem whose result is not
    known yet is drawn again only if there is no other. What is drawn at a position follows from the seed, the position
    and the results so far, which a checkpoint keeps: a resumed run draws the same.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        shares: Sequence[float],
        cursor: int = 0,
        left_out: frozenset[int] = frozenset(),
        state: State | None = None,
    ) -> None:
        """`shares` are those of solved, easy, normal and hard problems; they sum to 1."""
        super().__init__(prompts, seed=seed, cursor=cursor, left_out=left_out)
        state = state or State()
        size = len(prompts)
        self.shares = np.asarray(shares)
        self._rate = np.full(size, np.nan)
        self._last = np.empty(size, dtype=np.int64)  # position; negative before the first draw, in a shuffled order
        self._last[order_of_pass(size, seed, 0)] = np.arange(-size, 0)
        self._usable = np.ones(size, dtype=bool)
        self._usable[list(left_out)] = False
        for array, values in ((self._rate, state.rates), (self._last, state.positions)):
            array[list(values)] = list(values.values())
        self._drawn = dict(state.drawn)

    def draw(self, count: int) -> list[Prompt]:
        drawn = []
        for position in range(self.cursor, self.cursor + count):
            problem = self._drawn.get(position)  # before the run was resumed
            if problem is None:
                problem = self._drawn[position] = self._choose(position)
                self._last[problem] = position
            drawn.append(replace(self.prompts[problem], index=position))
        self.cursor += count
        return drawn

    def learn(self, groups: Sequence[Group]) -> None:
        for group in groups:
            problem = self._drawn.pop(group.prompt.index)
            correct = [rollout.score.correct for rollout in group.rollouts if rollout.score is not None]
            if correct:
                before, now = self._rate[problem], float(np.mean(correct))
                self._rate[problem] = now if np.isnan(before) else (before + now) / 2

    def state(self) -> dict[str, Any]:
        seen, drawn = np.flatnonzero(~np.isnan(self._rate)), np.flatnonzero(self._last >= 0)
        state = State(
            rates=dict(zip(seen.tolist(), self._rate[seen].tolist(), strict=True)),
            positions=dict(zip(drawn.tolist(), self._last[drawn].tolist(), strict=True)),
            drawn=self._drawn,
        )
        return {"curriculum": state.model_dump()}

    def pools(self) -> np.ndarray:
        """int64 [problems]: 0 solved, 1 easy, 2 normal, 3 hard."""
        return np.select([self._rate >= SOLVED, self._rate >= EASY, self._rate <= HARD], [0, 1, 3], default=2)

    def _choose(self, position: int) -> int:
        waiting = self._usable.copy()
        waiting[list(self._drawn.values())] = False
        free = waiting if waiting.any() else self._usable
        pools = np.where(free, self.pools(), -1)
        shares = self.shares * [np.any(pools == pool) for pool in range(len(self.shares))]
        if not shares.any():  # no pool with a share has a problem
            candidates = np.flatnonzero(free)
        else:
            pool = np.random.default_rng([self.seed, position, 0]).choice(len(shares), p=shares / shares.sum())
            candidates = np.flatnonzero(pools == pool)
        return int(candidates[self._last[candidates].argmin()])


def saved(folder: Path | None, num_prompts: int) -> State:
    """The state in a checkpoint; that of a new run without one. Raises UserError for what no run writes."""
    if folder is None:
        return State()
    try:
        state = State.model_validate(checkpoint.read_object(folder / "run_state.json").get("curriculum"))
        for problem in (*state.rates, *state.positions, *state.drawn.values()):
            if not 0 <= problem < num_prompts:
                raise ValueError(f"there is no problem {problem}")
    except (OSError, ValueError) as error:  # a ValidationError, too
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/run_state.json has no curriculum ({reason}); use another checkpoint") from None
    return state
