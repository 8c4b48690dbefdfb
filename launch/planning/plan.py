"""The plan of a run: checks everything that can be checked before a process starts or a model is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from actor import rewards
from actor.rollout import prompt_tokens
from common.command_line import build, read
from common.config import Config, dump, options, value_of, with_values
from common.files import check_own, check_started_elsewhere
from common.section import COSMETIC, MACHINE, PLACEMENT, PLANNED
from common.types import UserError
from launch.planning import checks, curriculum, devices, memory_fit, model_folder, prompts
from launch.planning.curriculum import Curriculum
from launch.planning.devices import Gpu
from launch.planning.memory import GIB, Memory, Size
from launch.planning.prompts import Prompts, PromptStream
from launch.recording import trackers
from learner import checkpoint, head
from learner.objective import demands
from learner.policy.base import not_trained, targets, unsupported

# What transformers raises for a model's config.json that it does not know, or that contradicts itself.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, AssertionError, ImportError)

CANARY_TOKENS = 128  # at most; enough to average out the noise of bfloat16

OVERLAP_ON_A_GPU = (
    "run.max_staleness=1 on one GPU: the kernels of its two processes take turns unless MPS runs, so the gain may be "
    "small; not measured yet (launch/benchmarks/on_gpu.sh overlap)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run whose configuration has been checked and completed."""

    config: Config
    unfitted: Config  # before the options that depend on the device were set
    gpus: tuple[Gpu, ...]  # that the run is planned for; none on a CPU
    model_folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    canary_token_ids: np.ndarray  # int32 [T]: the start of the first prompt
    resume_from: Path | None  # a checkpoint
    num_adapter_parameters: int
    dtype_reason: str  # why model.dtype is what it is
    memory: Memory | None  # None on a CPU

    def refuse_absent_gpu(self) -> None:
        """Raise UserError if the plan is for a GPU and there is none: its choices do not suit a CPU."""
        if self.memory is not None and not self.gpus:
            raise UserError(
                f"run.gpu_memory_gib={self.config.run.gpu_memory_gib} plans for a GPU, and there is none; leave it "
                "out, or only print the plan with launch/run.py --dry-run"
            )

    def warnings(self) -> list[str]:
        """Warnings of the configuration, and those that depend on the device."""
        overlaps = self.config.run.max_staleness and self.memory is not None
        return warnings(self.config) + self.prompts.remarks() + ([OVERLAP_ON_A_GPU] if overlaps else [])

    def describe(self) -> str:
        """What --dry-run prints: the resolved configuration and the sizes that follow from it."""
        step = self.config.run.prompts_per_step * self.config.actor.group_size
        return (
            f"{dump(self.config)}\n"
            f"# {self.prompts.describe()}; {step} rollouts per step, at most "
            f"{step * self.config.actor.max_tokens} completion tokens\n"
            f"# adapter: {self.num_adapter_parameters / 1e6:.2f} M parameters, "
            f"{self.num_adapter_parameters * 4 / 1e6:.1f} MB in float32 per version\n"
            f"# model.dtype={self.config.model.dtype}: {self.dtype_reason}"
            + ("" if self.memory is None else "\n# " + self.memory.table().replace("\n", "\n# "))
            + "".join(f"\n# warning: {warning}" for warning in self.warnings())
        )

    def stream(self, cursor: int = 0) -> PromptStream:
        """The training prompts from position `cursor` on."""
        train, left_out, seed = self.prompts.train, self.prompts.left_out, self.config.run.seed
        shares = self.config.task.curriculum
        if shares is None:
            return PromptStream(train, seed=seed, cursor=cursor, left_out=left_out)
        state = curriculum.saved(self.resume_from, len(train)) if self.resume_from else None
        return Curriculum(train, seed=seed, shares=shares, cursor=cursor, left_out=left_out, state=state)


