"""Options that exclude one another: a line for each pair, with both values and what to change; and refused ones."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.types import suggest

if TYPE_CHECKING:  # config.py imports this file
    from common.config import Config

_SET = re.compile(r"(?!task:)[A-Za-z0-9][\w.-]*:.+")  # "task" is what the records call the task's own problems
MAX_ROLLOUTS = 65536  # of a step: the plan packs them all, in 3 s

REFUSED = {
    "actor.publish": "was removed: every adapter is resident in vLLM's layers and written in place at each step; leave "
    "it out",
    "model.use_rslora": "is PEFT's name; set model.lora_variant=rslora",
    "model.use_dora": "is PEFT's name; see model.lora_variant",
    "model.init_lora_weights": "is PEFT's name; see model.lora_variant",
}  # removed options, and other libraries' names of ours, with what to do
# Variants of LoRA whose update of a frozen weight W is not s B A, which is all that the resident adapters of
# actor/vllm_worker.py compute; vLLM's own LoRA refuses them too (vllm/lora/peft_helper.py).
CHANGES_THE_BASE = (
    "takes a part of W into B A and leaves the rest of W as the base, so the frozen weights, which are also "
    "the reference policy, would be neither the model's nor the actor's"
)
OTHER_VARIANTS = {
    "dora": "scales each output of W + s B A by a learned magnitude over that output's norm; the actor's resident "
    "adapters add s B A alone",
    "pissa": CHANGES_THE_BASE,
    "olora": CHANGES_THE_BASE,
}


def contradictions(config: "Config") -> Iterator[str]:
    """Why this configuration cannot be run."""
    run, actor, learner, method = config.run, config.actor, config.learner, config.method
    if actor.max_tokens >= config.model.max_length:
        yield (
            f"actor.max_tokens={actor.max_tokens} leaves no room for a prompt in "
            f"model.max_length={config.model.max_length}; lower the one or raise the other"
        )
    if run.prompts_per_step * actor.group_size > MAX_ROLLOUTS:
        yield (
            f"run.prompts_per_step={run.prompts_per_step} of actor.group_size={actor.group_size} are more than "
            f"{MAX_ROLLOUTS} rollouts, the most of a step; lower one of the two"
        )
    if learner.mini_batches > run.prompts_per_step * actor.group_size:
        yield (
            f"learner.mini_batches={learner.mini_batches} is more than the {run.prompts_per_step * actor.group_size} "
            "rollouts of a step; lower it"
        )
    if actor.tensor_parallel > 1 and config.cluster.layout == "colocated":
        yield f"actor.tensor_parallel={actor.tensor_parallel} needs devices of its own; set cluster.layout=separate"
    if learner.shard and learner.num_ranks == 1:
        yield "learner.shard=true needs several ranks; set learner.num_ranks, or leave it out"
    if learner.shard and learner.head_backend in ("trl", "liger"):
        yield (
            f"learner.head_backend={learner.head_backend} needs the whole base in the backward pass, which "
            "learner.shard=true gives up; use auto"
        )
    if learner.shard and learner.recompute == "micro-batch":
        yield (
            "learner.recompute=micro-batch keeps all layers gathered in the backward pass, which learner.shard=true is "
            "to avoid; use layer"
        )
    if method.overlong_buffer > actor.max_tokens:
        yield f"method.overlong_buffer={method.overlong_buffer} exceeds actor.max_tokens={actor.max_tokens}; lower it"
    if method.entropy != "exact" and learner.head_backend in ("trl", "liger"):
        yield (
            f"method.entropy={method.entropy} is not supported by learner.head_backend={learner.head_backend}; use auto"
        )
    num_problems = config.evaluation.num_problems  # of sets, too, which have sizes of their own
    if num_problems and num_problems > config.task.num_eval and not config.evaluation.sets:
        yield (
            f"evaluation.num_problems={num_problems} exceeds task.num_eval={config.task.num_eval}; "
            "lower the one or raise the other"
        )
    shares = config.task.curriculum
    if shares and not (min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6):
        yield f"task.curriculum={list(shares)} must be four shares from 0 to 1 that sum to 1; correct them"
    if method.refill_rounds and run.max_staleness:
        yield (
            f"method.refill_rounds={method.refill_rounds} cannot be combined with the prefetched rollouts of "
            f"run.max_staleness={run.max_staleness}; set one of the two to 0"
        )
    yield from _of_the_weights_gradient(config)
    if method.decoupled_rewards:
        yield from _of_decoupled_rewards(config)
    yield from _of_openers(config)
    yield from _of_evaluations(config)


def _of_the_weights_gradient(config: "Config") -> Iterator[str]:
    method, learner = config.method, config.learner
    if method.weight_gradient and method.token_weight != "horizon":
        yield (
            f"method.weight_gradient=true has no effect with token_weight={method.token_weight}; "
            "set token_weight=horizon"
        )
    if method.weight_gradient and (method.entropy, method.entropy_temperature) != ("exact", "sampling"):
        yield (
            f"method.weight_gradient=true needs the gradient of method.entropy={method.entropy} at "
            f"entropy_temperature={method.entropy_temperature}, which the head does not make"
        )
    for name in ("inner_updates", "mini_batches"):
        if method.weight_gradient and (number := getattr(learner, name)) > 1:
            yield f"method.weight_gradient=true needs learner.{name}=1, not {number}; change one of the two"


def _of_decoupled_rewards(config: "Config") -> Iterator[str]:
    method = config.method
    if not any(config.task.rewards.values()):
        yield (
            "method.decoupled_rewards=true needs the rewards that it is to normalise; set task.rewards, "
            """such as '{"correct": 1.0, "format": 0.5}'"""
        )
    if method.overlong_buffer:
        yield (
            f"method.overlong_buffer={method.overlong_buffer} lowers the sum of the rewards, which "
            "method.decoupled_rewards=true does not form; put a function of the length into task.rewards"
        )
    if method.reward_threshold:
        yield (
            f"method.reward_threshold={method.reward_threshold} is one of the sum of the rewards, which "
            "method.decoupled_rewards=true does not form; use group_filter=zero-variance"
        )
    if method.advantage == "asymmetric":
        yield (
            "method.decoupled_rewards=true has no effect with method.advantage=asymmetric, which sees correct answers "
            "alone; use group_std"
        )


def _of_openers(config: "Config") -> Iterator[str]:
    method, actor = config.method, config.actor
    if method.opening != "reft":
        if method.opening_after:
            yield (
                f"method.opening_after={method.opening_after!r} has no effect with method.opening={method.opening}; "
                "set opening=reft, or leave it out"
            )
        return
    if actor.group_size % method.opening_distinct:
        yield (
            f"actor.group_size={actor.group_size} is not a multiple of "
            f"method.opening_distinct={method.opening_distinct}; each opener begins an equal share of a group"
        )
    if method.opening_candidates < method.opening_distinct:
        yield (
            f"method.opening_candidates={method.opening_candidates} is less than "
            f"method.opening_distinct={method.opening_distinct}; raise the one or lower the other"
        )
    if actor.max_tokens == 1:
        yield "actor.max_tokens=1 leaves nothing to sample after the opener of opening=reft; raise it"
    for word in () if actor.fixed_length else actor.stop:
        if word in method.opening_after:
            yield (
                f"actor.stop has {word!r}, which is in method.opening_after={method.opening_after!r} and would end "
                "completions before their openers; change one of the two"
            )


def _of_evaluations(config: "Config") -> Iterator[str]:
    run, evaluation = config.run, config.evaluation
    names = [each.partition(":")[0] for each in evaluation.sets]
    for each, name in zip(evaluation.sets, names, strict=True):
        if not _SET.fullmatch(each):
            yield f"evaluation.sets: {each} is not NAME:DATA; name a set and its data, such as math500:FOLDER"
        if names.count(name) > 1:
            yield f"evaluation.sets has {name} {names.count(name)} times; give each set a name of its own"
    if beyond := [k for k in evaluation.pass_at if k > evaluation.num_samples]:
        yield (
            f"evaluation.pass_at={beyond[0]} exceeds evaluation.num_samples={evaluation.num_samples}; lower the one or "
            "raise the other"
        )
    if evaluation.best is None:
        if run.patience is not None:
            yield f"run.patience={run.patience} needs the number that is to improve; set evaluation.best=pass_at_1"
        return
    if not run.evaluate_every:
        yield f"evaluation.best={evaluation.best} needs evaluations; set run.evaluate_every"
    name, slash, number = evaluation.best.rpartition("/")
    numbers = ["pass_at_1", "reward_mean"]
    if evaluation.num_samples:
        numbers += [f"mean_at_{evaluation.num_samples}", *(f"pass_at_{k}" for k in evaluation.ks)]
    if number not in numbers or (slash and name not in names):
        known = [*numbers, *(f"{each}/{number}" for each in names for number in numbers)]
        yield f"evaluation.best={evaluation.best} is no number of an evaluation{suggest(evaluation.best, known)}"
