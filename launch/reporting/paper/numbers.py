"""The numbers of the paper (arXiv 2606.05434), and remarks on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

NUM_PROBLEMS = 500  # of its evaluations; its ± are 1.96 sqrt(p (1 - p) / 500)
STEPS = (30, 60, 90, 120, 150, 180)  # its evaluated checkpoints

# Remarks on single numbers, by key: the tables mark the numbers, the report prints the remarks in this order.
FOOTNOTES: Mapping[str, str] = {
    "token-mean": "α = 0 in the paper's Eq. 6 and 9 is a mean over tokens, not Eq. 2, which is a mean of each "
    "sequence's mean. A fair baseline keeps one reduction: sa-ah-grpo with alpha 0. Eq. 2 is the method grpo.",
    "denominator": "The denominator Σ w̃ of Eq. 9 also scales the tokens of positive rollouts up (×1.081 for two "
    "rollouts of 3 tokens, one positive, H̃ .1, .2, .3, α .5): SA-AH-GRPO does not leave them unchanged.",
    "repeated": "The paper's 1.5B rows of GRPO and AH-GRPO have exactly the variance and the KL of its 3B rows.",
    "one-seed": "The paper's 3.6× comes from one seed (123), without an interval, and compares 180 steps of SA-AH-GRPO "
    "with 150 of the others: the second halves are not the same steps.",
    "final-claim": "The paper's section 1 claims the highest final Pass@1 for SA-AH-GRPO; its table has .846 = .846 "
    "(GRPO) < .848 (AH-GRPO) at 3B.",
    "half-width": "The paper prints .848 ± .032; its formula gives .03147, so ± .031. Of .831 it should be ± .033.",
    "quarters": "f₋ is always a multiple of 1/4, as of one group of 4 and not of a step's 16 rollouts. The paper's "
    "text lets it be 1, which advantages that are centred within their groups cannot reach.",
    "constant": "f₋ = 0 with a reward standard deviation of .602 would need every group to be constant.",
    "share": "The mean weights of this row need the negative rollouts to be 1.6 % of the tokens, at f₋ .25.",
    "base": "The paper lowers its measured base by 1.5 points (.846 → .831 for 3B, .652 → .637 for 1.5B). Against the "
    "measured base the gain at 3B is 0.",
    "partial": "The paper calls its run at α 0.25 partial (steps 30 and 60 only) and yet prints five checkpoints.",
    "peak-order": "The paper's text says that α 0.10 has the highest peak (.670); its own table has .676 at α 0.25 "
    "and 0.50.",
    "std": "The paper's text says that the standard deviation stays below 0.25 later in training; this row has .488.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row of Table 2, with its row of Tables 3 to 5."""

    method: str  # "Base (zero-shot)", "GRPO", "AH-GRPO", "SA-AH-GRPO"
    alpha: float | None = None
    steps: int | None = None
    final: float
    peak: float | None = None
    variance: float | None = None
    kl: float | None = None
    pass_at_1: tuple[float, ...] = ()  # at STEPS
    notes: Mapping[str, str] = field(default_factory=dict)  # column ("final", "variance" ...) -> key of FOOTNOTES


def _base(final: float) -> Result:
    return Result(method="Base (zero-shot)", final=final, notes={"final": "base"})


def _row(method: str, alpha: float, curve: tuple[float, ...], variance: float, kl: float, /, **notes: str) -> Result:
    return Result(
        method=method,
        alpha=alpha,
        steps=STEPS[len(curve) - 1],
        final=curve[-1],
        peak=max(curve),
        variance=variance,
        kl=kl,
        pass_at_1=curve,
        notes=notes,
    )


REPEATED = {"variance": "repeated", "kl": "repeated"}