def make(config: Config, *, trains: bool = True, saved: Path | None = None, sets_alone: bool = False) -> Plan:
    """Check `config` against the machine, the run folder, the data and the model's own configuration.

    A plan that does not train, for an evaluation of the checkpoint `saved` or of the base model (None), has no run
    folder; with `sets_alone` only the problems of evaluation.sets are loaded. Raises UserError for whatever is invalid.
    The plan is for the GPUs of this machine; `fitted` makes one for others.
    """
    for problem in machine_problems(config):
        raise UserError(problem)
    config = with_resume(with_importance(config))
    if reason := head.missing(config.learner.head_backend):
        raise UserError(f"learner.head_backend={config.learner.head_backend} {reason}; use auto")
    if trains and (reason := trackers.missing(config.run.tracker)):
        raise UserError(reason)
    check_started_elsewhere()
    resume_from = run_folder(config) if trains else saved
    config = _with_planned_options(config)
    train, evaluation = prompts.load(config, sets_alone=sets_alone)
    first = next(each[0] for each in (train, *evaluation.values()) if each)
    folder = model_folder.resolve(config.model.path)
    model = check_model(config, folder)  # before the prompts, which take longer
    config = with_values(config, {"model.lora_targets": targets(model, config.model)})
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if trains:
        prompts.check_opening(config, tokenizer)
    checked = prompts.check(train, evaluation, config, tokenizer)
    rewards.check(config, first)
    canary = prompt_tokens(tokenizer, first)[: min(CANARY_TOKENS, config.model.max_length - 1)]
    made = Plan(
        config=config,
        unfitted=config,
        gpus=(),
        model_folder=folder.resolve(),
        tokenizer=tokenizer,
        prompts=checked,
        canary_token_ids=np.array(canary, dtype=np.int32),
        resume_from=resume_from,
        num_adapter_parameters=Size.of(model, config.model).num_adapter_parameters,
        dtype_reason="",
        memory=None,
    )
    return fitted(made, devices.here())


def fitted(plan: Plan, gpus: Sequence[Gpu]) -> Plan:
    """The same plan with the options that depend on the device set for these GPUs, or for a CPU if there are none."""
    config = plan.unfitted
    _, reason = memory_fit.dtype(config, gpus)
    model = check_model(config, plan.model_folder)
    config, memory = memory_fit.resolve(config, model, longest_prompt_tokens=plan.prompts.longest_tokens, gpus=gpus)
    return replace(plan, config=config, gpus=tuple(gpus), memory=memory, dtype_reason=reason)


def machine_problems(config: Config) -> Iterator[str]:
    """What would otherwise fail on this machine only after minutes, or leave a run waiting: a line for each."""
    with catch_warnings(action="ignore"):  # torch's own warning about an old driver
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    torch_here = checks.Torch(version=torch.__version__, cuda=torch.version.cuda, num_gpus=num_gpus)
    planned = config.run.gpu_memory_gib
    yield from checks.problems(checks.here(), torch_here, None if planned is None else round(planned * GIB))


def with_importance(config: Config) -> Config:
    """`config` with method.importance=auto resolved: truncated importance weights if rollouts may be stale."""
    if config.method.importance != "auto":
        return config
    return with_values(config, {"method.importance": "token-truncate" if config.run.max_staleness else "none"})


def with_resume(config: Config) -> Config:
    """`config` with run.resume=auto resolved: resume if the folder has a run."""
    if config.run.resume != "auto":
        return config
    return with_values(config, {"run.resume": (config.run.dir / "config.toml").is_file()})


