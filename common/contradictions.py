"""Options that exclude one another: a line for each pair, with both values and what to change."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # config.py imports this file
    from common.config import Config

MAX_ROLLOUTS = 65536  # of a step: the plan packs them all, in 3 s


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
    if config.evaluation.num_problems and config.evaluation.num_problems > config.task.num_eval:
        yield (
            f"evaluation.num_problems={config.evaluation.num_problems} exceeds task.num_eval={config.task.num_eval}; "
            "lower the one or raise the other"
        )
    if method.refill_rounds and run.max_staleness:
        yield (
            f"method.refill_rounds={method.refill_rounds} cannot be combined with the prefetched rollouts of "
            f"run.max_staleness={run.max_staleness}; set one of the two to 0"
        )
    yield from _of_the_weights_gradient(config)
    if method.decoupled_rewards:
        yield from _of_decoupled_rewards(config)
    if method.opening == "reft":
        yield from _of_openers(config)


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
    if method.weight_gradient and learner.inner_updates > 1:
        yield (
            f"method.weight_gradient=true needs learner.inner_updates=1, not {learner.inner_updates}; "
            "change one of the two"
        )


def _of_decoupled_rewards(config: "Config") -> Iterator[str]:
    method = config.method
    if not config.task.rewards:
        yield (
            "method.decoupled_rewards=true needs the rewards that it is to normalise; set task.rewards, "
            """such as '{"correct": 1.0, "format": 0.5}'"""
        )
    if method.overlong_buffer:
        yield (
            f"method.overlong_buffer={method.overlong_buffer} lowers the sum of the rewards, which "
            "method.decoupled_rewards=true does not form; put a function of the length into task.rewards"
        )
    if method.advantage == "asymmetric":
        yield (
            "method.decoupled_rewards=true has no effect with method.advantage=asymmetric, which sees correct answers "
            "alone; use group_std"
        )


def _of_openers(config: "Config") -> Iterator[str]:
    method, actor = config.method, config.actor
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
