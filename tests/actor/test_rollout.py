"""Groups that end in any order: each completion gets its own reward, which starts as soon as its group ends."""

import numpy as np

from actor.engine import Sample
from actor.rollout import Sampling, roll_out
from common.types import Prompt, Score

PROMPTS = [Prompt(messages=({"role": "user", "content": str(n)},), answer=str(n), index=n) for n in range(3)]
SAMPLING = Sampling(group_size=2, temperature=1.0, max_tokens=4, stop=(), seed=0)
ENDING = [2, 0, 1]


class Tokenizer:
    def apply_chat_template(self, messages, **_):
        return [int(messages[0]["content"])]


class Engine:
    """Ends its groups in the order ENDING. A completion's text is the index of its prompt and its own index."""

    def __init__(self, events):
        self.events = events

    def sample(self, prompts, *, num_samples, finished, **_):
        groups = [
            [
                Sample(
                    token_ids=np.array([7], np.int32),
                    logprobs=np.zeros(1, np.float32),
                    text=f"{prompt[0]} {index}",
                    finish_reason="stop",
                )
                for index in range(num_samples)
            ]
            for prompt in prompts
        ]
        for index in ENDING:
            self.events.append(f"group {index}")
            finished(index, groups[index])
        return groups


class Rewards:
    """The reward of a completion: ten times the index of its prompt plus its own index."""

    def __init__(self, events):
        self.events = events

    def start(self, completions):
        self.events.append(f"rewards {completions[0][1].answer}")
        return [text.split() for text, _ in completions]

    def finish(self, scoring):
        return [Score(total=10.0 * int(prompt) + int(index), correct=False, parts={}) for prompt, index in scoring]


def test_each_completion_keeps_its_reward():
    events = []
    groups = roll_out(Engine(events), Tokenizer(), Rewards(events), PROMPTS, SAMPLING, version=3)
    assert events == ["group 2", "rewards 2", "group 0", "rewards 0", "group 1", "rewards 1"]
    assert [group.prompt for group in groups] == PROMPTS
    assert [[r.score.total for r in group.rollouts] for group in groups] == [[0, 1], [10, 11], [20, 21]]
    assert [[r.text for r in group.rollouts] for group in groups] == [["0 0", "0 1"], ["1 0", "1 1"], ["2 0", "2 1"]]
