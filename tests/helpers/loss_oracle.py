"""Every method's loss in float64, as its paper writes it: loops over single rollouts, each scored on whole logits.

It shares no code with the learner: no packing, no padded tensors, no head, and none of the learner's formulas.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.config import MethodConfig
from common.types import Group, Rollout
from learner.learner import Learner

State = dict[str, Tensor]


def state_of(made: Learner) -> State:
    """A float64 copy of all weights of the learner's policy."""
    return {name: tensor.detach().double().clone() for name, tensor in made.policy.peft_model.state_dict().items()}


def gradients(
    folder: Path,
    made: Learner,
    groups: Sequence[Group],
    *,
    old: State | None = None,
    new: State | None = None,
    mini_batch: range | None = None,
) -> dict[str, Tensor]:
    """Gradient of the loss by every adapter weight, at the first step of a run.

    `old` holds the weights at the start of the step, which fix the old log-probabilities, the advantages and the token
    weights; `new` holds the weights to differentiate at. Both default to the learner's current weights. `mini_batch`
    holds the numbers of the rollouts that are learned, by default all, in the order of the groups that are kept.
    """
    method, config = made.config.method, made.config.model
    groups = kept(groups, method)
    model = in_float64(folder, config.lora_rank, config.lora_alpha, tuple(made.policy.targets))
    model.zero_grad()
    model.load_state_dict(old or state_of(made))
    with torch.no_grad():
        olds = [[Tokens(model, rollout, method) for rollout in group.rollouts] for group in groups]
        with model.disable_adapter():
            references = [[Tokens(model, rollout, method) for rollout in group.rollouts] for group in groups]
    model.load_state_dict(new or old or state_of(made))
    news = [[Tokens(model, rollout, method) for rollout in group.rollouts] for group in groups]
    taken = mini_batch or range(sum(len(group.rollouts) for group in groups))
    loss(method, groups, news, olds, references, taken, max_tokens=made.config.actor.max_tokens).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@cache
