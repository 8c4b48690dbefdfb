"""The prompts of a run: their order, which depends on a seed alone, and their lengths, checked before a run starts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from actor.opening import forced_tokens
from actor.tasks import task_module
from actor.tasks.sets import load_sets
from actor.tasks.table import Problems
from common.config import Config
from common.types import Group, Prompt, UserError
from launch.planning.prompt_lengths import Lengths

OWN = "task"  # the task's own evaluation prompts, beside the names of evaluation.sets
BATCH_PROMPTS = 1000  # whose lengths are counted at a time
ALWAYS_CHECKED = 10_000  # training prompts: of a smaller data set all, so that its runs have one plan for all seeds


class PromptStream:
    """The task's prompts, shuffled again for each pass: the prompt at a position depends on seed and position alone."""

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, cursor: int = 0, left_out: frozenset[int] = frozenset()
    ) -> None:
        """`left_out` are the indices, in `prompts`, of those that are passed over; not all of them."""
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor  # positions of the stream passed so far; a checkpoint needs no other state
        self.left_out = left_out
        self._pass, self._order = -1, np.arange(0)  # the newest pass, and its order

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts, numbered by their position in the stream."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            number, position = divmod(self.cursor, len(self.prompts))
            if number != self._pass:
                self._pass, self._order = number, order_of_pass(len(self.prompts), self.seed, number)
            if (index := int(self._order[position])) not in self.left_out:
                drawn.append(replace(self.prompts[index], index=self.cursor))
            self.cursor += 1
        return drawn

    def learn(self, groups: Sequence[Group]) -> None:
        """Told the results of drawn prompts, which change nothing here (curriculum.py)."""

    def files(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps beside the cursor, as bytes by file name: nothing."""
        return {}


def order_of_pass(num_prompts: int, seed: int, number: int) -> np.ndarray:
    """int64 [num_prompts]: the order in which pass `number` goes through the prompts."""
    return np.random.default_rng([seed, number]).permutation(num_prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The prompts of a run. Those of a table are built when they are read."""

    train: Sequence[Prompt]
    left_out: frozenset[int]  # indices in `train` of those longer than task.max_prompt_tokens
    num_checked: int  # of `train`, whose lengths are known: all, or those that the run may draw
    evaluation: Mapping[str, Sequence[Prompt]]  # by the name of their set, without those that are too long
    num_evaluation_left_out: int
    longest_tokens: int  # of those that are not left out

    def describe(self) -> str:
        """How many there are, and how long."""
        part = "" if self.num_checked == len(self.train) else f" (of the {self.num_checked} that the run may draw)"
        num_evaluation = sum(map(len, self.evaluation.values()))
        return (
            f"{len(self.train)} training and {num_evaluation} evaluation prompts, longest {self.longest_tokens} tokens"
            f"{part}"
        )

    def remarks(self) -> list[str]:
        """What was left out, in a line."""
        if not self.left_out and not self.num_evaluation_left_out:
            return []
        num_evaluation = sum(map(len, self.evaluation.values())) + self.num_evaluation_left_out
        return [
            f"task.max_prompt_tokens leaves out {len(self.left_out)} of {self.num_checked} training prompts and "
            f"{self.num_evaluation_left_out} of {num_evaluation} evaluation prompts"
        ]


def load(config: Config, *, sets_alone: bool = False) -> tuple[Sequence[Prompt], dict[str, Sequence[Prompt]]]:
    """The task's training prompts; and its evaluation prompts (OWN) and those of evaluation.sets, by the set's name.

    With `sets_alone` none of the task's, whose data need not be there. Raises UserError for a task without either.
    """
    if sets_alone:
        return (), {**load_sets(config)}
    task = task_module(config.task.name)
    loaded = [task.load(config.task, split) for split in ("train", "eval")]
    # A task of the user's own may load any iterable.
    train, evaluation = (each if isinstance(each, Sequence) else tuple(each) for each in loaded)
    if not train or not evaluation:
        raise UserError(f"task.name={config.task.name} loads no prompts to train or to evaluate on; its load() must")
    return train, {OWN: evaluation[: config.evaluation.num_problems], **load_sets(config)}


def check(
    train: Sequence[Prompt],
    evaluation: Mapping[str, Sequence[Prompt]],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompts:
    """Check the lengths of all evaluation prompts, and of the training prompts that the run may draw.

    Raises UserError for a broken row among them, if all are too long, and if a completion may not fit behind one.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"model.path={config.model.path} has no chat template; use an instruction-tuned model")
    drawn = config.run.steps * config.run.prompts_per_step * (1 + config.method.refill_rounds)
    order, wanted = order_of_pass(len(train), config.run.seed, 0), max(drawn, ALWAYS_CHECKED)
    if config.task.curriculum:
        wanted = len(train)  # it may draw any
    checked = _check(train, order, wanted, "training prompts", config, tokenizer)
    evaluated = {
        name: _check(prompts, np.arange(len(prompts)), len(prompts), f"evaluation prompts ({name})", config, tokenizer)
        for name, prompts in evaluation.items()
    }
    longest = max(each.longest_tokens for each in (checked, *evaluated.values()))
    if longest + config.actor.max_tokens > config.model.max_length:
        raise UserError(
            f"model.max_length={config.model.max_length} is less than the longest prompt's {longest} tokens plus "
            f"actor.max_tokens={config.actor.max_tokens}; raise the one or lower the other, or leave out long prompts "
            "with task.max_prompt_tokens"
        )
    return Prompts(
        train=train,
        left_out=checked.too_long,
        num_checked=checked.num,
        evaluation={name: _without(prompts, evaluated[name].too_long) for name, prompts in evaluation.items()},
        num_evaluation_left_out=sum(len(each.too_long) for each in evaluated.values()),
        longest_tokens=longest,
    )


def check_opening(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the text that openers follow leaves no token of a completion to sample, or if the completion's
    text would not begin with it: special tokens are no part of that text."""
    forced = forced_tokens(tokenizer, config.method.opening_after)
    num_forced = len(forced)
    if (text := tokenizer.decode(forced, skip_special_tokens=True)) != config.method.opening_after:
        raise UserError(
            f"method.opening_after={config.method.opening_after!r} reaches the reward as {text!r} with this model's "
            "tokenizer; use a text without special tokens"
        )
    if num_forced and num_forced + 1 >= config.actor.max_tokens:
        raise UserError(
            f"method.opening_after={config.method.opening_after!r} has {num_forced} tokens, which with an opener leave "
            f"nothing of actor.max_tokens={config.actor.max_tokens} to sample; shorten the one or raise the other"
        )


@dataclass(frozen=True, slots=True)
class _Checked:
    num: int  # prompts whose lengths are known
    too_long: frozenset[int]
    longest_tokens: int  # of those that are not too long


def _check(
    prompts: Sequence[Prompt],
    order: np.ndarray,
    wanted: int,
    kind: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> _Checked:
    """Look at prompts in this order until `wanted` of them are short enough, or all are known."""
    limit = config.task.max_prompt_tokens or np.iinfo(np.int32).max
    lengths = Lengths(prompts, config.task, tokenizer)
    too_long: list[int] = []
    num, longest = 0, 0
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"lengths of {kind}", total=min(wanted, len(order)))
        for first in range(0, len(order), BATCH_PROMPTS):
            batch = order[first : first + BATCH_PROMPTS]
            tokens = lengths.of(batch)
            too_long += batch[tokens > limit].tolist()
            num, longest = num + len(batch), max(longest, int(tokens.max(where=tokens <= limit, initial=0)))
            progress.update(bar, completed=num - len(too_long))
            if num - len(too_long) >= wanted:
                break
    lengths.keep()
    if num and len(too_long) == num:
        raise UserError(f"task.max_prompt_tokens={limit} leaves out all {num} {kind}; raise it")
    return _Checked(num, frozenset(too_long), longest)


def _without(prompts: Sequence[Prompt], indices: frozenset[int]) -> Sequence[Prompt]:
    if not indices:
        return prompts
    left = np.delete(np.arange(len(prompts)), list(indices))
    return prompts.at(left) if isinstance(prompts, Problems) else tuple(prompts[index] for index in left)
