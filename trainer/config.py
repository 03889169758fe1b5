"""The settings of a training run; the text under a field is its reference."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from common.config import Frozen
from trainer.objectives import Divergence, Objective, TokenWeights
from trainer.schedule import Schedule
from trainer.world import Device

Compute = Literal["float32", "bfloat16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "clip_advantage": ("objective", ("paper", "importance", "proximal")),
    "proximal_alpha": ("objective", ("proximal",)),
    "topk": ("objective", ("topk",)),
    "kl": ("objective", ("topk",)),
    "kl_forward_share": ("kl", ("mixed",)),
}
"""Settings that mean something only under some values of another; given under any other, they are refused."""


class Lora(Frozen):
    """Settings under `lora`: small adapters train, the model's own weights do not. The export has them merged."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    rank: int = Field(default=16, ge=1)
    """Inner width of an adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter counts alpha / rank times."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers of the decoder blocks that get one, by the last part of their names, or `all-linear`. The experts
    of a mixture are no linear layers and get none."""


class TrainConfig(Frozen):
    """What SFT and OPD share."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    """The model to start from: a Hub id, a folder or a URL."""
    data: str
    """URL or folder of the finished dataset."""
    output: str
    """URL or folder that receives metrics.jsonl, checkpoints/ and export/."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Schedule
    """`constant`, or `cosine` down to zero at the last step."""
    warmup: float = Field(ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly."""
    betas: tuple[float, float]
    """AdamW's decay rates of the two moments."""
    weight_decay: float = Field(ge=0)
    """AdamW's decoupled decay; applied to matrices, not to norms and biases."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""

    rows_per_step: int = Field(default=256, ge=1)
    """Rollouts in one optimizer step, over all ranks."""
    token_budget: int = Field(default=16384, ge=2)
    """Prompt and completion tokens in one packed micro-batch of one rank; no row may be longer."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the dataset; ignored where `max_steps` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all; the dataset is gone through as often as that takes."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Shards whose rows are mixed with one another; each rank holds as many in memory, and those read ahead."""
    read_ahead: int = Field(default=4, ge=1)
    """Shards fetched before they are needed, each by a thread of its own."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the rows."""

    device: Device = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is one."""
    compute: Compute = "bfloat16"
    """Type of the forward and backward pass. Master weights, gradient reduction and the head are float32 always."""
    attention: Literal["eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention kernel. `sdpa` (torch's) takes packed rows one by one, anywhere; `varlen` (torch's, CUDA) all at once,
    as flash and flex do: the choice on GPUs."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: a third more compute, far less memory."""
    compile: bool = False
    """Compile the decoder layers: minutes at the start, faster steps after."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the sharded model (HSDP), each on ranks / replicas ranks: take the number of nodes, and weights are
    gathered within a node only."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory and step there: slow, where nothing else fits. Only
    with CUDA."""
    lora: Lora | None = None
    """Train LoRA adapters only, for example `lora.rank=16`; they want about ten times the learning rate."""
    logits_chunk: int = Field(default=1024, ge=1)
    """Rows of logits held at a time; float32 logits take chunk x vocabulary x 4 bytes, a few times over."""

    validation_share: float = Field(ge=0, le=0.5)
    """Share of the rows that is held out, whole prompts, and never trained on; 0 for none."""
    validation_rows: int = Field(default=512, ge=1)
    """Rows held out at most."""
    validate_every: int = Field(default=100, ge=1)
    """Steps between validations; one is made after the last step too."""

    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint in `output`; `never` refuses an output that
    has one, or metrics, or an export."""
    export_dtype: Compute = "bfloat16"
    """Type of the exported weights."""
    trackers: tuple[Tracker, ...] = ()
    """Where the metrics go besides metrics.jsonl: any of `tensorboard`, `wandb`, `trackio`; each is a package."""
    tracker_project: str = "lightning-opd"
    """Project of the run in W&B and trackio."""


class SftConfig(TrainConfig):
    """Section [sft]: supervised fine-tuning on the teacher's answers; defaults as in the public configuration of arXiv
    2604.13010."""

    lr: float = Field(default=8e-5, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """`constant`, or `cosine` down to zero at the last step."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay; applied to matrices, not to norms and biases."""
    validation_share: float = Field(default=0.01, ge=0, le=0.5)
    """Share of the rows that is held out, whole prompts, and never trained on; 0 for none. `validation/loss` is their
    mean negative log-likelihood per token."""


class OpdConfig(TrainConfig):
    """Section [opd]: on-policy distillation from stored teacher log-probs; defaults as in arXiv 2604.13010."""

    lr: float = Field(default=2e-6, gt=0)
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """`constant`, or `cosine` down to zero at the last step."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled decay; applied to matrices, not to norms and biases."""
    validation_share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the rows that is held out, whole prompts, and never trained on; 0 for none, as in the paper.
    `validation/teacher_k1` estimates the KL to the teacher on them."""

    objective: Literal[Objective, "auto"] = "auto"
    """`paper`, `importance` (the paper's with a truncated importance weight), `proximal` (the paper's with a mixture of
    teacher and student for a teacher) or `topk` (KL over the stored top-k). `auto` is `topk` where the dataset stores
    top-k, else `importance`: docs/training.md says why, and the run which."""
    max_importance_ratio: float = Field(default=2.0, gt=0)
    """Bound of the importance weight, of `importance` and of the anchor; also what the metric ratio/clipped counts."""
    clip_advantage: float | None = Field(default=None, gt=0)
    """Bound of the advantage in nats, above and below, for `paper`, `importance` and `proximal`; off by default."""
    proximal_alpha: float = Field(default=0.5, gt=0, le=1)
    """Share of the teacher in the mixture of `proximal`, whose advantage never falls below log(1 - alpha); with 1 it is
    `paper`."""
    topk: int = Field(default=0, ge=0)
    """How many of the stored teacher log-probs `topk` uses; 0 for all that the dataset has."""
    kl: Divergence = "reverse"
    """Which KL `topk` descends: `reverse` KL(student || teacher), `forward` KL(teacher || student), `mixed` both."""
    kl_forward_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the forward KL in `mixed`; the rest is the reverse KL."""
    token_weights: TokenWeights = "none"
    """Weight of each token's loss, from 0.1 to 1: `entropy` more where the student wavers, `position` more at the
    beginning of a completion. Means still divide by the number of tokens, and the anchor is not weighted."""
    anchor: float = Field(default=0.0, ge=0)
    """Coefficient of KL(student || rollout policy), in the first round the SFT model, which is estimated from the
    stored rollout log-probs and added to any objective; 0 for none."""
    loss_mean: Literal["token", "rollout"] = "token"
    """`token`: mean over all tokens of the step. `rollout`: mean per rollout, then over rollouts, as in the paper."""

    parity: Literal["enforce", "report"] = "enforce"
    """Before the first update the student must give the stored rollout log-probs back: `enforce` refuses to train where
    it does not, `report` says so and goes on."""
    parity_mean: float = Field(default=0.1, gt=0)
    """Largest mean |student - stored| in nats. Measured: 0.001 for float32 against float32, 0.034 for bfloat16."""
    parity_k3: float = Field(default=0.01, gt=0)
    """Largest KL estimate (k3) in nats. Measured: 1e-6 for float32 against float32, 1e-3 for bfloat16."""
    parity_rows: int = Field(default=64, ge=1)
    """Rollouts of the first step that are compared."""
    spent_ess: float = Field(default=0.5, ge=0, lt=1)
    """The rollouts are called spent when ratio/ess falls below this: half of them count for nothing."""
    spent_k3: float = Field(default=0.1, gt=0)
    """They are when kl/rollout_k3 rises above this, in nats: a hundred times what two bfloat16 engines differ by."""
    spent_clipped: float = Field(default=0.2, gt=0)
    """They are when ratio/clipped rises above this: a fifth of the tokens no longer pulls with its true weight."""
    allow_teacher_mismatch: bool = False
    """Train although the dataset's teacher is not the one the student was fine-tuned on; stamped into the export."""

    @field_validator(*READ_BY)
    @classmethod
    def _is_read(cls, value: Any, info: ValidationInfo) -> Any:
        """Runs on what was given, not on defaults: a setting that nothing would read is a mistake, not a wish."""
        key, readers = READ_BY[info.field_name or ""]
        chosen = info.data.get(key)
        if chosen is not None and chosen not in readers:
            raise ValueError(f"{key}={chosen} does not use it. Leave it out, or set {key}={' or '.join(readers)}")
        return value


class EvalConfig(Frozen):
    """Section [eval]: exact KL(model || teacher) at the states of the model's own fresh rollouts."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    """The student: a Hub id, a folder or a URL."""
    teacher: str
    """The teacher: a Hub id, a folder or a URL."""
    data: str
    """Dataset of kind `rollouts`, sampled by exactly this model on held-out prompts."""
    output: str
    """The JSON file to write, a path or a URL."""
    device: Device = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is one."""
    compute: Compute = "float32"
    """Type of the forward passes; the head and the KL are float32 always."""
    attention: Literal["eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention kernel, as in training; with compute=float32 only `eager`, `sdpa` and `flex_attention`."""
    token_budget: int = Field(default=4096, ge=2)
    """Tokens of one packed forward pass; a longer row makes a pass of its own."""
    logits_chunk: int = Field(default=256, ge=1)
    """Rows of logits held at a time, of both models."""
    bootstrap: int = Field(default=2000, ge=100)
    """Resamples of the prompts behind the 95% interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resampling."""