def in_float64(folder: Path, rank: int, alpha: float, names: tuple[str, ...]):
    """The model with an adapter, whose weights the caller loads."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names))).double()


def kept(groups: Sequence[Group], method) -> list[Group]:
    """Without those that the accuracy filter excludes."""
    mixed = [group for group in groups if len({rollout.score.correct for rollout in group.rollouts}) == 2]
    return mixed if method.group_filter == "accuracy" else list(groups)


class Tokens:
    """Log-probabilities, entropies and hidden states of one rollout, from a forward pass over it alone."""

    def __init__(self, model, rollout: Rollout, method: MethodConfig) -> None:
        ids = torch.tensor(rollout.token_ids, dtype=torch.long)[None]
        start = int(np.argmax(rollout.mask))
        self.hidden = model.base_model.model.model(ids).last_hidden_state[0, start - 1 : -1]
        log_p = model.base_model.model.lm_head(self.hidden).log_softmax(1)
        p = log_p.exp()
        self.logprob = log_p.gather(1, ids[0, start:, None])[:, 0]
        self.entropy = -(p * log_p).sum(1)
        self.weight_entropy = self.entropy  # the one that token weights are made of
        if method.entropy == "topk-partial":
            top = p.sort(descending=True).values[:, : method.entropy_topk]
            self.weight_entropy = -(top * top.log()).sum(1)


def loss(method, groups, news, olds, references, taken, *, max_tokens: int) -> Tensor:
    """- objective + beta * mean KL - bonus * mean entropy, over the rollouts whose number is in `taken`.

    `news` and its like hold a list of `Tokens` per group.
    """
    threshold = entropy_threshold(method, [old for group in olds for old in group])
    terms_B, weights_P, terms_P, kls, entropies = [], [], [], [], []
    number = -1
    for group, new_G, old_G, reference_G in zip(groups, news, olds, references, strict=True):
        advantage_G = advantages(group, method, max_tokens)
        token_GT = [[a] * len(old.entropy) for a, old in zip(advantage_G, old_G, strict=True)]
        if method.token_advantage != "broadcast":
            token_GT = erpo(old_G, reference_G, advantage_G, method)
        first, weight = len(terms_B), 0.0
        for new, old, reference, a, token_T, rollout in zip(
            new_G, old_G, reference_G, advantage_G, token_GT, group.rollouts, strict=True
        ):
            number += 1
            if number not in taken:
                continue
            w = weights(method, new if method.weight_gradient else old, reference, a)
            w = w * (old.weight_entropy > threshold)
            terms_B.append(importance(method, old, rollout) * w * surrogate(method, new, old, token_T))
            weight = weight + w.sum()
            kls.append(kl(method, new, reference))
            entropies.append(new.entropy)
        if len(terms_B) > first:
            weights_P.append(weight)
            terms_P.append(sum(terms.sum() for terms in terms_B[first:]))
    all_terms = torch.cat(terms_B)
    objective = {
        "sequence-mean": lambda: sum(terms.mean() for terms in terms_B) / len(terms_B),
        "token-mean": lambda: all_terms.mean(),
        "constant": lambda: all_terms.sum() / (len(terms_B) * max_tokens),
        "group": lambda: sum(t / w for t, w in zip(terms_P, weights_P, strict=True)) / len(terms_P),
        "step": lambda: all_terms.sum() / sum(weights_P),
    }[method.normaliser]()
    return -objective + method.beta * torch.cat(kls).mean() - method.entropy_bonus * torch.cat(entropies).mean()


def kl(method, new, reference) -> Tensor:
    """[T] estimates of KL(policy || reference)."""
    d = reference.logprob - new.logprob
    return {"none": torch.zeros_like(d), "k1": -d, "k3": d.exp() - d - 1}[method.kl]


def entropy_threshold(method, tokens) -> float:
    """What the `top_entropy_fraction` most uncertain tokens of the step exceed; tokens that tie are all kept.

    The first tokens of a group tie exactly, because the same prompt predicts them. Other entropies at the threshold
    must differ by so much that float32 ranks them alike.
    """
    ranked = torch.cat([each.weight_entropy for each in tokens]).sort(descending=True).values
    lowest = ranked[round(method.top_entropy_fraction * len(ranked)) - 1].item()
    dropped = ranked[ranked < lowest - 1e-9]
    assert len(dropped) == 0 or lowest - dropped[0] > 1e-3, "float32 may rank these entropies otherwise"
    return lowest - 1e-9


def penalty(length: int, method, max_tokens: int) -> float:
    """DAPO's soft overlong punishment, its Eq. 13 with the sign reversed."""
    free = max_tokens - method.overlong_buffer
    if not method.overlong_buffer or length <= free:
        return 0.0
    return method.overlong_penalty * (length - free) / method.overlong_buffer


def importance(method, old, rollout: Rollout) -> Tensor:
    """[T] weights that correct for the difference between learner and actor, or ones."""
    ratio = (old.logprob - torch.tensor(rollout.actor_logprobs[rollout.mask]).double()).exp()
    level, _, kind = method.importance.partition("-")
    if level == "none":
        return torch.ones_like(ratio)
    if level == "sequence":
        ratio = ratio.prod().expand_as(ratio)
    above = method.importance_cap if kind == "truncate" else 0.0
    return torch.tensor([r if r <= method.importance_cap else above for r in ratio.tolist()])


