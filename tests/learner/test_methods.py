"""Every row of the table: the gradient of its whole loss against float64 loops over whole logits, at both updates.

The loops know nothing of streams, packing or normalisers: they are each paper's formula for one rollout after another.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from common.methods import METHODS
from learner.learner import Learner

MAX_TOKENS = 9  # the longest of tiny.groups()
BETA = 0.3  # of the KL, large enough to be seen
VARIANTS = {
    **{name: {"name": name} for name in METHODS},
    "sa-ah-grpo, other alpha": {"name": "sa-ah-grpo", "alpha": 3.0},
    "erpo, gated outcome": {"name": "erpo", "token_advantage": "erpo-gated-outcome"},
    "erpo, multiplicative": {"name": "erpo", "token_advantage": "erpo-multiplicative", "erpo_buckets": 3},
    "arca, power 1": {"name": "arca", "residual_power": 1.0},
    "holder, token clip": {"name": "holder", "power_clip": "token", "clip_low": 0.02, "clip_high": 0.02},
    "gspo, wide clip": {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2},
    "asymmetric advantages with horizon weights": {"name": "sa-ah-grpo", "advantage": "asymmetric", "beta_pos": 0.9},
    "dapo, overlong": {"name": "dapo", "overlong_buffer": 6, "overlong_penalty": 2.0, "advantage": "group_std"},
    "token importance": {"name": "sa-ah-grpo", "importance": "token-truncate", "importance_cap": 1.2},
    "token importance, masked": {"name": "grpo", "importance": "token-mask", "importance_cap": 1.2},
    "sequence importance": {"name": "grpo", "importance": "sequence-truncate", "importance_cap": 1e-3},
    "sequence importance, masked": {"name": "grpo", "importance": "sequence-mask", "importance_cap": 1e-3},
    "gradient through importance and weights": {
        "name": "sa-ah-grpo",
        "alpha": 3.0,
        "importance": "token-truncate",
        "weight_gradient": True,
    },
    "power mean with residual weights": {"name": "holder", "token_weight": "residual"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


def both_updates(folder, method):
    """A learner after two updates on one batch, and the adapter's state and gradient at each."""
    config = tiny.config(
        method=method, inner_updates=1 if "weight_gradient" in method else 2, learning_rate=2e-2, steps=3
    )
    config = config.model_copy(update={"actor": config.actor.model_copy(update={"max_tokens": MAX_TOKENS})})
    made = Learner(folder, config, np.arange(12))
    tiny.move_adapter(made)
    made.optimizer.config = made.optimizer.config.model_copy(update={"gradient_clip": 1e9})
    seen, take = [], made.optimizer.adamw.step

    def step():
        trained = {n: p for n, p in made.policy.peft_model.named_parameters() if p.requires_grad}
        state = {n: p.detach().double().clone() for n, p in made.policy.peft_model.state_dict().items()}
        seen.append((state, {n: p.grad.clone() for n, p in trained.items()}))
        take()

    made.optimizer.adamw.step = step
    assert made.update(tiny.groups()).skipped is None
    return made, seen


class Tokens:
    """One rollout's log-probabilities, entropies and hidden states in float64, from a whole sequence of its own."""

    def __init__(self, model, rollout):
        ids = torch.tensor(rollout.token_ids, dtype=torch.long)[None]
        start = int(np.argmax(rollout.mask))
        self.hidden = model.base_model.model.model(ids).last_hidden_state[0, start - 1 : -1]
        log_p = model.base_model.model.lm_head(self.hidden).log_softmax(1)
        self.logprob = log_p.gather(1, ids[0, start:, None])[:, 0]
        self.entropy = -(log_p.exp() * log_p).sum(1)


def penalty(length, method) -> float:
    """DAPO's soft overlong punishment: its Eq. 13, the sign turned."""
    if not method.overlong_buffer or length <= MAX_TOKENS - method.overlong_buffer:
        return 0.0
    return method.overlong_penalty * (length - (MAX_TOKENS - method.overlong_buffer)) / method.overlong_buffer


