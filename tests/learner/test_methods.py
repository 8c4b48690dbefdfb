"""The gradient of every method's whole loss against the float64 oracle, at each of several updates on one batch."""

import loss_oracle
import numpy as np
import pytest
import tiny
import torch

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
    "holder, both clips": {"name": "holder", "power_clip": "both", "clip_low": 0.05, "clip_high": 0.02},
    "sample std": {"name": "grpo", "std_ddof": 1},
    "asymmetric without powers": {"name": "asym-grpo", "beta_pos": 0.0, "beta_neg": 0.0},
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


def updates(folder, method, groups, mini_batches=1):
    """A learner after two inner updates on one batch, and the weights and the gradient at each of its updates.

    A gradient through the weights is defined at the first update alone.
    """
    inner_updates = 1 if "weight_gradient" in method else 2
    options = {"inner_updates": inner_updates, "mini_batches": mini_batches, "learning_rate": 2e-2}
    config = tiny.config(method=method, steps=3, **options)
    config = config.model_copy(update={"actor": config.actor.model_copy(update={"max_tokens": MAX_TOKENS})})
    made = Learner(folder, config, np.arange(12))
    tiny.move_adapter(made)
    made.optimizer.config = made.optimizer.config.model_copy(update={"gradient_clip": 1e9})
    seen, take = [], made.optimizer.adamw.step

    def step():
        trained = {n: p for n, p in made.policy.peft_model.named_parameters() if p.requires_grad}
        seen.append((loss_oracle.state_of(made), {n: p.grad.clone() for n, p in trained.items()}))
        take()

    made.optimizer.adamw.step = step
    assert made.update(groups).skipped is None
    return made, seen


def check(gradient, expected):
    for name, truth in expected.items():
        torch.testing.assert_close(gradient[name].double(), truth, rtol=0, atol=5e-4 * truth.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_every_method(folder, variant):
    made, seen = updates(folder, with_kl(VARIANTS[variant]), tiny.groups())
    old = seen[0][0]
    for new, gradient in seen:
        check(gradient, loss_oracle.gradients(folder, made, tiny.groups(), old=old, new=new))


def with_kl(method):
    return method if METHODS[method["name"]].kl == "none" else method | {"beta": BETA}


def test_methods_whose_authors_use_no_kl_have_none():
    without = {name for name, method in METHODS.items() if method.kl == "none" and method.beta == 0}
    assert without == {"arca", "holder", "dr-grpo", "dapo", "gspo", "cispo", "entropy-mask"}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "reft"])
def test_gradient_of_every_mini_batch(folder, name):
    """Five mini-batches cut through groups; each is learned twice.

    entropy-mask has one for each group: the entropies of a group's first tokens tie at its threshold, and packed apart
    they round differently.
    """
    number = 2 if name == "entropy-mask" else 5
    made, seen = updates(folder, with_kl({"name": name}), tiny.groups(), mini_batches=number)
    num_groups = len(loss_oracle.kept(tiny.groups(), made.config.method))
    ends = {(3, 5): [0, 4, 6, 8, 10, 12], (2, 5): [0, 2, 4, 5, 6, 8], (2, 2): [0, 4, 8]}[num_groups, number]
    assert len(seen) == 2 * number
    for i, (new, gradient) in enumerate(seen):
        learned = range(ends[i % number], ends[i % number + 1])
        check(gradient, loss_oracle.gradients(folder, made, tiny.groups(), old=seen[0][0], new=new, mini_batch=learned))


@pytest.mark.parametrize(
    ("method", "num_forced", "num_masked"),
    [
        pytest.param({"name": "reft"}, 0, 1, id="an opener that is not learned"),
        pytest.param(
            {"name": "sa-ah-grpo", "alpha": 3.0, "importance": "token-truncate", "importance_cap": 1.2},
            3,
            3,
            id="three forced tokens",
        ),
        pytest.param(
            {"name": "reft", "overlong_buffer": 6, "overlong_penalty": 2.0}, 3, 4, id="three and an opener, all long"
        ),
    ],
)
def test_masked_first_tokens_are_read_but_not_learned(folder, method, num_forced, num_masked):
    """They are context alone, between the shared prompt and the first learned token, and count for the length."""
    groups = [
        tiny.forced(group, num_forced, num_masked)
        for group in (
            tiny.group(1, [7, 5, 9, 6], [4.0, 0.0, 1.5, -0.5]),
            tiny.group(2, [5, 8], [1.0, 0.0], prompt_length=11),
        )
    ]
    made, seen = updates(folder, method | {"beta": BETA}, groups)
    for new, gradient in seen:
        check(gradient, loss_oracle.gradients(folder, made, groups, old=seen[0][0], new=new))
