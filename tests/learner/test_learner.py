"""The learner's gradient against the float64 oracle, its invariances, and what one update reports and leaves."""

import math

import loss_oracle
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from common.adapter import tensors
from common.config import ModelConfig
from learner.batch import pack
from learner.learner import PROBE_NATS
from learner.policy.forward import Demands
from learner.policy.policy import Policy

METHODS = {
    "grpo": {},
    "ah-grpo": {"alpha": 3.0},
    "sa-ah-grpo": {"alpha": 3.0},
    "ah-grpo negative": {"name": "ah-grpo", "alpha": -2.0},
    "step normaliser": {"name": "sa-ah-grpo", "alpha": 3.0, "normaliser": "step"},
    "group mean, k1": {"name": "sa-ah-grpo", "advantage": "group_mean", "kl": "k1"},
    "top-K partial": {"name": "sa-ah-grpo", "alpha": 3.0, "entropy": "topk-partial", "entropy_topk": 10},
    "gradient through w": {"name": "sa-ah-grpo", "alpha": 3.0, "weight_gradient": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_papers(folder, method):
    made = tiny.learner(folder, method={"name": method, "beta": 0.3} | METHODS[method])
    got, expected = tiny.gradients(made, tiny.groups()), loss_oracle.gradients(folder, made, tiny.groups())
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        assert scale > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(got[name].double(), expected[name], rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation": 3}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 40}]
)
def test_any_micro_batches_give_the_same_gradient(folder, options):
    whole = tiny.gradients(tiny.learner(folder, micro_batch_tokens=10_000), tiny.groups())
    other = tiny.gradients(tiny.learner(folder, **options), tiny.groups())
    for name in whole:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-4, atol=1e-6)


def test_a_base_models_own_dropout_is_off(tmp_path):
    config = PhiConfig(
        vocab_size=tiny.V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        resid_pdrop=0.5, embd_pdrop=0.5, initializer_range=0.3,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(tmp_path)
    policy = Policy(
        tmp_path,
        ModelConfig(dtype="float32", lora_targets=("q_proj",)),
        device=torch.device("cpu"),
        recompute="none",
        head_backend="torch",
    )
    batch = pack(tiny.groups(), max_tokens=999, min_micro_batches=1, device=torch.device("cpu"))
    passes = [policy.reference_pass(batch, Demands()).stats.logprob_N for _ in range(2)]
    assert torch.equal(*passes)


def test_order_of_groups_does_not_matter(folder):
    one, other = (
        tiny.gradients(tiny.learner(folder), tiny.groups()),
        tiny.gradients(tiny.learner(folder), tiny.groups()[::-1]),
    )
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", ["layer", "micro-batch"])
@pytest.mark.parametrize("method", ["sa-ah-grpo", "arca"])
def test_activation_checkpointing_changes_nothing(folder, recompute, method):
    """arca learns without dropout, which must hold for the activations that are computed again, too."""
    options = {"dropout": 0.3, "micro_batch_tokens": 30, "method": {"name": method}}
    one = tiny.gradients(tiny.learner(folder, **options), tiny.groups())
    other = tiny.gradients(tiny.learner(folder, **options, recompute=recompute), tiny.groups())
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)


def test_failed_reward_costs_its_rollout_only(folder):
    """A group with a failed rollout trains like the group without it, and the failed one has no targets."""
    with_failure = [tiny.group(1, [7, 3, 9, 1], [4.0, None, 1.5, -0.5])]
    without = [tiny.group(1, [7, 3, 9, 1], [4.0, 0.0, 1.5, -0.5])]
    rollouts = without[0].rollouts
    without = [type(without[0])(prompt=without[0].prompt, rollouts=(rollouts[0], rollouts[2], rollouts[3]))]
    one, other = tiny.gradients(tiny.learner(folder), with_failure), tiny.gradients(tiny.learner(folder), without)
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-7)
    assert [s is None for s in tiny.learner(folder).update(with_failure).tokens] == [False, True, False, False]


