"""A learner and an actor that kill themselves at chosen points, each once, also when they are replaced."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actor.actor import Actor, Receipt
from actor.rollout import Sampling
from common.adapter import Adapter
from common.types import Group, Prompt, UpdateResult
from learner.learner import Learner

VARIABLE = "HORIZON_TEST_FAULTS"  # a folder with an empty file for each point that is still to fail
KILL, STOP = "kill", "stop"


def arm(folder: Path, points: Sequence[str], how: str = KILL) -> None:
    for point in points:
        (folder / point).write_text(how)


def reached(point: str) -> None:
    """The process ends, or stops, at an armed point."""
    path = Path(os.environ[VARIABLE]) / point
    if path.exists():
        how = path.read_text()
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL if how == KILL else signal.SIGSTOP)


class FaultyLearner(Learner):
    """Points: update, reduce, reduced, snapshot, publish, restore, each with the number of steps taken before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        step = self.optimizer.step

        def faulty_step(loss: Any, number: int) -> Any:
            reached(f"reduce-{number}-{self.ranks.rank}")
            result = step(loss, number)
            reached(f"reduced-{number}-{self.ranks.rank}")
            return result

        self.optimizer.step = faulty_step  # type: ignore[method-assign]

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        reached(f"update-{self.step}-{self.ranks.rank}")
        return super().update(groups)

    def files(self) -> Any:
        reached(f"snapshot-{self.step}")
        return super().files()

    def adapter(self, canary: bool = True) -> Adapter:
        reached(f"publish-{self.step}-{self.ranks.rank}")
        return super().adapter(canary)

    def load_files(self, files: Any) -> int:
        reached(f"restore-{self.ranks.rank}")
        return super().load_files(files)


class FaultyActor(Actor):
    """Points: sample, score, load, loaded, each with the adapter version, and probe of a replacement."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        start = self.rewards.start

        def faulty_start(*some: Any, **more: Any) -> Any:
            reached(f"score-{self.version}")
            return start(*some, **more)

        self.rewards.start = faulty_start  # type: ignore[method-assign]

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        reached(f"sample-{self.version}")
        return super().rollout(prompts, sampling)

    def load(self, adapter: Adapter) -> Receipt:
        reached(f"load-{adapter.version}")
        receipt = super().load(adapter)
        reached(f"loaded-{adapter.version}")
        return receipt
