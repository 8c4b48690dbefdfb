"""publish=auto: the two ways take turns, and the cheaper one stays."""

import pytest

from actor.publishing import Trial

STEP_TOKENS = 1000


def run(merged, hotswap, *, versions=12, between=()):
    """The ways that a trial takes, for (load seconds, seconds a token) of each; `between` are calls after a step's."""
    costs = {"merged": merged, "hotswap": hotswap}
    trial, taken = Trial(), []
    for version in range(versions):
        way = trial.next_way()
        load, token = costs[way]
        slow = 50 if version < 2 else 0  # the first of each way warms up
        trial.loaded(way, load + slow)
        trial.sampled(way, token * STEP_TOKENS + slow, STEP_TOKENS)
        for seconds, tokens in between:
            trial.sampled(way, seconds, tokens)
        taken.append(way)
    return trial, taken


TURNS = ["merged", "hotswap"] * 3


@pytest.mark.parametrize(
    ("merged", "hotswap", "cheaper"),
    [
        ((1.0, 0.002), (0.05, 0.006), "merged"),  # 3.0 against 6.05 s: this CPU
        ((1.0, 0.0020), (0.05, 0.0029), "hotswap"),  # 3.0 against 2.95 s
        ((1.0, 0.0020), (0.05, 0.0030), "merged"),  # 3.0 against 3.05 s
    ],
)
def test_the_cheaper_way_stays(merged, hotswap, cheaper):
    trial, taken = run(merged, hotswap)
    assert taken == TURNS + [cheaper] * 6
    assert trial.step_seconds("merged") == pytest.approx(merged[0] + merged[1] * STEP_TOKENS)
    assert trial.step_seconds("hotswap") == pytest.approx(hotswap[0] + hotswap[1] * STEP_TOKENS)


def test_other_calls_between_two_loads_do_not_count():
    _, taken = run((1.0, 0.0020), (0.05, 0.0029), between=[(0.001, 10**6), (9.0, 1)])
    assert taken == TURNS + ["hotswap"] * 6


def test_a_version_that_no_step_used_does_not_count():
    """An actor without prompts loads and samples nothing; the next version's later calls are not its."""
    trial = Trial()
    trial.loaded("merged", 1.0)
    trial.loaded("merged", 1.0)
    trial.sampled("merged", 2.0, 100)
    trial.sampled("merged", 9.0, 1)
    assert trial.calls["merged"] == [(2.0, 100)]


def test_one_way_is_no_trial():
    trial = Trial(["hotswap"])
    assert [trial.next_way() for _ in range(2)] == ["hotswap"] * 2
    for _ in range(9):
        trial.loaded("hotswap", 1.0)
        trial.sampled("hotswap", 2.0, 100)
        assert trial.next_way() == "hotswap"


def test_steps_of_few_tokens_make_loading_count():
    """Lengths differ from step to step: what counts is seconds a token, at the mean of the counted steps."""
    trial = Trial()
    for version, num_tokens in enumerate([100, 100, 50, 150, 100, 100]):
        way = trial.next_way()
        trial.loaded(way, 1.0 if way == "merged" else 0.05)
        trial.sampled(way, num_tokens * (0.002 if way == "merged" else 0.006), num_tokens)
        assert way == TURNS[version]
    assert trial.step_seconds("merged") == pytest.approx(1.2)
    assert trial.step_seconds("hotswap") == pytest.approx(0.65)
    assert trial.next_way() == "hotswap"