def warnings(config: Config) -> list[str]:
    """A line for each option that is allowed but has no effect, or none of the one that its name suggests."""
    method, learner = config.method, config.learner
    found = []
    if learner.num_ranks > learner.gradient_accumulation:
        found.append(
            f"learner.gradient_accumulation={learner.gradient_accumulation} is below "
            f"learner.num_ranks={learner.num_ranks}: an update may have fewer micro-batches than ranks"
        )
    if learner.num_ranks * learner.mini_batches > config.run.prompts_per_step and learner.num_ranks > 1:
        found.append(
            f"learner.mini_batches={learner.mini_batches} of run.prompts_per_step={config.run.prompts_per_step} may "
            f"have fewer micro-batches than learner.num_ranks={learner.num_ranks}"
        )
    if method.kl == "none" and method.beta > 0:
        found.append(f"method.beta={method.beta} has no effect with kl=none; set method.kl=k3")
    if method.alpha_end != "alpha" and method.token_weight != "horizon":
        found.append(f"method.alpha_end={method.alpha_end} has no effect with token_weight={method.token_weight}")
    if method.ratio != "token" and learner.inner_updates == learner.mini_batches == 1:
        found.append(
            f"ratio={method.ratio} is 1 with one update a step: neither clip nor power has an effect without "
            "learner.mini_batches or learner.inner_updates"
        )
    if config.run.max_staleness and method.importance == "none":
        found.append(f"run.max_staleness={config.run.max_staleness} without method.importance: nothing corrects for it")
    if config.model.lora_dropout > 0 and not demands(config).dropout:
        found.append(
            f"model.lora_dropout={config.model.lora_dropout} is off in every pass of this method, which compares the "
            "policy with the base model"
        )
    return found


def _with_planned_options(config: Config) -> Config:
    """`config`, with unset options of the plan as in the run that it resumes."""
    written = config.run.dir / "config.toml"
    if not config.run.resume or not written.is_file():
        return config
    began = _began_with(config)
    kept = {name: default for name, default in options(PLANNED).items() if name not in _planned_anew(began, config)}
    unset = [name for name, default in kept.items() if value_of(config, name) == default]
    return with_values(config, {name: value_of(began, name) for name in unset})


def _planned_anew(began: Config, config: Config) -> dict[str, Any]:
    """The options that fit a step to a machine, for a run that is resumed on other devices; none on the same."""
    moved = any(value_of(began, name) != value_of(config, name) for name in options(PLACEMENT))
    return options(MACHINE) if moved else {}


def _began_with(config: Config) -> Config:
    """The configuration with which the run in run.dir began."""
    try:
        return with_importance(build(read(config.run.dir / "config.toml")))
    except UserError as error:
        raise UserError(f"run.dir={config.run.dir} cannot resume: {error}; start in another folder") from None


def run_folder(config: Config) -> Path | None:
    """The checkpoint to resume from, the newest that is whole; None without one. Refuses to write over another run."""
    folder, written = config.run.dir, config.run.dir / "config.toml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir={folder} is not a directory; name another")
    if not config.run.resume:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"run.dir={folder} is not empty; name another folder, or add --run.resume to resume it")
        return None
    if not written.exists():
        raise UserError(f"run.dir={folder} has no run to resume; leave out --run.resume to start one")
    check_own(folder)
    began, config = _began_with(config), _with_planned_options(config)
    free = options(COSMETIC) | options(PLACEMENT) | _planned_anew(began, config)
    for name in [name for name in options() if name not in free]:
        before, now = value_of(began, name), value_of(config, name)
        if before != now:
            raise UserError(f"{name}={now} differs from {before} of the run in {folder}; resume with equal options")
    return checkpoint.latest(folder / "checkpoints")


def check_model(config: Config, folder: Path) -> PreTrainedModel:
    """Check the target modules and the length against the model; returns it without weights."""
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # None would ask the terminal
        if reason := not_trained(model_config):
            raise UserError(f"model.path={config.model.path} {reason}; use another model")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"model.path={config.model.path} is not a causal language model: {str(error).strip().splitlines()[0]}"
        ) from None
    if reason := unsupported(model, config.model.max_length):
        raise UserError(f"model.path={config.model.path} {reason}; use another model")
    heads = model_config.get_text_config().num_attention_heads
    if heads % config.actor.tensor_parallel:
        raise UserError(
            f"actor.tensor_parallel={config.actor.tensor_parallel} does not divide the model's {heads} attention "
            "heads; choose one that does"
        )
    softcap = getattr(model_config.get_text_config(), "final_logit_softcapping", None)
    if config.learner.head_backend == "liger" and (softcap or model.get_output_embeddings().bias is not None):
        raise UserError("learner.head_backend=liger has neither the model's softcap nor its bias; use auto")
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions and config.model.max_length > positions:
        raise UserError(f"model.max_length={config.model.max_length} exceeds the model's {positions}; lower it")
    return model
