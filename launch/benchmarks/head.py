"""The head's backends side by side: seconds, memory, and errors against float64.

    python launch/benchmark.py head [--rows 512] [--hidden 576] [--vocab 49152] [--repeats 5]

Runs the installed backends interleaved in one process, on the GPU if there is one; the first round warms up and is not
counted. "trl/float32" is TRL's head on inputs in float32, where it does not round. The logits are random, from flat to
near-certain distributions over the rows; the targets are drawn from these. Needs no Ray and no vLLM.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.types import UserError
from learner import head

CONTENDERS = ("torch", "triton", "trl", "liger", "trl/float32")
WHATS = ("forward", "both", "both_with_entropy")
PACKAGES = ("torch", "triton", "trl", "liger-kernel")
ORACLE_ROWS = 64  # rows per chunk of the float64 logits


class Problem(NamedTuple):
    """Inputs, and the exact results in float64."""

    hidden_NH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    temperature: float
    logprob_N: Tensor
    entropy_N: Tensor
    gradient_NH: Tensor  # d logprob / d hidden


def problem(rows: int, hidden: int, vocab: int, *, temperature: float, device: str) -> Problem:
    """Random logits, of inputs in bfloat16, whose standard deviation runs from 1 to 8 over the rows."""
    generator = torch.Generator(device).manual_seed(0)
    std_N1 = torch.linspace(0, 3, rows, device=device).exp2()[:, None]
    hidden_NH = (torch.randn(rows, hidden, generator=generator, device=device) * std_N1).bfloat16()
    weight_VH = (torch.randn(vocab, hidden, generator=generator, device=device) / hidden**0.5).bfloat16()
    weight64_VH = weight_VH.double()
    columns = []
    for hidden_cH in hidden_NH.split(ORACLE_ROWS):
        z_cV = hidden_cH.double() @ weight64_VH.T / temperature
        log_p_cV = z_cV.log_softmax(dim=1)
        p_cV = log_p_cV.exp()
        target_c1 = p_cV.multinomial(1, generator=generator)
        log_odds_c1 = z_cV.scatter(1, target_c1, -torch.inf).logsumexp(dim=1, keepdim=True) - z_cV.gather(1, target_c1)
        slope_cV = (-p_cV).scatter(1, target_c1, log_odds_c1.sigmoid())
        columns.append(
            (
                target_c1[:, 0],
                -torch.nn.functional.softplus(log_odds_c1[:, 0]),
                -(p_cV * log_p_cV).sum(dim=1),
                slope_cV @ weight64_VH / temperature,
            )
        )
    target_N, logprob_N, entropy_N, gradient_NH = map(torch.cat, zip(*columns, strict=True))
    return Problem(hidden_NH, weight_VH, target_N, temperature, logprob_N, entropy_N, gradient_NH)


class Contender:
    """A backend with the problem's inputs, or with the same values in another dtype."""

    def __init__(self, name: str, given: Problem) -> None:
        self.backend, _, dtype = name.partition("/")
        self.given = given
        self.hidden_NH, self.weight_VH = given.hidden_NH, given.weight_VH
        if dtype:
            self.hidden_NH, self.weight_VH = (t.to(getattr(torch, dtype)) for t in (self.hidden_NH, self.weight_VH))
        self.seconds: dict[str, list[float]] = {what: [] for what in WHATS}
        self.peak_bytes: dict[str, int] = {}

    def forward(self) -> head.HeadStats:
        with torch.no_grad():
            return self._stats(self.hidden_NH, entropy_gradient=False)

    def both(self) -> tuple[head.HeadStats, Tensor]:
        """Forward, and backward of the log-probability."""
        hidden_NH = self.hidden_NH.detach().requires_grad_()
        stats = self._stats(hidden_NH, entropy_gradient=False)
        stats.logprob_N.sum().backward()
        assert hidden_NH.grad is not None
        return stats, hidden_NH.grad

    def both_with_entropy(self) -> None:
        """Forward, and backward of log-probability and entropy."""
        stats = self._stats(self.hidden_NH.detach().requires_grad_(), entropy_gradient=True)
        (stats.logprob_N + stats.entropy_N).sum().backward()

    def _stats(self, hidden_NH: Tensor, *, entropy_gradient: bool) -> head.HeadStats:
        return head.head_stats(
            hidden_NH,
            self.weight_VH,
            self.given.target_N,
            temperature=self.given.temperature,
            entropy_gradient=entropy_gradient,
            backend=self.backend,
        )

    def errors(self) -> dict[str, float]:
        """Errors against float64 on the same values. The gradient's is relative, per row, and includes its rounding."""
        stats, gradient_NH = self.both()
        logprob_N = (stats.logprob_N - self.given.logprob_N).abs()
        entropy_N = (stats.entropy_N - self.given.entropy_N).abs()
        gradient_N = (gradient_NH.double() - self.given.gradient_NH).norm(dim=1) / self.given.gradient_NH.norm(dim=1)
        return {
            "logprob_rms": logprob_N.square().mean().sqrt().item(),
            "logprob_max": logprob_N.max().item(),
            "entropy_rms": entropy_N.square().mean().sqrt().item(),
            "entropy_max": entropy_N.max().item(),
            "gradient_median": gradient_N.median().item(),
        }


