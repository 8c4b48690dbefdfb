"""The buffer's interleavings, with fake actors that only count (a fake serves interleavings alone)."""

from dataclasses import replace

import local_actor
import pytest
import tiny

from actor.rollout import Sampling, prompt_seed
from common.types import Prompt
from launch.planning.prompts import PromptStream
from launch.runtime.buffer import Buffer
from launch.runtime.fleet import finished

SAMPLING = Sampling(group_size=2, temperature=1.0, max_tokens=4, stop=(), seed=0)
PROMPTS = [Prompt(messages=({"role": "user", "content": str(i)},), answer=str(i)) for i in range(5)]


class FakeActor:
    """Answers a rollout request with groups tagged with the version it holds when the request is made."""

    def __init__(self):
        self.version = 0
        self.requests = []
        self.rollout = self

    def remote(self, prompts, sampling):
        self.requests.append([prompt.index for prompt in prompts])
        group = tiny.group(0, [1, 1], [0.0, 1.0])
        tagged = tuple(replace(r, version=self.version) for r in group.rollouts)
        return [replace(group, prompt=prompt, rollouts=tagged) for prompt in prompts]


@pytest.fixture(autouse=True)
def _references_are_values(monkeypatch):
    local_actor.install(monkeypatch)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_bounds_and_order(num_actors, max_staleness):
    actors = [FakeActor() for _ in range(num_actors)]
    stream = PromptStream(PROMPTS, seed=1)
    buffer = Buffer(
        local_actor.fleet(*actors), stream, SAMPLING, prompts_per_step=4, num_steps=6, max_staleness=max_staleness
    )
    buffer.start()
    seen, stalest = [], 0
    for step in range(6):
        started = sum(len(r) for actor in actors for r in actor.requests)
        assert started - len(seen) <= (max_staleness + 1) * 4
        groups = buffer.take(4)
        stalest = max([stalest, *(step - group.rollouts[0].version for group in groups)])
        seen += [group.prompt.index for group in groups]
        for request in buffer.requests:
            finished(request)  # the stalest case: all are sampled at once, with the version of their release
        for actor in actors:
            actor.version = step + 1  # published to every actor ...
        buffer.release(4)  # ... before new rollouts may start
    assert seen == list(range(24))
    assert stalest == max_staleness
    assert sum(len(r) for actor in actors for r in actor.requests) == 24  # none sampled in vain at the end
    assert buffer.prompt_cursor == 24


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_resumed_buffer_goes_on_after_prompts_that_are_left_out(max_staleness):
    """The cursor counts positions of the stream, also those passed over, and not what was only prefetched."""
    left_out = frozenset({1, 2})
    expected = [p.index for p in PromptStream(PROMPTS, seed=1, left_out=left_out).draw(20)]
    seen, cursor = [], 0
    for _ in range(2):  # begun, and resumed after two steps
        stream = PromptStream(PROMPTS, seed=1, cursor=cursor, left_out=left_out)
        fleet = local_actor.fleet(FakeActor())
        buffer = Buffer(fleet, stream, SAMPLING, prompts_per_step=4, num_steps=5, max_staleness=max_staleness)
        buffer.start()
        for _ in range(2):
            seen += [group.prompt.index for group in buffer.take(4)]
            buffer.release(4)
        cursor = buffer.prompt_cursor
    assert seen == expected[:16]


def test_stream_depends_on_seed_and_position_alone():
    whole = PromptStream(PROMPTS, seed=3).draw(12)
    resumed = PromptStream(PROMPTS, seed=3, cursor=7).draw(5)
    assert resumed == whole[7:]
    assert sorted(p.answer for p in whole[:5]) == sorted(p.answer for p in whole[5:10]) == list("01234")  # passes
    assert [p.answer for p in whole[:5]] != [p.answer for p in whole[5:10]]
    assert [p.answer for p in PromptStream(PROMPTS, seed=4).draw(10)] != [p.answer for p in whole[:10]]


def test_seeds_differ_by_prompt_and_by_run():
    seeds = {prompt_seed(seed, index) for seed in range(20) for index in range(200)}
    assert len(seeds) == 4000
    assert max(seeds) < 2**31


@pytest.mark.parametrize(
    ("refill_rounds", "kept"), [(0, [0, 1, 2, 3]), (1, [1, 3, 4, 5]), (2, [1, 3, 5, 6]), (9, [1, 3, 5, 7])]
)
def test_refill(refill_rounds, kept):
    """Prompts at even positions teach nothing: new ones replace them, in order, while there are rounds."""
    actors = [FakeActor(), FakeActor()]
    stream = PromptStream(PROMPTS, seed=1)
    buffer = Buffer(
        local_actor.fleet(*actors),
        stream,
        SAMPLING,
        prompts_per_step=4,
        num_steps=2,
        drop_reason=lambda group: None if group.prompt.index % 2 else "even",
        refill_rounds=refill_rounds,
    )
    buffer.start()
    groups = buffer.take(4)
    assert [group.prompt.index for group in groups] == kept
    discarded = [group.prompt.index for group in buffer.discarded]
    assert sorted(kept + discarded) == list(range(stream.cursor))
    assert buffer.prompt_cursor == stream.cursor, "a resumed run starts with the next prompt"
    for actor in actors:
        actor.version = 1
    buffer.release(4)
    groups = buffer.take(4)
    assert {rollout.version for group in groups for rollout in group.rollouts} == {1}
    assert groups[0].prompt.index == len(kept + discarded) + (refill_rounds > 0 and len(kept + discarded) % 2 == 0)
    assert buffer.prompt_cursor == stream.cursor