def advantages(group: Group, method, max_tokens: int) -> list[float]:
    """One advantage per rollout of a group."""
    correct = [r.score.correct for r in group.rollouts]
    lengths = [len(r.token_ids) - r.num_prompt_tokens for r in group.rollouts]
    rewards = [
        r.score.total - penalty(length, method, max_tokens) for r, length in zip(group.rollouts, lengths, strict=True)
    ]
    count = len(rewards)
    if method.advantage == "asymmetric":
        p = sum(correct) / count
        if p in (0, 1):
            return [float(method.beta_pos == 0) if c else -float(method.beta_neg == 0) for c in correct]
        return [((1 - p) / p) ** method.beta_pos if c else -((p / (1 - p)) ** method.beta_neg) for c in correct]
    if method.advantage == "leave_one_out":
        return [r - (sum(rewards) - r) / (count - 1) for r in rewards]
    mean = sum(rewards) / count
    return standardise(rewards, method.std_ddof) if method.advantage == "group_std" else [r - mean for r in rewards]


def standardise(values: list[float], ddof: int = 0) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))
    return [(v - mean) / (std + 1e-6) for v in values]


def erpo(old_G, reference_G, advantage_G: list[float], method) -> list[list[float]]:
    """Token advantages of a group (arXiv 2603.28204)."""
    gates = iter(standardise([h for old in old_G for h in old.entropy.tolist()]))
    gate_GT = [[1 / (1 + math.exp(-method.erpo_gate * next(gates))) for _ in old.entropy] for old in old_G]
    raw_GT = [
        ((old.logprob - reference.logprob) * method.erpo_progress).tolist()
        for old, reference in zip(old_G, reference_G, strict=True)
    ]
    buckets: dict[int, list[tuple[int, int]]] = {}
    for i, raw in enumerate(raw_GT):
        for t in range(len(raw)):
            bucket = min(int(t / len(raw) * method.erpo_buckets + 1e-9), method.erpo_buckets - 1)
            buckets.setdefault(bucket, []).append((i, t))
    progress_GT = [[0.0] * len(raw) for raw in raw_GT]
    for bucket in buckets.values():
        for (i, t), value in zip(bucket, standardise([raw_GT[i][t] for i, t in bucket]), strict=True):
            progress_GT[i][t] = value
    result = []
    for a, gate, progress in zip(advantage_G, gate_GT, progress_GT, strict=True):
        sign = (a > 0) - (a < 0)
        if method.token_advantage == "erpo-additive":
            result.append([a + method.erpo_weight * w * sign * s for w, s in zip(gate, progress, strict=True)])
        elif method.token_advantage == "erpo-multiplicative":
            result.append([a * w for w in gate])
        else:
            scale = len(gate) / sum(gate)
            result.append([scale * w * a + method.erpo_weight * sign * s for w, s in zip(gate, progress, strict=True)])
    return result


def surrogate(method, new, old, token_advantage: list[float]) -> Tensor:
    """[T] objective of a rollout, before its weights."""
    difference = new.logprob - old.logprob
    a = torch.tensor(token_advantage, dtype=torch.float64)
    low, high = 1 - method.clip_low, 1 + method.clip_high
    r = difference.exp()
    if method.ratio == "stop-gradient":
        return r.clamp(low, high).detach() * a * new.logprob
    if method.ratio == "power-mean":
        if method.power_clip == "both":
            r = r.clamp(1 / (1 + method.clip_low), high)
        if method.power_clip == "token":
            r = torch.where(a > 0, r.clamp(max=high), torch.where(a < 0, r.clamp(min=low), r))
        p = method.power_start  # at the first step of a run
        r = r.pow(p).mean().pow(1 / p) if p else r.log().mean().exp()
    elif method.ratio == "sequence":
        r = r.prod() ** (1 / len(difference))
    return torch.minimum(r * a, r.clamp(low, high) * a)


def weights(method, tokens, reference, advantage: float) -> Tensor:
    """[T] token weights of a rollout, before normalising."""
    if method.token_weight == "horizon" and not (method.selective and advantage >= 0):
        return torch.exp(-method.alpha * torch.cumsum(tokens.weight_entropy / math.log(tiny.V), 0))
    if method.token_weight == "residual":
        raised = (tokens.hidden - reference.hidden).norm(dim=1) ** method.residual_power
        return len(raised) * raised / raised.sum()
    return torch.ones_like(tokens.entropy)
