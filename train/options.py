"""The options of every subcommand: flat dataclasses, which tyro turns into a command line.

`--preset` fills in what the command line leaves out. `check_options` refuses what makes no sense before anything is
read, compiled or written; the checks that need the model, the data or the devices follow in `train.run`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from zamba2_jax.layer_stack import CHECKPOINT_POLICIES
from zamba2_jax.quantization import BITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The devices, and the processes of a job of several hosts."""

    mesh: str = "auto"
    """Devices by axis, such as "data=2,fsdp=4" (axes: data, fsdp, tensor, sequence); auto puts all on fsdp."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0. On TPU pods and under SLURM leave it out: it is found."""
    num_processes: int | None = None
    """Processes of the job; together with --coordinator-address."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    join_timeout: int = 300
    """Seconds to wait for every process to join before giving up with a message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model computes."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of computation. Trained parameters and the optimiser's state are float32 always."""
    seed: int = 0
    """Of initial weights, the order of the data, and dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The optimiser and the step; all that `train.step` needs to know."""

    steps: int
    """Updates to make in all. Larger than before: the run goes on."""
    batch_size: int = 8
    """Rows per step over all devices."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other: less memory, the same loss and gradient."""
    learning_rate: float = 3e-4
    """The highest."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: half a cosine, or constant and then linear down (warmup, stable, decay)."""
    warmup_steps: int | None = None
    """Steps of linear warmup; default: a twentieth of --steps, at most 1000."""
    decay_steps: int | None = None
    """Steps of the decay that ends wsd; default: a fifth of --steps."""
    min_learning_rate_ratio: float = 0.1
    """The last learning rate over the highest."""
    weight_decay: float = 0.1
    """Of matrices; A_log, D, dt_bias, norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the root of that mean."""
    max_grad_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it; 0: never."""

    @property
    def resolved_warmup_steps(self) -> int:
        return min(1000, self.steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def resolved_decay_steps(self) -> int:
        return self.steps // 5 if self.decay_steps is None else self.decay_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(StepOptions, ModelOptions, ProcessOptions):
    """A training run: where it is written, what is seen of it, what it costs."""

    output: Path
    """The run's directory. The same command with the same output resumes."""
    gradient_checkpointing: Literal["none", "layer", "attention", "projections"] = "none"
    """What the backward pass recomputes to save memory: nothing, all but each layer's input, all but that and
    attention, or all but those and wide products."""
    scan_layers: bool = False
    """Compile one body for all equal layers: faster to compile, more memory."""
    attention_dropout: float | None = None
    """Probability that an attention weight is dropped in training; default: the model's config."""
    max_bad_steps: int = 10
    """Stop after so many steps in a row whose loss or gradient was not finite; their updates are skipped."""

    save_every: int = 500
    """Steps between checkpoints; the last step is saved always."""
    keep_last: int = 2
    """How many of the latest checkpoints to keep."""
    keep_best: int = 0
    """How many to keep beside them for their evaluation loss, or training loss without --eval-data."""
    eval_data: tuple[str, ...] = ()
    """Held-out data, in the forms of --data."""
    eval_every: int | None = None
    """Steps between evaluations; default: --save-every."""
    eval_batches: int | None = None
    """Batches of an evaluation; default: all of --eval-data."""

    log_every: int = 10
    """Steps between lines on the screen where there is no progress bar."""
    progress: bool | None = None
    """A progress bar; default: where stderr is a terminal."""
    tensorboard: bool = True
    """Write OUTPUT/tensorboard."""
    profile_steps: int = 0
    """Trace so many steps with the profiler, from the fifth one on, into OUTPUT/profile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Text written by the model while it is trained."""

    sample_every: int = 0
    """Steps between samples; 0: none. They are written to OUTPUT/samples.jsonl and shown."""
    sample_prompts: tuple[str, ...] = ("",)
    """What they continue; "" stands for the beginning of a text."""
    sample_tokens: int = 64
    """Their length."""
    sample_temperature: float = 0.0
    """Above 0, tokens are drawn at random; at 0 the likeliest is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adaptation instead of training all parameters."""

    lora_rank: int = 0
    """Rank of the added products; 0 trains all parameters."""
    lora_alpha: float | None = None
    """The products are scaled by alpha / rank; default: twice the rank."""
    lora_dropout: float = 0.0
    """Probability that an element of a product's input is dropped in training."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get one, such as in_proj q_proj; default: all matrices but embedding and head."""
    lora_shared: Literal["use", "block"] = "block"
    """On shared blocks: one per block for all its uses, or one per use."""
    quantize: Literal["int8", "int4"] | None = None
    """Keep the matrices of the frozen model as integers: half or a third of their memory, at a loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Text to train on."""

    data: tuple[str, ...]
    """Files or directories: text, JSONL, Parquet, a saved Hugging Face dataset, or ArrayRecord of `tokenize`. Several
    are mixed by size, or by weights: PATH=0.7."""
    text_field: str = "text"
    """Where a record has its text."""
    data_format: Literal["text", "chat", "completion"] | None = None
    """Plain text; conversations (`messages` or `conversations`), of which the assistant's tokens count; or `prompt` and
    `completion`. Default: by the fields that there are."""
    pack: bool = True
    """Several documents to a row; none sees another."""
    tokenizer: str | None = None
    """A directory or hub id; default: the model's."""
    seq_len: int = 1024
    """Tokens per row."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser of the scores; 1e-4 is usual where scores drift, 0 is none."""
    data_cache: Path | None = None
    """Where tokenised data is kept; default: zamba2_jax/data in the user's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(SampleOptions, TextOptions, RunOptions):
    """Trains a model from random weights.

    python -m train pretrain --model 1.2b --tokenizer Zyphra/Zamba2-1.2B --data text.jsonl --steps 10000 --output run
    """

    command: ClassVar[str] = "pretrain"
    model: str
    """A published shape (1.2b, 2.7b, 7b), a config.json, or a directory that holds one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(LoraOptions, SampleOptions, TextOptions, RunOptions):
    """Trains a checkpoint further, all of it or a LoRA, on text or conversations.

    python -m train finetune --model Zyphra/Zamba2-1.2B --data chats.jsonl --steps 500 --lora-rank 8 --output run
    """

    command: ClassVar[str] = "finetune"
    model: str
    """A checkpoint: what `from_pretrained` accepts, or a run's directory."""
    learning_rate: float = 2e-5
    """The highest."""
    weight_decay: float = 0.0
    """Of matrices; A_log, D, dt_bias, norms and biases have none."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptions(LoraOptions, RunOptions):
    """Trains a checkpoint to classify texts, and reports accuracy and F1, or the squared error: of --eval-data, or at
    the end of the training data.

    python -m train classify --model Zyphra/Zamba2-1.2B --data train.jsonl --eval-data test.jsonl --steps 500 --output
    run
    """

    command: ClassVar[str] = "classify"
    model: str
    """A checkpoint: what `from_pretrained` accepts, or a run's directory."""
    data: tuple[str, ...]
    """JSONL files of {"text": ..., "label": ...}; label is a name or number, a list of them, or a float."""
    tokenizer: str | None = None
    """A directory or hub id; default: the model's."""
    seq_len: int = 512
    """Tokens per row; longer texts lose their end."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """Default: multi-label for lists, regression for floats, else single-label."""
    num_labels: int | None = None
    """Default: what --data holds."""
    learning_rate: float = 2e-5
    """The highest."""
    weight_decay: float = 0.0
    """Of matrices; A_log, D, dt_bias, norms and biases have none."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions, ProcessOptions):
    """Loss and perplexity of a checkpoint on text.

    python -m train eval --model run --data heldout.jsonl
    """

    command: ClassVar[str] = "eval"
    model: str
    """A checkpoint: what `from_pretrained` accepts, or a run's directory."""
    data: tuple[str, ...]
    """Files or directories, in the forms of pretrain's --data."""
    text_field: str = "text"
    """Where a record has its text."""
    data_format: Literal["text", "chat", "completion"] | None = None
    """As for finetune; default: by the fields that there are."""
    tokenizer: str | None = None
    """A directory or hub id; default: the model's."""
    batch_size: int = 8
    """Rows per step over all devices."""
    seq_len: int = 1024
    """Tokens per row."""
    eval_batches: int | None = None
    """Batches to take; default: all."""
    data_cache: Path | None = None
    """Where tokenised data is kept; default: zamba2_jax/data in the user's cache."""
    output: Path | None = None
    """A file to write the result to, as JSON."""


