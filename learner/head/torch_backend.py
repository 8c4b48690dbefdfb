"""The fused head in plain PyTorch: one pass over tiles of the vocabulary, as in flash attention.

A tile of the weight is upcast, multiplied, summed and, for the gradients, multiplied again while it is in the cache;
no logits are kept. Sums are centred at the token's running maximum and leave the target out, so that 1 - p(target) and
the gradients made from it stay exact for near-certain tokens. Suffixes: c tokens of a chunk, t vocabulary entries of a
tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from learner.head.interface import Chunk, Projection, Wanted

ROWS = 1024
TILE = 2048  # of the vocabulary
LOWEST = -1e30  # a running maximum starts below any logit, but finite, so that 0 * LOWEST is 0 and not NaN
NEGLIGIBLE = -1000.0  # replaces lower centred logits: exp(NEGLIGIBLE) is 0 in float64 too, and 0 * -inf is avoided


def chunk_rows(weight_VH: Tensor) -> int:
    """The number of tokens in a chunk."""
    return ROWS


def chunk(hidden_cH: Tensor, target_c: Tensor, temperature: float, projection: Projection, wanted: Wanted) -> Chunk:
    """The statistics of c tokens, in float32, or float64 for float64 inputs."""
    hidden_cH = hidden_cH.to(torch.promote_types(hidden_cH.dtype, torch.float32))
    sums = _Sums(hidden_cH, u=wanted.u, v=wanted.v)
    sums_at_one = _Sums(hidden_cH, u=False, v=False) if wanted.entropy_at_one else None
    top_Kc = hidden_cH.new_empty(0, len(hidden_cH))
    for start in range(0, len(projection.weight_VH), TILE):
        weight_tH = projection.weight_VH[start : start + TILE].to(hidden_cH.dtype)
        logits_tc = weight_tH @ hidden_cH.T  # vocabulary first: a tile is one contiguous block
        if projection.bias_V is not None:
            logits_tc += projection.bias_V[start : start + TILE, None]
        slope_tc = None
        if projection.softcap is not None:
            logits_tc.div_(projection.softcap).tanh_().mul_(projection.softcap)
            slope_tc = _slope(logits_tc, projection.softcap)
        if sums_at_one is not None:
            sums_at_one.add(logits_tc.clone(), target_c - start, weight_tH)
        logits_tc /= temperature
        if wanted.topk is not None:
            top_Kc = torch.cat([top_Kc, logits_tc])
            top_Kc = top_Kc.topk(min(wanted.topk, len(top_Kc)), dim=0).values
        sums.add(logits_tc, target_c - start, weight_tH, slope_tc)

    token = sums.finish()
    u_cH = v_cH = topk_entropy_c = topk_mass_c = None
    if sums.u_cH is not None:
        weight_y_cH = projection.weight_VH[target_c.clamp(0, len(projection.weight_VH) - 1)].to(hidden_cH.dtype)
        if projection.softcap is not None:
            weight_y_cH *= _slope(sums.target_c * temperature, projection.softcap)[:, None]
        scale_c1 = (token.total_c * temperature)[:, None]
        u_cH = (sums.others_c[:, None] * weight_y_cH - sums.u_cH) / scale_c1
        if sums.v_cH is not None:
            coefficient_c1 = (token.exp_y_c * (token.mean_c - token.centred_y_c))[:, None]
            v_cH = (coefficient_c1 * weight_y_cH + token.mean_c[:, None] * sums.u_cH - sums.v_cH) / scale_c1
    if wanted.topk is not None:
        topk_entropy_c, topk_mass_c = _topk(top_Kc - sums.highest_c, token.total_c)
    return Chunk(
        logprob_c=token.logprob_c,
        entropy_c=token.entropy_c,
        entropy_at_one_c=None if sums_at_one is None else sums_at_one.finish().entropy_c,
        topk_entropy_c=topk_entropy_c,
        topk_mass_c=topk_mass_c,
        u_cH=u_cH,
        v_cH=v_cH,
    )


class _Finished(NamedTuple):
    logprob_c: Tensor
    entropy_c: Tensor
    centred_y_c: Tensor  # z - m of the target, at least NEGLIGIBLE
    exp_y_c: Tensor
    total_c: Tensor  # sum of exp(z - m) over the vocabulary
    mean_c: Tensor  # mean of z - m under the distribution


class _Sums:
    """Online sums over all vocabulary entries but the target; m is the maximum so far, D the slope of the softcap."""

    def __init__(self, hidden_cH: Tensor, *, u: bool, v: bool) -> None:
        rows = len(hidden_cH)
        self.highest_c = hidden_cH.new_full((rows,), LOWEST)  # m; it includes the target
        self.target_c = hidden_cH.new_full((rows,), torch.nan)  # z of the target; stays NaN outside the vocabulary
        self.others_c = hidden_cH.new_zeros(rows)  # sum of exp(z - m)
        self.moment_c = hidden_cH.new_zeros(rows)  # sum of exp(z - m) (z - m)
        self.u_cH = torch.zeros_like(hidden_cH) if u else None  # sum of exp(z - m) D w
        self.v_cH = torch.zeros_like(hidden_cH) if v else None  # sum of exp(z - m) (z - m) D w

    def add(
        self,
        logits_tc: Tensor,
        target_c: Tensor,
        weight_tH: Tensor,
        slope_tc: Tensor | None = None,
    ) -> None:
        """Add a tile of logits, which is overwritten; `target_c` counts from its start and may lie outside."""
        in_tile_c = (target_c >= 0) & (target_c < len(logits_tc))
        index = (target_c.clamp(0, len(logits_tc) - 1), torch.arange(len(target_c), device=target_c.device))
        self.target_c = torch.where(in_tile_c, logits_tc[index], self.target_c)
        highest_c = torch.maximum(self.highest_c, logits_tc.amax(dim=0))
        shift_c = self.highest_c - highest_c
        scale_c = shift_c.exp()
        self.highest_c = highest_c
        centred_tc = logits_tc.sub_(highest_c).clamp_(min=NEGLIGIBLE)
        exp_tc = centred_tc.exp()
        exp_tc[index] *= ~in_tile_c
        moment_tc = centred_tc.mul_(exp_tc)
        self.moment_c = scale_c * (self.moment_c + shift_c * self.others_c) + moment_tc.sum(dim=0)
        self.others_c = scale_c * self.others_c + exp_tc.sum(dim=0)
        if slope_tc is not None:
            exp_tc *= slope_tc
            moment_tc *= slope_tc
        if self.u_cH is not None:
            if self.v_cH is not None:
                self.v_cH.addcmul_(shift_c[:, None], self.u_cH).mul_(scale_c[:, None]).addmm_(moment_tc.T, weight_tH)
            self.u_cH.mul_(scale_c[:, None]).addmm_(exp_tc.T, weight_tH)

    def finish(self) -> _Finished:
        """The statistics over the whole vocabulary, the target included."""
        centred_y_c = (self.target_c - self.highest_c).clamp(min=NEGLIGIBLE)
        exp_y_c = centred_y_c.exp()
        total_c = self.others_c + exp_y_c
        mean_c = (self.moment_c + exp_y_c * centred_y_c) / total_c
        return _Finished(
            logprob_c=-softplus(self.others_c.log() - (self.target_c - self.highest_c)),
            entropy_c=total_c.log() - mean_c,
            centred_y_c=centred_y_c,
            exp_y_c=exp_y_c,
            total_c=total_c,
            mean_c=mean_c,
        )


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of c tanh(z / c), computed from its value `capped`."""
    return 1 - (capped / softcap).square()


def _topk(centred_Kc: Tensor, total_c: Tensor) -> tuple[Tensor, Tensor]:
    """Renormalised entropy and mass of the K most likely tokens, from their centred logits."""
    centred_Kc = centred_Kc.clamp(min=NEGLIGIBLE)
    exp_Kc = centred_Kc.exp()
    sum_c = exp_Kc.sum(dim=0)
    return sum_c.log() - (exp_Kc * centred_Kc).sum(dim=0) / sum_c, sum_c / total_c
