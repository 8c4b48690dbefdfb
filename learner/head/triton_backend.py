"""The fused head on an NVIDIA GPU: cuBLAS matmuls with float32 results, and two Triton kernels over the logits' rows.

For a chunk of tokens, Z = H W^T in float32, one row per token. `_statistics` reads Z once for all sums of a row.
`_weights` turns Z into weights of the vocabulary entries in the inputs' dtype, and a second matmul turns these into the
gradient. With q = softmax(z) over all entries but the target y, and 1 - p = sigmoid(logsumexp of the others - z_y):

    d logprob / d hidden =   (1 - p) (w_y - sum q w) / T
    d entropy / d hidden = - (p (log p + H) w_y + (1 - p) sum q (log p_v + H) w_v) / T

q sums to 1 however small 1 - p is, so rounding q to 16 bits costs a near-certain token no accuracy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import softplus

from learner.head.interface import GPU_WORKSPACE_BYTES, Chunk, Projection, Wanted

WORKSPACE_BYTES = GPU_WORKSPACE_BYTES
BLOCK, WARPS = 4096, 8  # a program holds 4096 logits at once, 16 per thread; not tuned yet
SCALE = 512.0  # of the weights: float16 ones are then neither subnormal in a flat row nor infinite in a peaked one
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # a running maximum starts finite, so that 0 * LOWEST is 0
NEGLIGIBLE: tl.constexpr = tl.constexpr(-80.0)  # exp(NEGLIGIBLE) vanishes beside 1, but is not subnormal


def chunk_rows(weight_VH: Tensor) -> int:
    """The number of tokens in a chunk: as many as the workspace holds, in steps of 128."""
    return max(128, WORKSPACE_BYTES // (len(weight_VH) * (4 + weight_VH.element_size())) // 128 * 128)


def chunk(hidden_cH: Tensor, target_c: Tensor, temperature: float, projection: Projection, wanted: Wanted) -> Chunk:
    """The statistics of c tokens, in float32."""
    weight_VH, softcap = projection.weight_VH, projection.softcap
    logits_cV = _matmul(hidden_cH, weight_VH.T)
    if projection.bias_V is not None:
        logits_cV += projection.bias_V
    if softcap is not None:
        logits_cV.div_(softcap).tanh_().mul_(softcap)
    rows, vocab = logits_cV.shape
    target_c = target_c.contiguous()
    inverse = 1 / temperature
    statistics = logits_cV.new_full((8, rows), torch.nan)
    with torch.cuda.device_of(logits_cV):
        _statistics[(rows,)](
            logits_cV, target_c, inverse, statistics, rows, vocab, wanted.entropy_at_one, BLOCK=BLOCK, num_warps=WARPS
        )
    log_odds_c, entropy_c, at_one_c, highest_c, log_others_c, mean_c, excess_y_c, logit_y_c = statistics

    def mean_weight(*, entropy: bool) -> Tensor:
        """[c, H]: sum over the other entries of q D w, or of q (log p + H) D w; D is the slope of the softcap."""
        token_weight_cV = torch.empty_like(logits_cV, dtype=weight_VH.dtype)
        grid = (rows, triton.cdiv(vocab, BLOCK))
        with torch.cuda.device_of(logits_cV):
            _weights[grid](
                logits_cV, target_c, inverse, highest_c, log_others_c, mean_c, token_weight_cV, vocab, softcap or 1.0,
                SCALE=SCALE, ENTROPY=entropy, SOFTCAP=softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        return _matmul(token_weight_cV, weight_VH) / SCALE

    u_cH = v_cH = topk_entropy_c = topk_mass_c = None
    if wanted.u:
        weight_y_cH = weight_VH[target_c.clamp(0, vocab - 1)].float()
        if softcap is not None:
            weight_y_cH *= (1 - (logit_y_c / softcap).square())[:, None]
        others_c1 = (torch.sigmoid(log_odds_c) * inverse)[:, None]
        u_cH = others_c1 * (weight_y_cH - mean_weight(entropy=False))
        if wanted.v:
            target_c1 = (torch.sigmoid(-log_odds_c) * excess_y_c * inverse)[:, None]
            v_cH = -(target_c1 * weight_y_cH + others_c1 * mean_weight(entropy=True))
    if wanted.topk is not None:
        top_cK = logits_cV.topk(min(wanted.topk, vocab), dim=1).values * inverse
        topk_entropy_c = torch.special.entr(top_cK.softmax(dim=1)).sum(dim=1)
        topk_mass_c = ((top_cK - highest_c[:, None]).logsumexp(dim=1) - entropy_c - mean_c).exp()
    return Chunk(
        logprob_c=-softplus(log_odds_c),
        entropy_c=entropy_c,
        entropy_at_one_c=at_one_c if wanted.entropy_at_one else None,
        topk_entropy_c=topk_entropy_c,
        topk_mass_c=topk_mass_c,
        u_cH=u_cH,
        v_cH=v_cH,
    )


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, without a 16-bit result in between."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@triton.jit
def _fold(z, counted, highest, total, moment):
    """Online sums of exp(z - m) and of exp(z - m) (z - m) over the columns `counted`; the maximum m is over all."""
    new_highest = tl.maximum(highest, tl.max(z, axis=0))
    shift = highest - new_highest
    scale = tl.exp(shift)
    centred = z - new_highest
    exp = tl.where(counted, tl.exp(centred), 0.0)
    bounded = tl.where(centred < NEGLIGIBLE, NEGLIGIBLE, centred)  # avoids 0 * -inf; a NaN stays NaN
    moment = scale * (moment + shift * total) + tl.sum(exp * bounded, axis=0)
    total = scale * total + tl.sum(exp, axis=0)
    return new_highest, total, moment


@triton.jit
def _statistics(logits, targets, inverse, statistics, rows, vocab, AT_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row. Rows of `statistics` [8, rows]: log odds against the target, entropy, entropy at
    temperature 1, m, log of the others' sum, mean of z - m, the target's z - m minus that mean, the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    highest, others, moment = LOWEST, 0.0, 0.0
    highest_at_one, total_at_one, moment_at_one = LOWEST, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        z = tl.load(logits + row * vocab + columns, mask=inside, other=-float("inf"))
        highest, others, moment = _fold(z * inverse, inside & (columns != target), highest, others, moment)
        if AT_ONE:
            highest_at_one, total_at_one, moment_at_one = _fold(z, inside, highest_at_one, total_at_one, moment_at_one)
    if (target >= 0) & (target < vocab):
        logit_y = tl.load(logits + row * vocab + target)
        centred_y = logit_y * inverse - highest
        centred_y = tl.where(centred_y < NEGLIGIBLE, NEGLIGIBLE, centred_y)
        exp_y = tl.exp(centred_y)
        total = others + exp_y
        mean = (moment + exp_y * centred_y) / total
        tl.store(statistics + row, tl.log(others) - (logit_y * inverse - highest))
        tl.store(statistics + rows + row, tl.log(total) - mean)
        tl.store(statistics + 3 * rows + row, highest)
        log_others = tl.log(others)
        tl.store(statistics + 4 * rows + row, tl.where(log_others < NEGLIGIBLE, NEGLIGIBLE, log_others))  # not -inf
        tl.store(statistics + 5 * rows + row, mean)
        tl.store(statistics + 6 * rows + row, centred_y - mean)
        tl.store(statistics + 7 * rows + row, logit_y)
    if AT_ONE:
        entropy_at_one = tl.log(total_at_one) - moment_at_one / total_at_one
        tl.store(statistics + 2 * rows + row, entropy_at_one)


@triton.jit
def _weights(
    logits, targets, inverse, highests, log_others, means, out, vocab, softcap,
    SCALE: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block: `out` [rows, vocab] = SCALE q D, or SCALE q (log p + H) D; 0 at the target."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    logit = tl.load(logits + row * vocab + columns, mask=inside, other=-float("inf"))
    z = logit * inverse
    centred = z - tl.load(highests + row)  # subtracted first, so that large z cancel exactly
    weight = SCALE * tl.exp(centred - tl.load(log_others + row))
    if ENTROPY:
        excess = centred - tl.load(means + row)
        weight *= tl.where(excess < NEGLIGIBLE, NEGLIGIBLE, excess)
    if SOFTCAP:
        weight *= 1 - (logit / softcap) * (logit / softcap)
    weight = tl.where(columns == tl.load(targets + row), 0.0, weight)
    tl.store(out + row * vocab + columns, weight.to(out.dtype.element_ty), mask=inside)
