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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.types import Group, Prompt, UserError
from launch.planning.prompts import PromptStream, order_of_pass

SOLVED, EASY, HARD = 0.95, 0.75, 0.25


FILE = "curriculum.safetensors"  # in a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a checkpoint keeps."""

    rates: np.ndarray  # float64 [problems], running success rate; NaN before the first result
    last: np.ndarray  # int64 [problems], where each was drawn last; negative before, in the order of the first draws
    drawn: np.ndarray  # int64 [D, 2], position and problem of those whose result is not known

    @classmethod
    def new(cls, num_problems: int, seed: int) -> "State":
        """Nothing is known, and the first draws come in a shuffled order."""
        last = np.empty(num_problems, dtype=np.int64)
        last[order_of_pass(num_problems, seed, 0)] = np.arange(-num_problems, 0)
        return cls(rates=np.full(num_problems, np.nan), last=last, drawn=np.empty((0, 2), dtype=np.int64))

    def problem(self, num_problems: int) -> str | None:
        """Why this is no state that a run has written, or None."""
        sizes = {"rates": (num_problems,), "last": (num_problems,), "drawn": (len(self.drawn), 2)}
        for name, size in sizes.items():
            array, dtype = getattr(self, name), np.dtype(np.float64 if name == "rates" else np.int64)
            if (array.shape, array.dtype) != (size, dtype):
                return f"{name} is {array.dtype} {list(array.shape)}, not {dtype} {list(size)}"
        if np.any((self.rates < 0) | (self.rates > 1)) or np.any(
            (self.drawn < 0) | (self.drawn >= [2**62, num_problems])
        ):
            return "a rate or a problem is out of range"
        return None


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
        """`shares` are those of solved, easy, normal and hard problems; they sum to 1. `state` None: of a new run."""
        super().__init__(prompts, seed=seed, cursor=cursor, left_out=left_out)
        state = state or State.new(len(prompts), seed)
        self.shares = np.asarray(shares)
        self._rate, self._last = state.rates.copy(), state.last.copy()
        self._drawn = dict(state.drawn.tolist())  # problem, by position
        self._usable = np.ones(len(prompts), dtype=bool)
        self._usable[list(left_out)] = False

    def draw(self, count: int) -> list[Prompt]:
        drawn = []
        pools = np.where(self._usable, self.pools(), -1)
        pools[list(self._drawn.values())] = -1
        for position in range(self.cursor, self.cursor + count):
            problem = self._drawn.get(position)  # before the run was resumed
            if problem is None:
                if pools.max() < 0:  # all wait for their results
                    pools = np.where(self._usable, self.pools(), -1)
                problem = self._drawn[position] = self._choose(position, pools)
                self._last[problem] = position
                pools[problem] = -1
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

    def files(self) -> dict[str, np.ndarray]:
        drawn = np.array(list(self._drawn.items()), dtype=np.int64).reshape(-1, 2)
        return {FILE: np.frombuffer(save({"rates": self._rate, "last": self._last, "drawn": drawn}), np.uint8)}

    def pools(self) -> np.ndarray:
        """int64 [problems]: 0 solved, 1 easy, 2 normal, 3 hard."""
        return np.select([self._rate >= SOLVED, self._rate >= EASY, self._rate <= HARD], [0, 1, 3], default=2)

    def _choose(self, position: int, pools: np.ndarray) -> int:
        """A problem of a pool (-1: none that may be drawn)."""
        shares = self.shares * [np.any(pools == pool) for pool in range(len(self.shares))]
        if shares.any():
            pool = np.random.default_rng([self.seed, position, 0]).choice(len(shares), p=shares / shares.sum())
            candidates = np.flatnonzero(pools == pool)
        else:  # no pool with a share has a problem
            candidates = np.flatnonzero(pools >= 0)
        return int(candidates[self._last[candidates].argmin()])


def saved(folder: Path, num_problems: int) -> State:
    """The state in a checkpoint. Raises UserError for what no run writes."""
    try:
        state = State(**load_file(folder / FILE))
        problem = state.problem(num_problems)
    except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
        problem = str(error).splitlines()[0]
    if problem:
        raise UserError(f"{folder}/{FILE} cannot be resumed from: {problem}; use another checkpoint")
    return state
