"""The memory plan's choices: sets what a configuration leaves unset to what fits, or names a change that fits."""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedModel

from common.config import Config, options, value_of, with_values
from common.section import MACHINE, PLANNED
from common.types import UserError
from launch.planning import devices, memory
from launch.planning.devices import Gpu
from launch.planning.memory import GIB, Memory, Size, Work
from learner.objective import demands
from learner.policy.activations import Activations, measure

MODES = ("none", "layer", "micro-batch")  # learner.recompute, in the order of more activation checkpointing
GPU_TOKENS, CPU_TOKENS = 16384, 4096  # of the largest micro-batch: a larger one is no faster
SEQUENCES = (256, 128, 64, 32)  # concurrent sequences of an evaluation, where they fit
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them; the last on Arm
CPU_FRACTION = 0.5  # of the available memory: what the learner's activations may take
GPU = "run.gpu_memory_gib"
SHARE = "actor.gpu_memory_fraction"

UNSET = options(MACHINE, PLANNED)  # the options that the plan sets if they are unset, with their unset values


def resolve(
    config: Config, model: PreTrainedModel, *, longest_prompt_tokens: int, gpus: Sequence[Gpu] = ()
) -> tuple[Config, Memory | None]:
    """`config` with every unset option chosen, and the memory plan (None on a CPU).

    The plan is for a GPU of run.gpu_memory_gib, or for the smallest of `gpus`. `model` may be on the meta device.
    Raises UserError if the run does not fit.
    """
    gpu_bytes = None
    if config.run.gpu_memory_gib is not None:
        gpu_bytes = round(config.run.gpu_memory_gib * GIB)
    elif gpus:
        gpu_bytes = min(gpu.total_bytes for gpu in gpus)
    gpu = gpu_bytes is not None

    @cache
    def activations(lengths: tuple[int, ...], recompute: str) -> Activations:
        dropout = demands(config).dropout
        return measure(model.config, config.model, lengths=[lengths], recompute=recompute, gpu=gpu, dropout=dropout)

    config = with_values(config, {"model.dtype": dtype(config, gpus)[0]})
    size = Size.of(model, config.model)
    beside = min([config.learner.num_ranks, *(gpu.beside for gpu in gpus)])
    work = Work(size=size, longest_prompt_tokens=longest_prompt_tokens, ranks_beside=beside, activations=activations)
    if gpu_bytes is None:
        return on_cpu(config, work, psutil.virtual_memory().available // config.learner.num_ranks), None
    config = on_gpu(config, work, gpu_bytes)
    return config, memory.plan(config, work, gpu_bytes)


def dtype(config: Config, gpus: Sequence[Gpu] = ()) -> tuple[str, str]:
    """What model.dtype becomes, and why: the 16-bit type where the device computes in it, and float32 elsewhere.

    A CPU without such instructions takes ten times as long in bfloat16; a GPU below sm_80 has no bfloat16 units.
    """
    if config.model.dtype != "auto":
        return config.model.dtype, "as set"
    if gpu := devices.weakest(gpus):
        name = f"{gpu.name} is sm_{gpu.capability[0]}{gpu.capability[1]}"
        return (
            ("bfloat16", name) if gpu.capability >= (8, 0) else ("float32", f"{name}, and bfloat16 begins with sm_80")
        )
    if config.run.gpu_memory_gib is not None:
        return "bfloat16", "planned for a GPU, which is taken to be sm_80 or later"
    if found := sorted(BFLOAT16_FLAGS & cpu_flags()):
        return "bfloat16", f"the processor has {found[0]}"
    return "float32", f"the processor has none of {', '.join(sorted(BFLOAT16_FLAGS))}"


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets that Linux names for the first processor; none if there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (
            set(words.split())
            for key, _, words in (line.partition(":") for line in lines)
            if key.strip() in ("flags", "Features")
        ),
        set(),
    )


def on_cpu(config: Config, work: Work, available_bytes: int) -> Config:
    """`config` with the learner's unset options chosen: no activation checkpointing if the activations then fit."""
    tokens = config.learner.micro_batch_tokens or CPU_TOKENS
    config = with_values(config, {"learner.micro_batch_tokens": tokens})
    if config.learner.recompute != "auto":
        return config
    whole = with_values(config, {"learner.recompute": "none"})
    if memory.step_activations(whole, work).peak <= CPU_FRACTION * available_bytes:
        return whole
    return with_values(config, {"learner.recompute": _modes(config)[-1]})


def _modes(config: Config) -> tuple[str, ...]:
    """The values of learner.recompute to choose from. A whole micro-batch would keep all sharded layers gathered."""
    return MODES[:-1] if config.learner.shard else MODES


def on_gpu(config: Config, work: Work, gpu_bytes: int) -> Config:
    """`config` with every unset option chosen so that both sides fit, or a UserError that names a change that does."""
    chosen = _choose(config, work, gpu_bytes)
    if chosen is None:
        raise UserError(_refusal(config, work, gpu_bytes))
    return chosen