# Tables 2, 3 and 4.
RESULTS: Mapping[str, tuple[Result, ...]] = {
    "Qwen2.5-3B": (
        _base(0.831),
        _row("GRPO", 0.0, (0.852, 0.840, 0.844, 0.848, 0.846), 0.0885, 0.00537, method="token-mean"),
        _row("AH-GRPO", 0.5, (0.860, 0.862, 0.846, 0.844, 0.848), 0.0630, 0.00512, final="half-width"),
        _row(
            *("SA-AH-GRPO", 0.5, (0.858, 0.844, 0.858, 0.854, 0.854, 0.846), 0.0246, 0.00785),
            method="denominator",
            final="final-claim",
            variance="one-seed",
        ),
    ),
    "Qwen2.5-1.5B": (
        _base(0.637),
        _row("GRPO", 0.0, (0.656, 0.666, 0.650, 0.668, 0.660), 0.0885, 0.00537, method="token-mean", **REPEATED),
        _row("AH-GRPO", 0.5, (0.654, 0.676, 0.674, 0.660, 0.650), 0.0630, 0.00512, **REPEATED),
        _row(
            *("SA-AH-GRPO", 0.5, (0.648, 0.644, 0.664, 0.682, 0.670, 0.686), 0.1718, 0.00986),
            method="denominator",
        ),
    ),
}

# Table 5: alpha -> Pass@1 at 30 .. 150 steps, AH-GRPO on Qwen2.5-1.5B, and the notes of its row.
ABLATION: Mapping[float, tuple[float, ...]] = {
    -0.25: (0.648, 0.632, 0.630, 0.650, 0.634),
    0.0: (0.656, 0.666, 0.650, 0.668, 0.660),
    0.1: (0.670, 0.658, 0.664, 0.664, 0.640),
    0.25: (0.676, 0.654, 0.650, 0.648, 0.654),
    0.5: (0.654, 0.676, 0.674, 0.660, 0.650),
}
ABLATION_SELECTIVE = RESULTS["Qwen2.5-1.5B"][3]  # its last row: SA-AH-GRPO, whose peak and final are those at 180 steps
ABLATION_NOTES: Mapping[float, str] = {0.0: "token-mean", 0.1: "peak-order", 0.25: "partial"}

# Tables 6 and 7: step, Pass@1, reward mean, reward std, KL, entropy, weight, weight on negative, fraction, length.
DIAGNOSTICS: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "Qwen2.5-3B": (
        (5, np.nan, 6.815, 0.809, 0.00373, 0.0291, 0.516, 0.174, 0.50, 243),
        (30, 0.858, 6.933, 0.602, 0.00396, 0.0232, 1.000, 0.000, 0.00, 213),
        (60, 0.844, 7.202, 0.115, 0.00821, 0.0114, 1.000, 0.000, 0.00, 242),
        (90, 0.858, 6.782, 0.163, 0.00472, 0.0246, 1.000, 0.000, 0.00, 250),
        (120, 0.854, 7.040, 0.488, 0.00542, 0.0085, 0.891, 0.584, 0.25, 212),
        (150, 0.854, 6.820, 0.197, 0.02236, 0.0111, 0.912, 0.609, 0.25, 224),
        (180, 0.846, 7.085, 0.240, 0.00894, 0.0092, 0.805, 0.619, 0.50, 171),
    ),
    "Qwen2.5-1.5B": (
        (5, np.nan, 2.980, 2.000, 0.00494, 0.0432, 0.580, 0.143, 0.50, 151),
        (30, 0.648, 3.767, 2.090, 0.00374, 0.0307, 0.997, 0.810, 0.25, 131),
        (60, 0.644, 5.757, 1.411, 0.00413, 0.0195, 0.618, 0.462, 0.75, 186),
        (90, 0.664, 5.505, 1.529, 0.00756, 0.0344, 0.636, 0.169, 0.50, 205),
        (120, 0.682, 6.350, 1.571, 0.00703, 0.0153, 0.677, 0.439, 0.50, 156),
        (150, 0.670, 6.125, 1.040, 0.00949, 0.0211, 0.668, 0.174, 0.25, 181),
        (180, 0.686, 7.205, 0.255, 0.01630, 0.0246, 0.593, 0.340, 0.50, 142),
    ),
}
DIAGNOSTIC_METRICS = (
    "reward/mean",
    "reward/std",
    "kl/mean",
    "entropy/normalized_mean",
    "weight/mean",
    "weight/negative_mean",
    "advantage/negative_fraction",
    "completion/length_mean",
)
DIAGNOSTIC_NOTES: Mapping[tuple[str, float], str] = {
    ("Qwen2.5-3B", 5): "quarters",
    ("Qwen2.5-3B", 30): "constant",
    ("Qwen2.5-3B", 120): "std",
    ("Qwen2.5-1.5B", 5): "quarters",
    ("Qwen2.5-1.5B", 30): "share",
}