def importance(method, old, rollout):
    """[T] weights for the difference between learner and actor, or one."""
    ratio = (old.logprob.detach() - torch.tensor(rollout.actor_logprobs[rollout.mask]).double()).exp()
    level, _, kind = method.importance.partition("-")
    if level == "none":
        return torch.ones_like(ratio)
    if level == "sequence":
        ratio = ratio.prod().expand_as(ratio)
    return torch.tensor([r if r <= method.importance_cap else (method.importance_cap if kind == "truncate" else 0.0)
                         for r in ratio.tolist()])  # fmt: skip


def advantages(group, method) -> list[float]:
    correct = [r.score.correct for r in group.rollouts]
    rewards = [r.score.total - penalty(int(r.mask.sum()), method) for r in group.rollouts]
    count = len(rewards)
    if method.advantage == "asymmetric":
        p = sum(correct) / count
        if p in (0, 1):
            return [0.0] * count
        return [((1 - p) / p) ** method.beta_pos if c else -((p / (1 - p)) ** method.beta_neg) for c in correct]
    if method.advantage == "leave_one_out":
        return [r - (sum(rewards) - r) / (count - 1) for r in rewards]
    centre = sum(rewards) / count
    spread = math.sqrt(sum((r - centre) ** 2 for r in rewards) / count)
    return [(r - centre) / (spread + 1e-6 if method.advantage == "group_std" else 1) for r in rewards]


def standard(values: list[float]) -> list[float]:
    centre = sum(values) / len(values)
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / len(values))
    return [(v - centre) / (spread + 1e-6) for v in values]


def erpo(group_old, group_reference, advantage_G, method) -> list[list[float]]:
    """Token advantages of a group, by the formulas of methods.md, section 3."""
    gates = iter(standard([h for old in group_old for h in old.entropy.tolist()]))
    gate_GT = [[1 / (1 + math.exp(-method.erpo_gate * next(gates))) for _ in old.entropy] for old in group_old]
    raw_GT = [
        ((o.logprob - r.logprob) * method.erpo_progress).tolist()
        for o, r in zip(group_old, group_reference, strict=True)
    ]
    cells: dict[int, list[tuple[int, int]]] = {}
    for i, raw in enumerate(raw_GT):
        for t in range(len(raw)):
            cells.setdefault(min(int(t / len(raw) * method.erpo_buckets + 1e-9), method.erpo_buckets - 1), []).append(
                (i, t)
            )
    progress_GT = [[0.0] * len(raw) for raw in raw_GT]
    for cell in cells.values():
        for (i, t), value in zip(cell, standard([raw_GT[i][t] for i, t in cell]), strict=True):
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


def surrogate(method, new, old, token_advantage, power):
    """[T] objective of a rollout, before its weights."""
    difference = new.logprob - old.logprob
    a = torch.tensor(token_advantage, dtype=torch.float64)
    low, high = 1 - method.clip_low, 1 + method.clip_high
    r = difference.exp()
    if method.ratio == "stop-gradient":
        return r.clamp(low, high).detach() * a * new.logprob
    if method.ratio == "power-mean":
        if method.power_clip == "token":
            r = torch.where(a > 0, r.clamp(max=high), torch.where(a < 0, r.clamp(min=low), r))
        r = r.pow(power).mean().pow(1 / power) if power else r.log().mean().exp()
    elif method.ratio == "sequence":
        r = r.prod() ** (1 / len(difference))
    return torch.minimum(r * a, r.clamp(low, high) * a)


def weights(method, old, reference, advantage):
    """[T] of a rollout, before normalising."""
    if method.token_weight == "horizon" and not (method.selective and advantage >= 0):
        return torch.exp(-method.alpha * torch.cumsum(old.entropy / math.log(tiny.V), 0))
    if method.token_weight == "residual":
        raised = (old.hidden - reference.hidden).norm(dim=1) ** method.residual_power
        return len(raised) * raised / raised.sum()
    return torch.ones_like(old.entropy)


