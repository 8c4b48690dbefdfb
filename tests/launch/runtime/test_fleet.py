"""Parts of a request and the actors that sample them: who takes what, what a pause waits for, what a loss repeats."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import local_actor
import pytest
import ray
import tiny
from local_actor import Lazy
from local_actor import fleet as fleet_of

from actor.rollout import Sampling
from common.types import Group, Prompt
from launch.runtime.channel import AdapterMismatch
from launch.runtime.fleet import Fleet, finished
from launch.runtime.recovery import Losses

SAMPLING = Sampling(group_size=2, temperature=1.0, max_tokens=4, stop=(), seed=0)
PROMPTS = [Prompt(messages=(), answer=str(i), index=i) for i in range(12)]


class Timed:
    """An actor that takes some seconds for a part, one part after another as Ray's actors do."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.parts: list[list[int]] = []
        self.working = 0
        self.rollout = self
        self.close = type("Method", (), {"remote": staticmethod(lambda: None)})

    def remote(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        self.working += 1
        assert self.working == 1, "an actor has one part at a time"
        self.parts.append([prompt.index for prompt in prompts])
        time.sleep(self.seconds)
        self.working -= 1
        return [tiny.group(prompt.index, [1, 1], [0.0, 1.0]) for prompt in prompts]


@pytest.fixture(autouse=True)
def _references_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    local_actor.install(monkeypatch)


@pytest.mark.parametrize(("part_prompts", "sizes"), [(None, [6, 6]), (5, [5, 5, 2]), (1, [1] * 12), (99, [12])])
def test_groups_come_in_the_order_of_their_prompts(part_prompts: int | None, sizes: list[int]) -> None:
    actors = [Timed(), Timed()]
    groups = fleet_of(*actors).sample(PROMPTS, SAMPLING, part_prompts=part_prompts)
    assert [group.prompt.index for group in groups] == list(range(12))
    assert sorted(len(part) for actor in actors for part in actor.parts) == sorted(sizes)


def test_a_slow_actor_takes_fewer_parts_and_the_parts_are_the_same_for_any_number_of_actors() -> None:
    slow, fast = Timed(0.2), Timed(0.01)
    fleet_of(slow, fast).sample(PROMPTS, SAMPLING, part_prompts=1)
    assert len(slow.parts) <= 2 and len(fast.parts) >= 10
    alone = Timed()
    fleet_of(alone).sample(PROMPTS, SAMPLING, part_prompts=1)
    assert sorted(slow.parts + fast.parts) == sorted(alone.parts)


def test_a_pause_waits_for_running_parts_and_holds_the_others() -> None:
    actor = Timed(0.1)
    fleet = fleet_of(actor)
    request = fleet.start(PROMPTS[:3], SAMPLING, part_prompts=1)
    while not actor.parts:
        time.sleep(0.001)
    with fleet.paused():
        assert (actor.working, len(actor.parts)) == (0, 1)
        time.sleep(0.3)
        assert len(actor.parts) == 1
    assert [group.prompt.index for group in finished(request)] == [0, 1, 2]


def test_a_failed_part_fails_its_request_and_frees_its_actor() -> None:
    class Broken(Timed):
        def remote(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
            if prompts[0].index == 0:
                raise ray.exceptions.RayActorError
            return super().remote(prompts, sampling)

    fleet = fleet_of(Broken())
    with pytest.raises(ray.exceptions.RayActorError):
        fleet.sample(PROMPTS[:1], SAMPLING)
    assert [group.prompt.index for group in fleet.sample(PROMPTS[1:3], SAMPLING)] == [1, 2]
    with fleet.paused():
        pass
    assert {span.num_prompts for span in fleet.worked()} == {2}, "of the part that succeeded"


def test_a_closed_fleet_drops_what_has_not_started() -> None:
    actor = Timed(0.1)
    fleet = fleet_of(actor)
    fleet.start(PROMPTS, SAMPLING, part_prompts=1)
    while not actor.parts:
        time.sleep(0.001)
    fleet.close()
    time.sleep(0.3)
    assert len(actor.parts) == 1


def test_a_replacement_that_is_lost_with_the_fleet_is_not_replaced() -> None:
    """It waits for a node when the run is resized: the fleet that is closed then starts no other actor."""
    fleet = fleet_of(Timed())
    fleet.losses.started = True
    made: list[int] = []

    def make() -> object:
        made.append(1)
        fleet.close()
        raise ray.exceptions.ActorDiedError

    fleet.makers = [make]
    fleet._get = lambda *_: (_ for _ in ()).throw(ray.exceptions.ActorDiedError())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the fleet is closed"):
        fleet.sample(PROMPTS, SAMPLING)
    assert made == [1]


def test_what_ends_with_a_closed_fleet_is_not_replaced() -> None:
    class Killed(Timed):
        def remote(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
            super().remote(prompts, sampling)
            return ray.exceptions.ActorDiedError()  # type: ignore[return-value]

    actor = Killed(0.1)
    fleet = fleet_of(actor)
    fleet.losses.started = True
    fleet.makers = [lambda: pytest.fail("replaced")]
    [part] = fleet.start(PROMPTS, SAMPLING)
    while not actor.parts:
        time.sleep(0.001)
    fleet._get = lambda method, ref, arguments: (_ for _ in ()).throw(ref)  # type: ignore[method-assign]
    fleet.close()
    with pytest.raises(ray.exceptions.ActorDiedError):
        part.result()


def test_the_work_of_each_actor_is_measured() -> None:
    fleet = fleet_of(Timed(0.1), Timed(0.1))
    began = time.perf_counter()
    fleet.sample(PROMPTS, SAMPLING, part_prompts=5)
    took = time.perf_counter() - began
    spans = [span for span in fleet.worked() if span.work == "sample"]
    assert fleet.worked() == []
    assert sorted(span.num_prompts or 0 for span in spans) == [2, 5, 5]
    assert {span.index for span in spans} == {0, 1}
    assert all(0.1 <= span.end - span.start < took for span in spans)
    assert all(began <= span.start < span.end <= began + took for span in spans)
    for index in (0, 1):
        own = sorted((span.start, span.end) for span in spans if span.index == index)
        assert all(end <= start for (_, end), (start, _) in pairwise(own)), "one part at a time"


def test_a_parts_wait_for_its_rewards_is_a_span_of_its_own() -> None:
    class Scoring(Timed):
        def remote(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
            groups = super().remote(prompts, sampling)
            tagged = [replace(r, version=3) for r in groups[0].rollouts]
            return [replace(group, rollouts=tuple(tagged), reward_seconds=0.08) for group in groups]

    fleet = fleet_of(Scoring(0.2))
    fleet.sample(PROMPTS[:2], SAMPLING, work="evaluate")
    sampling, scoring = fleet.worked()
    assert (sampling.work, scoring.work) == ("evaluate", "score")
    assert sampling.end == scoring.start
    assert scoring.end - scoring.start == pytest.approx(0.08)
    assert sampling.end - sampling.start >= 0.12
    assert sampling.version == scoring.version == 3


def test_once_paused_no_running_part_is_missing() -> None:
    actors = [Timed(0.1), Timed(0.02)]
    fleet = fleet_of(*actors)
    request = fleet.start(PROMPTS, SAMPLING, part_prompts=1)
    while not all(actor.parts for actor in actors):
        time.sleep(0.001)
    with fleet.paused():
        begun = sum(len(actor.parts) for actor in actors)
        assert 0 < begun < 12
        assert len([span for span in fleet.worked() if span.work == "sample"]) == begun
    finished(request)
    assert len([span for span in fleet.worked() if span.work == "sample"]) == 12 - begun


class Mortal:
    """An actor that is lost at call `at` (from 0) of one of its methods; `log` is shared by an actor's replacements."""

    def __init__(self, log: list[str], dies: str = "", at: int = 0, holds: str = "") -> None:
        self.log, self.dies, self.at, self.holds = log, dies, at, holds
        self.calls: list[str] = []
        self.version = ""

    def rollout(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        self._call("rollout")
        self.log.append(f"{[prompt.index for prompt in prompts]} with {self.version}")
        return [tiny.group(prompt.index, [1, 1], [0.0, 1.0]) for prompt in prompts]

    def load(self, version: str) -> str:
        self._call("load")
        self.version = self.holds or version
        self.log.append(f"load {version}")
        return self.version

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.dies == name and self.calls.count(name) > self.at:
            raise ray.exceptions.ActorDiedError


def admit(call: Callable[..., str]) -> None:
    """What the channel does with a replacement, in short."""
    for version in ("probe", "v1"):
        if call("load", version) != version:
            raise AdapterMismatch(f"published {version}")


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Fleet, Losses]]:
    """A function that makes a fleet in which each actor is replaced by the next of its lives; all hold version v1."""
    local_actor.install_lazy(monkeypatch)

    def mortal(*lives: list[Mortal], started: bool = True) -> tuple[Fleet, Losses]:
        losses = Losses(lambda text: None)
        losses.started = started
        fleet = Fleet([partial(next, map(Lazy, life)) for life in lives], losses)
        fleet.admit = admit
        for life in lives:
            life[0].version = "v1"
        return fleet, losses

    return mortal


Mortals = Callable[..., tuple[Fleet, Losses]]


def test_a_part_that_is_lost_is_sampled_again_whole_by_a_verified_replacement(mortal: Mortals) -> None:
    log: list[str] = []
    fleet, losses = mortal([Mortal(log, "rollout", 1), Mortal(log)])
    groups = fleet.sample(PROMPTS[:6], SAMPLING, part_prompts=2)
    assert [group.prompt.index for group in groups] == list(range(6))
    assert log == ["[0, 1] with v1", "load probe", "load v1", "[2, 3] with v1", "[4, 5] with v1"]
    assert losses.metrics()["recovery/actor"] == 1


def test_an_actor_lost_in_a_load_loads_the_new_version_after_the_old_one(mortal: Mortals) -> None:
    log: list[str] = []
    other: list[str] = []
    fleet, _ = mortal([Mortal(other)], [Mortal(log, "load", 0), Mortal(log)])
    assert fleet.each("load", "v2") == ["v2", "v2"]
    assert (other, log) == (["load v2"], ["load probe", "load v1", "load v2"])


@pytest.mark.parametrize("at", [0, 1])
def test_a_replacement_may_be_lost_while_it_is_admitted(mortal: Mortals, at: int) -> None:
    log: list[str] = []
    fleet, losses = mortal([Mortal(log, "rollout"), Mortal([], "load", at), Mortal(log)])
    fleet.sample(PROMPTS[:2], SAMPLING)
    assert log == ["load probe", "load v1", "[0, 1] with v1"]
    assert losses.metrics()["recovery/actor"] == 2


@pytest.mark.parametrize("dies", ["rollout", "load"])
def test_two_actors_lost_at_once_are_both_replaced(mortal: Mortals, dies: str) -> None:
    logs: list[list[str]] = [[], []]
    fleet, losses = mortal(*([Mortal(log, dies), Mortal(log)] for log in logs))
    if dies == "load":
        assert fleet.each("load", "v2") == ["v2", "v2"]
        assert logs == [["load probe", "load v1", "load v2"]] * 2
    else:
        groups = fleet.sample(PROMPTS[:4], SAMPLING)
        assert [group.prompt.index for group in groups] == [0, 1, 2, 3]
        assert sorted(log[-1] for log in logs) == ["[0, 1] with v1", "[2, 3] with v1"]
    assert losses.metrics()["recovery/actor"] == 2


def test_a_replacement_with_another_adapter_ends_the_run(mortal: Mortals) -> None:
    log: list[str] = []
    fleet, _ = mortal([Mortal(log, "rollout"), Mortal(log, holds="v0")])
    with pytest.raises(AdapterMismatch, match="published probe"):
        fleet.sample(PROMPTS[:2], SAMPLING)
    assert log == ["load probe"], "it has sampled nothing"


def test_no_actor_is_replaced_before_the_start(mortal: Mortals) -> None:
    log: list[str] = []
    fleet, _ = mortal([Mortal(log, "load"), Mortal(log)], started=False)
    with pytest.raises(ray.exceptions.ActorDiedError):
        fleet.each("load", "v1")
