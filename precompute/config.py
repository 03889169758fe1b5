"""Settings of the precompute stages, as they stand in a recipe."""

import math
import re
from typing import Literal

from pydantic import Field, model_validator

from common.chat import Template
from common.config import Frozen

Support = Literal["teacher", "student"]
"""Whose most likely tokens the teacher grades at each position."""


class Engine(Frozen):
    """How vLLM is set up. Only `dtype` and `head_dtype` change numbers, and so belong to the plan."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype; `auto` takes the checkpoint's, and bfloat16 for a float32 checkpoint, as vLLM does."""
    head_dtype: Literal["float32", "model"] = "float32"
    """Dtype of the output head. bfloat16 logits cost about 0.01 nats a token."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs a replica spans. The smallest that holds the model is the fastest for scoring."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1)
    """Share of GPU memory vLLM may plan with; scoring needs about 1 GiB beyond its plan."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences in one engine step at most."""
    max_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one engine step at most; None leaves it to vLLM."""
    cpu_kv_gib: float = Field(default=1.0, gt=0)
    """KV cache on a CPU, in GiB."""
    trust_remote_code: bool = False
    """Run the Python code that the model brings along, with all our rights; only of a version that is pinned."""
    code_sha256: str | None = None
    """Pins that code by its content, as the refusal tells it; a Hub id with its full commit (`ORG/NAME@COMMIT`) is
    pinned without."""
    compile: bool = True
    """torch.compile and CUDA graphs. On a CPU they cost a minute at start, so they are off there."""


class Sampling(Frozen):
    """How completions are sampled. Anything but temperature 1 without truncation moves the rollouts off the policy."""

    samples: int = Field(default=1, ge=1)
    """Completions a prompt."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 for all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    max_tokens: int = Field(default=4096, ge=1)
    """Longest completion, in tokens."""
    stop_ids: tuple[int, ...] | None = None
    """Token ids that end a completion; None for the model's own end-of-sequence ids."""
    seed: int = 0

    @property
    def is_policy(self) -> bool:
        """Whether tokens follow the model's own distribution (temperature 1, nothing cut off)."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0 and self.min_p == 0


class Fleet(Frozen):
    """Who does the work and what they may put up with. Nothing of it changes numbers, so none of it is in the plan."""

    on: Literal["box", "ray"] = "box"
    """This machine, or the nodes of the Ray cluster that is running."""
    replicas: int | None = Field(default=None, ge=1)
    """Engines at once, each on `engine.tensor_parallel` GPUs; None for as many as the GPUs allow, 1 on a CPU."""
    worker_index: int = Field(default=0, ge=0)
    worker_count: int = Field(default=1, ge=1)
    """Of how many jobs on this dataset this is which: a hint where to begin, so that they meet late."""
    grace_s: float = Field(default=90.0, ge=0)
    """After SIGTERM, how long the shards in flight may take to their end; then they are given up."""
    hang_s: float = Field(default=300.0, gt=0)
    """An engine whose step takes longer than this is dead, and is killed."""
    startup_s: float = Field(default=1800.0, gt=0)
    """The same while it loads its model."""
    storage_patience_s: float = Field(default=1800.0, ge=0)
    """How long a store may fail before the job gives up; all the while it holds what it has."""
    max_deaths: int = Field(default=16, ge=1)
    """Engines of one replica that may die without a shard committed by it in between; then it gets no other, and with
    the last one the job gives up."""
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    """Share of the rows that may be rejected; then the job gives up."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of this box, in any currency; shown as cost so far."""
    status_file: str | None = None
    """A local file that always holds how it stands; the dataset's own URL has it under status/ in any case."""
    self_test: bool = True
    """Before it scores, an engine shows how much the company of other sequences in a batch moves its log-probs."""

    @model_validator(mode="after")
    def _within_count(self) -> "Fleet":
        if self.worker_index >= self.worker_count:
            raise ValueError(f"worker_index {self.worker_index} must be below worker_count {self.worker_count}")
        return self


