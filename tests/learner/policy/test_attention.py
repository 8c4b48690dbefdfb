"""Packed attention against plain causal attention over each rollout behind its own copy of the prompt, in float64."""

import pytest
import torch
from torch.nn.attention import varlen

from learner.batch import Ends
from learner.policy.attention import packed_attention

LENGTHS = [[5, 3, 1, 4], [2], [7, 6]]
HEADS, KEY_HEADS, D = 4, 2, 8
NUM_TOKENS = sum(map(sum, LENGTHS))
CUDA = torch.cuda.is_available()


def plain(query_AD, key_AD, value_AD, scale, window=None):
    """[A, n, D]: the n-th query attends to the first n keys, or to the last `window` of these."""
    scores = query_AD @ key_AD.transpose(1, 2) * scale
    for n in range(scores.shape[1]):
        scores[:, n, n + 1 :] = -torch.inf
        scores[:, n, : max(0, n + 1 - (window or n + 1))] = -torch.inf
    return scores.softmax(2) @ value_AD


def expected(query, key, value, scale, window):
    """[L, A, D], rollout by rollout."""
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=0) for x in (key, value))
    outputs, start = [], 0
    for prompt, *rollouts in LENGTHS:
        head = range(start, start + prompt)
        outputs.append(plain(*(x[:, head] for x in (query, key, value)), scale, window))
        start += prompt
        for length in rollouts:
            positions = [*head, *range(start, start + length)]
            outputs.append(plain(*(x[:, positions] for x in (query, key, value)), scale, window)[:, prompt:])
            start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)


def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """FlashAttention's contract in plain torch: the last query of a sequence attends to its last key."""
    assert enable_gqa
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    left, right = window_size
    assert right == 0 and cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        scores = q @ k.transpose(1, 2) * scale
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]  # the key at a query's own position
        keys = torch.arange(k.shape[1])
        hidden = (keys > at) | ((keys < at - left) if left >= 0 else False)
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(2) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1)


@pytest.fixture(params=["one by one", "packed"])
def case(request, monkeypatch):
    """dtype, device and tolerance. Without a GPU, the packed case calls `kernel` in place of FlashAttention."""
    if request.param == "one by one":
        return torch.float64, "cpu", 1e-12
    if CUDA:
        return torch.bfloat16, "cuda", 2e-2
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr("learner.policy.attention._attend_one_by_one", packed_path)
    return torch.float64, "cpu", 1e-12


def packed_path(pieces, scaling, window):
    from learner.policy.attention import _attend_packed

    return _attend_packed(pieces, Ends.of(LENGTHS, pieces[0][0].device), scaling, window)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
def test_values_and_gradients(case, window):
    dtype, device, tolerance = case
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, NUM_TOKENS, D), (KEY_HEADS, NUM_TOKENS, D), (KEY_HEADS, NUM_TOKENS, D), (NUM_TOKENS, HEADS, D))
    *tensors, direction = (torch.randn(s, generator=generator).to(dtype).double() for s in shapes)
    ours = [x[None].to(dtype).to(device).requires_grad_() for x in tensors]
    theirs = [x.requires_grad_() for x in tensors]
    output, _ = packed_attention(torch.nn.Module(), *ours, None, scaling=0.7, sliding_window=window, lengths=LENGTHS)
    reference = expected(*theirs, 0.7, window)
    (output[0] * direction.to(output)).sum().backward()
    (reference * direction).sum().backward()
    torch.testing.assert_close(output[0].double().cpu(), reference, rtol=tolerance, atol=tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad[0].double().cpu(), other.grad, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("window", [None, 4])
def test_without_lengths_it_is_plainly_causal(window):
    query, key, value = (torch.randn(1, HEADS, 6, D, dtype=torch.float64) for _ in range(3))
    output, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(output[0].transpose(0, 1), plain(query[0], key[0], value[0], 0.3, window))


@pytest.mark.parametrize(
    ("name", "mask", "others"),
    [
        ("a mask", torch.ones(1, 1, 6, 6, dtype=torch.bool), {}),
        ("s_aux", None, {"s_aux": torch.zeros(HEADS)}),  # attention sinks, as of gpt-oss
        ("softcap", None, {"softcap": 50.0}),  # of the scores, as of Gemma 2
    ],
)
def test_what_would_be_left_out_is_refused(name, mask, others):
    """Every model calls with its own keywords: what is None, or does not change the result, is taken."""
    query, key, value = (torch.randn(1, heads, 6, D) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    with pytest.raises(ValueError, match=f"the model's attention has {name}, which packed attention would leave out"):
        packed_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3, **others)
    unset = dict.fromkeys(others) | {"dropout": 0.0, "position_ids": None}
    output, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, **unset)
    assert output.shape == (1, 6, HEADS, D)
