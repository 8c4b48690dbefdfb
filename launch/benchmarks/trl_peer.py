"""TRL's GRPOTrainer as a peer of launch/benchmark.py, one optimizer step at a time.

`python -m launch.benchmarks.trl_peer JOB.json` (the fields of Job) prints JSON lines on stdout; what libraries print
goes to stderr. After set-up it prints {"ready": true, ...}. Each line `step` on stdin then runs one optimizer step,
from fetching its prompts to the optimizer, and prints one line; any other line or the end of input ends the process.
Between steps it is blocked on stdin, so that the other side of the benchmark can be timed alone.

TRL does the work of the method "grpo": it samples completions in one batch with the current policy, and makes one
update with Eq. 2 and the k3 KL to the model without its adapter. `grpo_config` has its settings and their reasons.
Completions end at an end-of-sequence token or at max_tokens: TRL's own sampler takes no stop strings.
"""

import importlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

from common.section import Section
from common.types import UserError


class Job(Section):
    """The JSON file; names and meanings are those of the options in common/config.py."""

    model_dir: Path
    task: str
    """Module of actor/tasks whose score(completion, answer)["total"] is the reward."""
    prompts: tuple[tuple[dict[str, str], ...], ...]
    answers: tuple[str, ...]
    """One for each prompt. Both are taken in this order, prompts_per_step per step, and again from the start."""
    group_size: int = 4
    prompts_per_step: int = 4
    max_tokens: int = 128
    fixed_length: bool = True
    temperature: float = 1.0
    beta: float = 0.04
    clip: float = 0.2
    learning_rate: float = 5e-6
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen weights and the activations."""
    seed: int = 123
    threads: int | None = None
    """Threads of torch on the CPU; None: as many as torch finds."""
    gpu_memory_fraction: float = 0.3
    overrides: dict[str, Any] | None = None
    """Fields of trl.GRPOConfig that override the choices of `grpo_config`."""


def grpo_config(job: Job, output_dir: str) -> trl.GRPOConfig:
    """TRL's settings for this job: the same work as ours, and otherwise TRL's fastest.

    TRL's defaults are kept for: one update per step, advantages scaled by group, gradient norm at most 1.
    """
    cuda = torch.cuda.is_available()
    min_tokens = "min_tokens" if cuda else "min_new_tokens"
    settings: dict[str, Any] = {
        # the work
        "model_init_kwargs": {"dtype": job.dtype},  # frozen weights as ours; TRL's default is float32
        "num_generations": job.group_size,
        # One group per micro-batch: the whole step at once took as long on 1 core, at 3 times the memory. Sampling is
        # one batch.
        "per_device_train_batch_size": job.group_size,
        "gradient_accumulation_steps": job.prompts_per_step,
        "max_completion_length": job.max_tokens,
        "generation_kwargs": {min_tokens: job.max_tokens} if job.fixed_length else None,
        "temperature": job.temperature,
        "loss_type": "grpo",  # the mean over a completion's tokens, then over completions: Eq. 2
        "epsilon": job.clip,
        "beta": job.beta,
        "use_bias_correction_kl": False,  # plain k3
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "shuffle_dataset": False,
        "seed": job.seed,
        "max_steps": 1_000_000,  # the other side ends the process
        # speed
        "bf16": job.dtype == "bfloat16",  # autocast: without it peft multiplies with the adapter in float32
        "gradient_checkpointing": False,  # TRL's default, True, repeats every layer's forward pass
        "use_cpu": not cuda,
        "use_vllm": cuda,  # colocated, which fails on a CPU: 'Parameter' object has no attribute 'weight_loader'
        "vllm_gpu_memory_utilization": job.gpu_memory_fraction,
        "vllm_importance_sampling_correction": False,  # True costs one extra forward pass, which ours does not make
        # silence
        "output_dir": output_dir,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return trl.GRPOConfig(**settings | (job.overrides or {}))


class TimedTrainer(trl.GRPOTrainer):
    """A GRPOTrainer that records each step: TRL reports its own timings only to W&B and MLflow."""

    generate_seconds = 0.0
    loss = 0.0
    lengths: tuple[int, ...] = ()

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)  # lists, so the device has finished
        self.generate_seconds += time.perf_counter() - start
        self.lengths += tuple(map(len, completion_ids))
        return completion_ids, logprobs

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.loss += loss.item()
        return loss

    def take_records(self) -> dict[str, float]:
        """What was recorded since the last call."""
        count = {"tokens": sum(self.lengths), "mean_length": sum(self.lengths) / len(self.lengths)}
        records = {"generate_seconds": self.generate_seconds, "loss": self.loss, **count}
        self.generate_seconds, self.loss, self.lengths = 0.0, 0.0, ()
        return records


class StepOnRequest(TrainerCallback):
    """Blocks the trainer from the end of a step until the next one is requested.

    It does not block where TRL's step begins, because a step's time must include the fetching of its prompts.
    """

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.trainer: Any = None  # set once the trainer exists

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        chosen = ("use_vllm", "bf16", "gradient_checkpointing", "per_device_train_batch_size", "generation_batch_size")
        self._send(ready=True, trl=trl.__version__, **{name: getattr(args, name) for name in chosen})
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        step_seconds = time.perf_counter() - self.started
        self._send(step_seconds=step_seconds, peak_bytes=peak_bytes(), **self.trainer.take_records())
        self._wait()

    def _send(self, **message: Any) -> None:
        print(json.dumps(message), file=self.protocol, flush=True)

    def _wait(self) -> None:
        """Wait for the request of a step; any other line and the end of input end the process."""
        if sys.stdin.readline().strip() != "step":
            raise SystemExit(0)
        self.started = time.perf_counter()


def peak_bytes() -> int:
    """Peak memory so far: torch's on the GPU, or the resident memory on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout is for the protocol alone: compiled libraries print to it too
    job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
    if len(job.prompts) < job.prompts_per_step:
        raise UserError(f"{len(job.prompts)} prompts do not fill prompts_per_step={job.prompts_per_step}; give more")
    if job.threads:
        torch.set_num_threads(job.threads)
    score = importlib.import_module(f"actor.tasks.{job.task}").score

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float | None]:
        return [score(c[0]["content"], a)["total"] for c, a in zip(completions, answer, strict=True)]

    rows = [{"prompt": list(p), "answer": a} for p, a in zip(job.prompts, job.answers, strict=True)]
    lora: dict[str, Any] = {"lora_r": job.lora_rank, "lora_alpha": job.lora_alpha, "lora_dropout": job.lora_dropout}
    adapter = trl.ModelConfig(use_peft=True, lora_target_modules=list(job.lora_targets), **lora)
    steps = StepOnRequest(protocol)
    with tempfile.TemporaryDirectory() as output_dir:
        steps.trainer = TimedTrainer(
            str(job.model_dir),
            reward,
            args=grpo_config(job, output_dir),
            train_dataset=Dataset.from_list(rows),
            peft_config=trl.get_peft_config(adapter),
            callbacks=[steps],
        )
        steps.trainer.train()


if __name__ == "__main__":
    main()