def test_zero_variance_groups_are_dropped_or_kept(folder):
    kept = tiny.learner(folder).update(tiny.groups())
    dropped = tiny.learner(folder, method={"group_filter": "zero-variance"}).update(tiny.groups())
    assert kept.metrics["groups/dropped"] == 0
    assert dropped.metrics["groups/dropped"] == 1
    assert [s is None for s in dropped.tokens] == [False] * 8 + [True] * 4
    nothing = tiny.learner(folder, method={"group_filter": "zero-variance"}).update(tiny.groups()[2:])
    assert nothing.skipped is None
    assert nothing.tokens == (None,) * 4


def test_a_step_that_is_not_finite_is_skipped(folder):
    made = tiny.learner(folder)
    before = [p.clone() for p in made.policy.parameters()]
    groups = [tiny.group(1, [7, 3], [math.inf, 0.0])]
    result = made.update(groups)
    assert "nan" in result.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, made.policy.parameters(), strict=True))
    assert made.adapter().version == 1  # a skipped step counts as a version too
    assert made.update(tiny.groups()).skipped is None


def test_second_inner_update_has_another_ratio(folder):
    made = tiny.learner(folder, inner_updates=3)
    result = made.update(tiny.groups())
    once = tiny.learner(folder).update(tiny.groups())
    assert result.metrics["loss/policy"] < once.metrics["loss/policy"]  # three updates on one batch lower its loss
    assert result.metrics["entropy/mean"] == once.metrics["entropy/mean"]  # which describes the start of the step


def test_metrics_by_hand(folder):
    result = tiny.learner(folder, method={"alpha": 3.0}).update(tiny.groups())
    targets = result.tokens
    weights = np.concatenate([s.weights for s in targets])
    negative = np.concatenate([s.weights for s in targets if s.advantage < 0])
    assert result.metrics["weight/mean"] == pytest.approx(weights.mean(), rel=1e-5)
    assert result.metrics["weight/negative_mean"] == pytest.approx(negative.mean(), rel=1e-5)
    assert result.metrics["advantage/negative_fraction"] == pytest.approx(3 / 12)  # 0, -.5 and 0
    entropies = np.concatenate([s.entropies for s in targets])
    assert result.metrics["entropy/normalized_mean"] == pytest.approx(entropies.mean() / math.log(tiny.V), rel=1e-5)
    cumulative = np.exp(-3.0 * np.cumsum(targets[1].entropies) / math.log(tiny.V))
    np.testing.assert_allclose(targets[1].weights, cumulative, rtol=1e-5)


def test_the_adapter_is_a_copy_with_a_correct_canary(folder):
    made = tiny.learner(folder)
    adapter = made.adapter()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor(tiny.CANARY, dtype=torch.long)[None]
    expected = base(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(adapter.canary.base_logprobs, expected.detach(), atol=1e-4)
    assert np.abs(adapter.canary.logprobs - adapter.canary.base_logprobs).mean() > 1e-3
    before = {name: t.clone() for name, t in tensors(adapter).items()}
    state = {n.replace(".default", ""): p for n, p in made.policy.peft_model.named_parameters() if p.requires_grad}
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    made.update(tiny.groups())
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(adapter).items())
    assert made.adapter().checksum != adapter.checksum


def test_the_probe_of_a_nearly_uniform_model_is_finite(tmp_path):
    """No adapter moves such a model by PROBE_NATS, as its last norm and small embedding bound its logits."""
    made = tiny.learner(tiny.save_model(tmp_path, initializer_range=0.02))
    canary = made.probe().canary
    assert 0.03 < np.abs(canary.logprobs - canary.base_logprobs).mean() < PROBE_NATS


@pytest.mark.parametrize("mini_batches", [1, 5])
def test_a_saved_learner_resumes_exactly(folder, mini_batches):
    options = {"dropout": 0.1, "mini_batches": mini_batches}
    one = tiny.learner(folder, **options)
    one.update(tiny.groups())
    files = one.files()
    expected = [one.update(tiny.groups()).metrics for _ in range(2)]
    other = tiny.learner(folder, **options)
    assert other.load_files(files) == 1
    got = [other.update(tiny.groups()).metrics for _ in range(2)]
    for a, b in zip(expected, got, strict=True):
        assert a | {"memory/peak_bytes": 0} == b | {"memory/peak_bytes": 0}