Options = PretrainOptions | FinetuneOptions | ClassifyOptions | EvalOptions

_POSITIVE = (
    "steps",
    "batch_size",
    "accumulate",
    "seq_len",
    "learning_rate",
    "max_bad_steps",
    "save_every",
    "keep_last",
    "eval_every",
    "eval_batches",
    "log_every",
    "join_timeout",
    "num_processes",
    "sample_tokens",
    "lora_alpha",
    "num_labels",
    "adam_epsilon",
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "decay_steps",
    "weight_decay",
    "max_grad_norm",
    "keep_best",
    "profile_steps",
    "sample_every",
    "sample_temperature",
    "lora_rank",
    "z_loss",
    "process_id",
    "seed",
)
_BELOW_ONE = ("adam_beta1", "adam_beta2", "attention_dropout", "lora_dropout")


def check_options(options: Any) -> None:
    """Refuses options that make no sense by themselves or beside each other.

    Raises:
        ValueError: with every fault, each by the option's name on the command line.
    """
    faults = []

    def value(name: str) -> Any:
        return getattr(options, name, None)

    def given(names: tuple[str, ...]) -> list[tuple[str, Any]]:
        return [(name, value(name)) for name in names if value(name) is not None]

    def require(good: bool, message: str) -> None:
        if not good:
            faults.append(message)

    for name, number in given(_POSITIVE):
        require(0 < number < math.inf, f"{flag(name)} must be positive, got {number}")
    for name, number in given(_NOT_NEGATIVE):
        require(0 <= number < math.inf, f"{flag(name)} must be 0 or positive, got {number}")
    for name, number in given(_BELOW_ONE):
        require(0 <= number < 1, f"{flag(name)} must be at least 0 and below 1, got {number}")
    if value("data") is not None:
        require(len(options.data) > 0, "--data needs at least one file")

    together = [name for name in ("coordinator_address", "num_processes", "process_id") if value(name) is not None]
    require(
        len(together) in (0, 3),
        "--coordinator-address, --num-processes and --process-id belong together; "
        f"given: {', '.join(map(flag, together))}",
    )
    if len(together) == 3:
        require(
            options.process_id < options.num_processes,
            f"--process-id {options.process_id} must be below --num-processes {options.num_processes}",
        )

    if isinstance(options, StepOptions) and not faults:
        faults += _faults_of_step(options)
    if isinstance(options, LoraOptions) and not faults:
        faults += _faults_of_lora(options)
    if isinstance(options, RunOptions) and not faults:
        faults += _faults_of_run(options)
    if faults:
        raise ValueError("; ".join(faults) + ".")