class Filters(Frozen):
    """Which completions a dataset keeps; every one unless something is set. All of it is in the plan."""

    drop_truncated: bool = False
    """Drop completions that were cut off at `sampling.max_tokens`."""
    min_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    """Drop shorter and longer completions, the stop token counted."""
    drop_loops: bool = False
    """Drop completions that end in a loop: a pattern of tokens, four times in a row or more, over 64 tokens or more."""
    max_repetition: float | None = Field(default=None, gt=0, lt=1)
    """Drop completions of whose n-grams more than this share stood in them before: 1 - distinct / all."""
    repetition_ngram: int = Field(default=4, ge=1)
    """Tokens of such an n-gram."""
    drop_duplicates: bool = False
    """Drop a completion whose tokens another one of its prompt has already."""
    verifier: str | None = None
    """Writes `verified`, true or false, into every row's meta: `math-verify` against the answer that the prompt brings
    along, or a function of yours, `package.module:function` or `file.py:function`, of (completion, meta) -> bool."""
    verifier_answer: str | None = None
    """Where in a prompt's meta `math-verify` finds the answer, `a.b` for b within a; None for `answer`, `ground_truth`,
    `label` or `solution`."""
    verifier_timeout_s: float = Field(default=10.0, gt=0, le=480)
    """A completion that takes longer gets `verified: null`; so does one on which the verifier raises. At most 480,
    because a worker that verifies for much longer without a verdict is taken for hung."""
    verifier_processes: int = Field(default=2, ge=1)
    keep: Literal["all", "correct"] = "all"
    """Whether to drop what the verifier does not find correct."""
    per_prompt: int | None = Field(default=None, ge=1)
    """Of what is left, keep so many completions of a prompt at most: the first by their number."""

    @model_validator(mode="after")
    def _is_possible(self) -> "Filters":
        if self.keep == "correct" and self.verifier is None:
            raise ValueError('keep = "correct" needs a verifier')
        if (self.min_tokens or 0) > (self.max_tokens or math.inf):
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.verifier not in (None, "math-verify") and not re.fullmatch(r".+:[A-Za-z_]\w*", self.verifier):
            raise ValueError("verifier must be math-verify, package.module:function or file.py:function")
        return self


class Generate(Frozen):
    """Sampling a dataset: `[rollouts]` from the student, `[sft_data]` from the teacher."""

    model: str
    """Who samples: Hub id, folder or URL."""
    prompts: str
    """A .jsonl or .parquet file, or a folder of them, on any URL; `hf://datasets/ORG/NAME` for a Hub dataset."""
    cache: str
    """URL of the dataset to make."""
    owner: str | None = None
    """Who makes it, as `lopd cache ls` shows it; None for the user who runs the command."""
    single_writer: bool = False
    """Nobody else writes to this dataset; allows a store that has no create-only writes."""
    prompt_column: str | None = None
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many prompts."""
    prompts_per_shard: int = Field(default=64, ge=1)
    """A shard is the unit of commit and of loss: aim at 5 to 10 minutes of work."""
    keep_text: bool = True
    """Store prompt and completion as text too, for people."""
    topk: int = Field(default=0, ge=0, le=1024)
    """The student's most likely ids to store at each position of a rollout, for scoring's `topk_support`."""
    sampling: Sampling = Sampling()
    template: Template | None = None
    """How prompts are rendered; None for the template the student was fine-tuned with, else the plain default."""
    filters: Filters = Filters()
    engine: Engine = Engine()
    fleet: Fleet = Fleet()


class Score(Frozen):
    """Scoring rollouts by the teacher: `[score]`."""

    rollouts: str
    """URL of the dataset of rollouts."""
    cache: str
    """URL of the scored dataset to make."""
    owner: str | None = None
    """Who makes it, as `lopd cache ls` shows it; None for the user who runs the command."""
    single_writer: bool = False
    """Nobody else writes to this dataset; allows a store that has no create-only writes."""
    teacher: str | None = None
    """Hub id, folder or URL; None for the SFT teacher in the student's lineage."""
    topk: int = Field(default=0, ge=0, le=1024)
    """How many tokens beside the sampled one the teacher grades at each position, for objective `topk`."""
    topk_support: Support = "teacher"
    """Whose most likely tokens these are. The student's, which the rollouts must hold, suit the reverse KL better; they
    need a GPU engine that can grade given ids."""
    allow_teacher_mismatch: bool = False
    """Score with a teacher other than the SFT teacher; stamped into all that follows."""
    engine: Engine = Engine()
    fleet: Fleet = Fleet()
