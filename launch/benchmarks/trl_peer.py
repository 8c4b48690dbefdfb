"""TRL's GRPOTrainer as a peer of launch/benchmark.py, one optimizer step at a time.

`python -m launch.benchmarks.trl_peer JOB.json` (the fields of Job) prints JSON lines on stdout; what libraries print
goes to stderr. After set-up it prints {"ready": true}. Each line `step` on stdin then runs one optimizer step,
from fetching its prompts to the optimizer, and prints one line; any other line or the end of input ends the process.
Between steps it is blocked on stdin, so that the other side of the benchmark can be timed alone.

TRL does the work of the method "grpo": it samples completions in one batch with the current policy, and makes one
update with Eq. 2 and the k3 KL to the model without its adapter. `grpo_config` has its settings and their reasons.
Completions end at an end-of-sequence token or at max_tokens: TRL's own sampler takes no stop strings.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

from actor.tasks.composite_reward import score
from common.config import Config
from common.section import Section


class Job(Section):
    """The JSON file."""

    config: Config
    model_dir: Path
    prompts: tuple[tuple[dict[str, str], ...], ...]
    answers: tuple[str, ...]
    """One for each prompt. Both are taken in this order, prompts_per_step per step, and again from the start."""
    gpu_memory_fraction: float = 0.3


def grpo_config(job: Job, output_dir: str) -> trl.GRPOConfig:
    """TRL's settings for this job: the same work as ours, and otherwise TRL's fastest.

    TRL's defaults are kept for: one update per step, advantages scaled by group, gradient norm at most 1.
    """
    config = job.config
    cuda = torch.cuda.is_available()
    min_tokens = "min_tokens" if cuda else "min_new_tokens"
    settings: dict[str, Any] = {
        # the work
        "model_init_kwargs": {"dtype": config.model.dtype},  # frozen weights as ours; TRL's default is float32
        "num_generations": config.actor.group_size,
        # One group per micro-batch: the whole step at once took as long on 1 core, at 3 times the memory. Sampling is
        # one batch.
        "per_device_train_batch_size": config.actor.group_size,
        "gradient_accumulation_steps": config.run.prompts_per_step,
        "max_completion_length": config.actor.max_tokens,
        "generation_kwargs": {min_tokens: config.actor.max_tokens} if config.actor.fixed_length else None,
        "temperature": config.actor.temperature,
        "loss_type": "grpo",  # the mean over a completion's tokens, then over completions: Eq. 2
        "epsilon": config.method.clip_low,
        "beta": config.method.beta,
        "use_bias_correction_kl": False,  # plain k3
        "learning_rate": config.learner.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": config.learner.weight_decay,
        "shuffle_dataset": False,
        "seed": config.run.seed,
        "max_steps": 1_000_000,  # the other side ends the process
        # speed
        "bf16": config.model.dtype == "bfloat16",  # autocast: without it peft multiplies with the adapter in float32
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
    return trl.GRPOConfig(**settings)


class TimedTrainer(trl.GRPOTrainer):
    """A GRPOTrainer that records each step: TRL reports its own timings only to W&B and MLflow."""

    generate_seconds = 0.0
    tokens = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)  # lists, so the device has finished
        self.generate_seconds += time.perf_counter() - start
        self.tokens += sum(map(len, completion_ids))
        return completion_ids, logprobs

    def take_records(self) -> dict[str, float]:
        """What was recorded since the last call."""
        records = {"generate_seconds": self.generate_seconds, "tokens": self.tokens}
        self.generate_seconds, self.tokens = 0.0, 0
        return records


class StepOnRequest(TrainerCallback):
    """Blocks the trainer from the end of a step until the next one is requested.

    It does not block where TRL's step begins, because a step's time must include the fetching of its prompts.
    """

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.trainer: Any = None  # set once the trainer exists

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._send(ready=True)
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
    model = job.config.model

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float | None]:
        return [score(c[0]["content"], a)["total"] for c, a in zip(completions, answer, strict=True)]

    rows = [{"prompt": list(p), "answer": a} for p, a in zip(job.prompts, job.answers, strict=True)]
    adapter = trl.ModelConfig(
        use_peft=True,
        lora_r=model.lora_rank,
        lora_alpha=int(model.lora_alpha),
        lora_dropout=model.lora_dropout,
        lora_target_modules=list(model.lora_targets),
        use_rslora=model.lora_variant == "rslora",
    )
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