def _faults_of_step(options: StepOptions) -> list[str]:
    faults = []
    if options.batch_size % options.accumulate:
        faults.append(f"--accumulate {options.accumulate} must divide --batch-size {options.batch_size}")
    if options.schedule != "wsd" and options.decay_steps is not None:
        faults.append(f"--decay-steps belongs to --schedule wsd, not {options.schedule}")
    decay = options.resolved_decay_steps if options.schedule == "wsd" else 0
    if options.resolved_warmup_steps + decay > options.steps:
        named = "--warmup-steps" if decay == 0 else "--warmup-steps and --decay-steps"
        faults.append(f"{named} take {options.resolved_warmup_steps + decay} steps, more than --steps {options.steps}")
    if not 0 <= options.min_learning_rate_ratio <= 1:
        faults.append(f"--min-learning-rate-ratio must be from 0 to 1, got {options.min_learning_rate_ratio}")
    return faults


def _faults_of_lora(options: LoraOptions) -> list[str]:
    faults = []
    if options.quantize not in (None, *BITS):  # of a preset: the command line knows the names
        faults.append(f"--quantize must be {' or '.join(BITS)}, got {options.quantize}")
    if options.lora_rank:
        return faults
    defaults = {field.name: field.default for field in dataclasses.fields(LoraOptions)}
    for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_shared"):
        if getattr(options, name) != defaults[name]:
            faults.append(f"{flag(name)} needs --lora-rank")
    if options.quantize is not None:
        faults.append(
            f"--quantize {options.quantize} needs --lora-rank: integers are not trained, a LoRA beside them is"
        )
    return faults


def _faults_of_run(options: RunOptions) -> list[str]:
    faults = []
    if options.gradient_checkpointing not in CHECKPOINT_POLICIES:  # of a preset: the command line knows the names
        names = ", ".join(CHECKPOINT_POLICIES)
        faults.append(f"--gradient-checkpointing must be one of {names}, got {options.gradient_checkpointing}")
    for name in ("eval_every", "eval_batches"):
        if getattr(options, name) is not None and not options.eval_data:
            faults.append(f"{flag(name)} needs --eval-data")
    if options.output.exists() and not options.output.is_dir():
        faults.append(f"--output {options.output} is a file; give a directory")
    return faults


def flag(name: str) -> str:
    """The option `name` as the command line spells it."""
    return "--" + name.replace("_", "-")