def _choose(config: Config, work: Work, gpu_bytes: int) -> Config | None:
    candidates = list(_learner_choices(config, work))
    idle = replace(work, activations=lambda *_: Activations(kept=0, peak=0))
    if not _fits(candidates[-1], idle, gpu_bytes):
        return None  # even without activations: no need to measure them
    for candidate in candidates:
        if _fits(candidate, work, gpu_bytes):
            return _with_share(candidate, work, gpu_bytes)
    return None


def _learner_choices(config: Config, work: Work) -> Iterator[Config]:
    """The learner's choices, fastest first."""
    learner = config.learner
    modes = _modes(config) if learner.recompute == "auto" else (learner.recompute,)
    all_tokens = [learner.micro_batch_tokens] if learner.micro_batch_tokens else _token_choices(config, work)
    for mode in modes:
        for tokens in all_tokens:
            yield with_values(config, {"learner.recompute": mode, "learner.micro_batch_tokens": tokens})


def _token_choices(config: Config, work: Work) -> list[int]:
    """Budgets of a micro-batch, down to one prompt with one rollout, which is never split."""
    min_tokens = work.longest_prompt_tokens + config.actor.max_tokens
    tokens = [GPU_TOKENS]
    while tokens[-1] > min_tokens:
        tokens.append(tokens[-1] // 2)
    return tokens


def _fits(config: Config, work: Work, gpu_bytes: int) -> bool:
    planned = memory.plan(config, work, gpu_bytes)
    share = config.actor.gpu_memory_fraction
    if share is not None and planned.total("actor") > share * gpu_bytes:
        return False
    return planned.total() <= planned.usable_bytes


def _with_share(config: Config, work: Work, gpu_bytes: int) -> Config:
    """The actor's unset options: as many concurrent sequences as fit, up to what an evaluation can use."""
    if config.actor.num_sequences is None:
        needed = memory.concurrent_rollouts(config)
        more = [number for number in SEQUENCES if number > needed and config.run.evaluate_every]
        candidates = (with_values(config, {"actor.num_sequences": number}) for number in (*more, needed))
        config = next(candidate for candidate in candidates if _fits(candidate, work, gpu_bytes))
    planned = memory.plan(config, work, gpu_bytes)
    share = math.ceil(planned.total("actor") / gpu_bytes * 1e4) / 1e4
    chosen = {"actor.kv_cache_gib": planned.of("actor", memory.KV_CACHE) / GIB, SHARE: share}
    return with_values(config, {name: value for name, value in chosen.items() if value_of(config, name) is None})


def _refusal(config: Config, work: Work, gpu_bytes: int) -> str:
    min_bytes = min(memory.plan(each, work, gpu_bytes).total() for each in _learner_choices(config, work))
    usable = gpu_bytes * (1 - memory.SPARE_FRACTION)
    return (
        f"the GPU's {gpu_bytes / GIB:.1f} GiB, of which {usable / GIB:.1f} can be planned, are too few for this run, "
        f"which takes at least {min_bytes / GIB:.1f}; {_remedy(config, work, gpu_bytes)}"
    )


def _remedy(config: Config, work: Work, gpu_bytes: int) -> str:
    """The first change with which the run fits; changes that cost only time come first."""

    def works(values: Mapping[str, Any]) -> bool:
        return _choose(with_values(config, values), work, gpu_bytes) is not None

    for values in _single_changes(config, work):
        if works(values):
            return _words(values)
    for scale in _scales(config):
        found = bisect.bisect_left(scale, True, key=works)
        if found < len(scale):
            return _words(scale[found])
    return _larger_gpu(config, work)


def _single_changes(config: Config, work: Work) -> Iterator[dict[str, Any]]:
    """Changes of options that the user set, which cost time at most."""
    if config.learner.recompute != "auto":
        yield from ({"learner.recompute": mode} for mode in MODES)
    if config.learner.micro_batch_tokens is not None:
        yield from ({"learner.micro_batch_tokens": tokens} for tokens in _token_choices(config, work))
    yield from ({name: unset} for name, unset in UNSET.items() if value_of(config, name) != unset)


def _scales(config: Config) -> Iterator[list[dict[str, Any]]]:
    """Changes that make it another run; each list goes from the smallest change to the largest."""
    yield [{"run.prompts_per_step": number} for number in range(config.run.prompts_per_step - 1, 0, -1)]
    shorter = [config.actor.max_tokens * eighths // 8 for eighths in range(7, 0, -1)]
    min_tokens = max(2, config.method.overlong_buffer)
    yield [{"actor.max_tokens": number} for number in shorter if number >= min_tokens]


def _larger_gpu(config: Config, work: Work) -> str:
    """The smallest GPU that fits, in whole GiB. A share set by the user would grow with the GPU, and is left out."""
    shareless = with_values(config, {SHARE: UNSET[SHARE]})
    min_bytes = min(memory.plan(each, work, 0).total() for each in _learner_choices(shareless, work))
    gib = math.ceil(min_bytes / (1 - memory.SPARE_FRACTION) / GIB)
    also = "" if value_of(config, SHARE) is None else f" and leave out {SHARE}"
    return f"use a GPU of {gib} GiB ({GPU}={gib}){also}"


def _words(values: Mapping[str, Any]) -> str:
    [(name, value)] = values.items()
    return f"leave out {name}" if value is None else f"set {name}={value}"