def float64_gradient(folder, made, old_state, state, power):
    """Gradient of the row's loss at `state`, streams fixed at `old_state`."""
    method = made.objective.method
    groups = tiny.groups()
    if method.group_filter == "accuracy":
        groups = [g for g in groups if len({r.score.correct for r in g.rollouts}) == 2]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=list(made.config.model.lora_targets))
    ).double()
    model.load_state_dict(old_state)
    with torch.no_grad():
        olds = [[Tokens(model, r) for r in g.rollouts] for g in groups]
        with model.disable_adapter():
            references = [[Tokens(model, r) for r in g.rollouts] for g in groups]
    model.load_state_dict(state)
    news = [[Tokens(model, r) for r in g.rollouts] for g in groups]

    all_entropies = torch.cat([o.entropy for group in olds for o in group])
    kept = round(method.top_entropy_fraction * len(all_entropies))
    threshold = all_entropies.sort(descending=True).values[kept - 1]
    num_rollouts, per_rollout, per_group, all_tokens, kls = sum(map(len, olds)), [], [], [], []
    for group, new_G, old_G, reference_G in zip(groups, news, olds, references, strict=True):
        advantage_G = advantages(group, method)
        token_GT = [[a] * len(o.entropy) for a, o in zip(advantage_G, old_G, strict=True)]
        if method.token_advantage != "broadcast":
            token_GT = erpo(old_G, reference_G, advantage_G, method)
        above, below = 0.0, 0.0
        for new, old, reference, a, token_T, rollout in zip(
            new_G, old_G, reference_G, advantage_G, token_GT, group.rollouts, strict=True
        ):
            w = weights(method, new if method.weight_gradient else old, reference, a) * (old.entropy >= threshold)
            terms = importance(method, old, rollout) * w * surrogate(method, new, old, token_T, power)
            per_rollout.append(terms.mean())
            all_tokens.append(terms)
            above, below = above + terms.sum(), below + w.sum()
            d = reference.logprob - new.logprob
            kls.append(d.exp() - d - 1)
        per_group.append(above / below)
    objective = {
        "sequence-mean": lambda: sum(per_rollout) / num_rollouts,
        "token-mean": lambda: torch.cat(all_tokens).mean(),
        "constant": lambda: torch.cat(all_tokens).sum() / (num_rollouts * made.config.actor.max_tokens),
        "group": lambda: sum(per_group) / len(groups),
    }[method.normaliser]()
    beta = 0.0 if method.kl == "none" else method.beta
    (-objective + beta * torch.cat(kls).mean()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_every_row(folder, variant):
    kl = {} if METHODS[VARIANTS[variant]["name"]].kl == "none" else {"beta": BETA}
    made, seen = both_updates(folder, VARIANTS[variant] | kl)
    old_state = seen[0][0]
    power = made.objective._power(0)
    for state, gradient in seen:
        expected = float64_gradient(folder, made, old_state, state, power)
        for name, truth in expected.items():
            torch.testing.assert_close(gradient[name].double(), truth, rtol=0, atol=5e-4 * truth.abs().max().item())


def test_a_masked_opener_is_read_but_not_learned(folder, monkeypatch):
    """Each rollout has an opener of its own between the shared prompt and its first learned token."""

    def groups():
        made = [tiny.group(1, [7, 3, 9, 2], [4.0, 0.0, 1.5, -0.5]), tiny.group(2, [2, 6], [1.0, 0.0], prompt_length=11)]
        return [
            replace(
                g, rollouts=tuple(replace(r, mask=np.arange(len(r.mask)) > r.num_prompt_tokens) for r in g.rollouts)
            )
            for g in made
        ]

    monkeypatch.setattr(tiny, "groups", groups)
    made, seen = both_updates(folder, {"name": "reft", "opening_learned": False, "beta": BETA})
    expected = float64_gradient(folder, made, seen[0][0], seen[0][0], 0.0)
    for name, truth in expected.items():
        torch.testing.assert_close(seen[0][1][name].double(), truth, rtol=0, atol=5e-4 * truth.abs().max().item())
