"""The entropy bonus, the top-entropy mask, the head's backends, softcap and bias, as the learner uses them."""

import loss_oracle
import numpy as np
import pytest
import tiny
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from common.config import ModelConfig
from common.types import UserError
from learner.loss import adapt_entropy_bonus
from learner.policy.policy import Policy
from learner.token_weights import normalise, top_entropy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("fraction", "bonus"), [(1.0, 0.0), (0.25, 0.0), (1.0, 0.7), (0.5, 0.3)])
def test_gradient_of_mask_and_bonus(folder, fraction, bonus):
    options = {"top_entropy_fraction": fraction, "entropy_bonus": bonus, "normaliser": "token-mean", "kl": "none"}
    made = tiny.learner(folder, method={"name": "grpo"} | options)
    got = tiny.gradients(made, tiny.groups())
    for name, expected in loss_oracle.gradients(folder, made, tiny.groups()).items():
        torch.testing.assert_close(got[name].double(), expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_the_mask_composes_with_the_horizon(folder):
    """Among the recorded targets, kept tokens have the horizon's weight and the others 0."""
    targets = {
        fraction: tiny.learner(folder, method={"alpha": 3.0, "top_entropy_fraction": fraction})
        .update(tiny.groups())
        .tokens
        for fraction in (1.0, 0.25)
    }
    all_weights, kept_weights = (np.concatenate([s.weights for s in targets[f]]) for f in (1.0, 0.25))
    entropies = np.concatenate([s.entropies for s in targets[1.0]])
    kept = entropies >= np.sort(entropies)[-round(0.25 * len(entropies))]
    np.testing.assert_allclose(kept_weights, np.where(kept, all_weights, 0), rtol=1e-6)


def test_top_entropy_by_hand():
    entropy_BT = torch.tensor([[3.0, 1.0, 9.0], [2.0, 3.0, 9.0]])
    mask_BT = torch.tensor([[True, True, False], [True, True, False]])
    for fraction, kept in (
        (0.01, [[1, 0, 0], [0, 1, 0]]),
        (0.5, [[1, 0, 0], [0, 1, 0]]),
        (0.75, [[1, 0, 0], [1, 1, 0]]),
    ):
        assert top_entropy(entropy_BT, mask_BT, fraction=fraction).int().tolist() == kept
    assert torch.equal(top_entropy(entropy_BT, mask_BT, fraction=1.0), mask_BT)


def test_normalisers_of_a_masked_step():
    """The mean over all tokens counts those of weight 0; a group whose weights are all 0 contributes 0, not NaN."""
    weights_BT = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    mask_BT = torch.tensor([[True, True], [True, False], [True, True]])
    group_B = torch.tensor([0, 0, 1])
    by_token = normalise(weights_BT, mask_BT, group_B, normaliser="token-mean")
    torch.testing.assert_close(by_token, weights_BT / 5)
    by_group = normalise(weights_BT, mask_BT, group_B, normaliser="group")
    torch.testing.assert_close(by_group, torch.tensor([[0.125, 0.0], [0.375, 0.0], [0.0, 0.0]]))


def test_adaptive_bonus_by_hand():
    options = {"target": 0.5, "step": 0.1, "maximum": 0.25}
    for bonus, entropy, expected in (
        (0.0, 0.4, (0.0, 0.1)),  # below the target: applied, and grows
        (0.2, 0.4, (0.2, 0.25)),  # up to its maximum
        (0.2, 0.5, (0.2, 0.1)),  # at the target: applied, and shrinks
        (0.2, 0.6, (0.0, 0.1)),  # above: not applied
        (0.05, 0.6, (0.0, 0.0)),  # down to 0
    ):
        assert adapt_entropy_bonus(bonus, entropy, **options) == pytest.approx(expected)


def test_adaptive_bonus_over_steps_and_a_checkpoint(folder, tmp_path):
    method = {"entropy_target": 100.0, "entropy_bonus": 0.1, "entropy_bonus_step": 0.25}  # always below the target
    made = tiny.learner(folder, method=method)
    assert [made.update(tiny.groups()).metrics["entropy/bonus"] for _ in range(3)] == pytest.approx([0.1, 0.35, 0.6])
    made.save(tmp_path)
    other = tiny.learner(folder, method=method)
    other.load(tmp_path)
    assert other.update(tiny.groups()).metrics["entropy/bonus"] == pytest.approx(0.85)
    above = tiny.learner(folder, method=method | {"entropy_target": 1e-6})
    assert above.update(tiny.groups()).metrics["entropy/bonus"] == 0


def test_a_bonus_raises_the_entropy(folder):
    """With equal rewards and no KL, the objective is the bonus alone."""
    groups = [tiny.group(3, [5, 5, 2, 3], [0.5, 0.5, 0.5, 0.5])]
    made = tiny.learner(folder, method={"entropy_bonus": 1.0, "kl": "none"})
    entropies = [made.update(groups).metrics["entropy/mean"] for _ in range(4)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.01


@pytest.mark.parametrize("backend", ["triton", "trl", "liger"])
def test_every_backend_trains_alike(folder, backend):
    """Metrics and gradients agree in float32, in which the peers do not round."""
    method = {"alpha": 3.0, "entropy_bonus": 0.2}
    made = {name: tiny.learner(folder, method=method, head_backend=name) for name in ("torch", backend)}
    ours, theirs = (each.update(tiny.groups()).metrics for each in made.values())
    for name in ours.keys() - {"memory/peak_bytes"}:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    one, other = (tiny.gradients(each, tiny.groups()) for each in made.values())
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-3 * gradient.abs().max().item())


SIZES = {
    "vocab_size": tiny.V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("kind", ["softcap", "bias"])
def test_the_models_own_softcap_and_bias(kind, tmp_path):
    """Log-probabilities of a sequence against the model's own logits."""
    torch.manual_seed(0)
    if kind == "softcap":
        config = Gemma2Config(
            **SIZES, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0, attn_logit_softcapping=None,
            sliding_window=4096, initializer_range=0.5,
        )  # fmt: skip
        model = Gemma2ForCausalLM(config)
    else:
        model = PhiForCausalLM(PhiConfig(**SIZES, initializer_range=0.3))
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    policy = Policy(
        tmp_path,
        ModelConfig(dtype="float32", lora_targets=("q_proj",)),
        device=torch.device("cpu"),
        recompute="none",
        head_backend="auto",
    )
    ids = torch.arange(12)[None] * 7 % tiny.V
    expected = model(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(policy.logprobs(ids[0].numpy()), expected.detach(), atol=1e-5)
    plain = model.get_decoder()(ids).last_hidden_state[0, :-1] @ model.lm_head.weight.T
    without = plain.log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
    assert (without - expected).abs().max() > 0.1, "the case would pass without them"


def test_an_adapter_on_the_head_is_rejected(folder):
    config = ModelConfig(dtype="float32", lora_targets=("q_proj", "lm_head"))
    with pytest.raises(UserError, match="lm_head is not a linear module of the model's layers"):
        Policy(folder, config, device=torch.device("cpu"), recompute="none", head_backend="auto")