def timed(call: Callable[[], Any]) -> float:
    """Seconds of `call`, until the device has finished."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak memory of `call` beyond what is allocated before it: on the GPU, or else resident memory (Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def measure(given: Problem, names: Sequence[str], repeats: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Rounds of every contender, in alternating order; the first one warms up and measures the memory.

    Also returns the reasons of failed contenders: a peer's kernels may not support the device.
    """
    contenders, failed = {}, {}
    for name in names:
        contender = Contender(name, given)
        try:
            for what in WHATS:
                getattr(contender, what)()
                contender.peak_bytes[what] = peak_bytes(getattr(contender, what))
            contenders[name] = contender
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    calls = [(contender, what) for contender in contenders.values() for what in WHATS]
    for number in range(repeats):
        for contender, what in calls[:: -1 if number % 2 else 1]:
            contender.seconds[what].append(timed(getattr(contender, what)))
    return contenders, failed


def matrix_rate(given: Problem, repeats: int) -> float:
    """Operations per second of the bare matmul with float32 results, which an exact head needs."""
    hidden_NH, weight_VH = given.hidden_NH, given.weight_VH
    if hidden_NH.is_cuda:
        product = lambda: torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32)  # noqa: E731
    else:
        hidden32_NH, weight32_VH = hidden_NH.float(), weight_VH.float()
        logits_VN = torch.empty(len(weight32_VH), len(hidden32_NH))  # once: page faults cost as much as the matmul
        product = lambda: torch.mm(weight32_VH, hidden32_NH.T, out=logits_VN)  # noqa: E731
    product()
    seconds = statistics.median(timed(product) for _ in range(repeats))
    return 2 * len(hidden_NH) * weight_VH.numel() / seconds


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per contender: medians with their ranges, memory, and errors."""
    drawn = Table(title="forward, and forward with backward of the log-probability; errors against float64")
    for name in (
        "backend",
        "forward ms",
        "both ms",
        "/ roofline",
        "with entropy ms",
        "peak MB",
        "logprob RMS / max",
        "entropy RMS",
        "gradient",
    ):
        drawn.add_column(name, justify="left" if name == "backend" else "right")
    for row in rows:
        forward, both, with_entropy = (
            f"{1e3 * statistics.median(seconds):.4g} ({1e3 * min(seconds):.4g}-{1e3 * max(seconds):.4g})"
            for seconds in (row[f"{what}_seconds"] for what in WHATS)
        )
        drawn.add_row(
            row["backend"],
            forward,
            both,
            f"{row['both_over_roofline']:.2f}",
            with_entropy,
            f"{row['both_peak_bytes'] / 1e6:.0f}",
            f"{row['logprob_rms']:.1e} / {row['logprob_max']:.1e}",
            f"{row['entropy_rms']:.1e}",
            f"{row['gradient_median']:.1e}",
        )
    return drawn


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("rows", 512, "N, scored tokens"),
        ("hidden", 576, "H, width of the hidden states"),
        ("vocab", 49152, "V, tokens of the vocabulary"),
        ("repeats", 5, "counted rounds"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--backends", nargs="+", choices=CONTENDERS, help="default: all that can run here")
    return parser.parse_args(list(argv))


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    try:
        for name in ("rows", "hidden", "vocab", "repeats", "temperature"):
            if not getattr(arguments, name) > 0:
                raise UserError(f"--{name} {getattr(arguments, name)} measures nothing; give a positive number")
        names = arguments.backends or [n for n in CONTENDERS if head.missing(n.partition("/")[0]) is None]
        for name in names:
            if reason := head.missing(name.partition("/")[0]):
                raise UserError(f"--backends {name} {reason}; leave it out")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (arguments.rows, arguments.hidden, arguments.vocab)
    given = problem(*sizes, temperature=arguments.temperature, device=device)
    contenders, failed = measure(given, names, arguments.repeats)
    rate = matrix_rate(given, arguments.repeats)
    roofline_seconds = 4 * arguments.rows * arguments.hidden * arguments.vocab / rate
    rows = [
        {
            "backend": name,
            **{f"{what}_seconds": seconds for what, seconds in contender.seconds.items()},
            **{f"{what}_peak_bytes": peak for what, peak in contender.peak_bytes.items()},
            "both_over_roofline": statistics.median(contender.seconds["both"]) / roofline_seconds,
            **contender.errors(),
        }
        for name, contender in contenders.items()
    ]
    Console(width=170).print(table(rows))
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
        **vars(arguments),
        "failed": failed,
        "matrix_rate_flops": rate,
        "roofline_seconds": roofline_seconds,
        "measured": rows,
    }
    print(json.dumps(result))
    return 0
