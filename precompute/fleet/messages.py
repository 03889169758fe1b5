"""What a supervisor and its workers tell each other: one JSON object a line, checked on both sides."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from common.config import Frozen


class Job(Frozen):
    """To a worker, once: what to do. `section` is the phase's settings as a recipe would hold them."""

    tell: Literal["job"] = "job"
    phase: Literal["sft_data", "rollouts", "score"]
    section: dict[str, Any]
    plan: dict[str, Any]
    model: str
    """Hub id, folder or URL, for a box that has not fetched it yet."""
    folder: str
    """Where it lies on the supervisor's box."""
    max_model_len: int
    window: int
    """Rows in the engine at once, at most; less after an engine ran out of memory."""


class Work(Frozen):
    """To a worker that wants work: a shard of the dataset."""

    tell: Literal["work"] = "work"
    shard: int
    suspects: tuple[str, ...] = ()
    """Uids that were in an engine when it died: they go first, and nothing beside them until all have finished."""
    window: int | None = None
    """How many of the suspects may be in the engine at once."""
    rejected: dict[str, str] = {}
    """Uids to leave out, each with the reason; they go into the shard's commit."""


class Nothing(Frozen):
    """To a worker that wants work: none is left for now; `ended` when there will be none."""

    tell: Literal["nothing"] = "nothing"
    ended: bool


class Drain(Frozen):
    """To a worker: take no more shards, and end within so many seconds."""

    tell: Literal["drain"] = "drain"
    seconds: float


class State(Frozen):
    """From a worker: what it does now. In `testing`, `running` and `storing` it is expected to beat."""

    tell: Literal["state"] = "state"
    state: Literal["loading", "testing", "running", "storing", "idle"]
    detail: str = ""


class Storage(Frozen):
    """From a worker: the store is away, still away, or back."""

    tell: Literal["storage"] = "storage"
    text: str


class Note(Frozen):
    """From a worker: what else is worth a line."""

    tell: Literal["note"] = "note"
    text: str


class Want(Frozen):
    """From a worker: a shard, please. An `idle` one has nothing in its engine and waits until there is an answer."""

    tell: Literal["want"] = "want"
    idle: bool


class Beat(Frozen):
    """From a worker's step loop, at least once a second while it steps: rows that entered the engine and that left it.

    Rows that enter are told before the engine is given them, for it may die of them.
    """

    tell: Literal["beat"] = "beat"
    entered: tuple[tuple[int, str], ...] = ()
    """Shard and uid."""
    left: tuple[str, ...] = ()
    tokens: int = 0
    """Of the completions that left."""


class Refused(Frozen):
    """From a worker: its engine will not take this row, and lives on; the shard's commit will name it as rejected."""

    tell: Literal["refused"] = "refused"
    shard: int
    uid: str
    reason: str


class Committed(Frozen):
    """From a worker: the shard is safe. What it holds is told by the commit that holds, which may be another's."""

    tell: Literal["committed"] = "committed"
    shard: int
    rows: int
    tokens: int
    stats: dict[str, float]


class Failed(Frozen):
    """From a worker, last: why it ends. What a `LopdError` says, or the first line of what vLLM said."""

    tell: Literal["failed"] = "failed"
    exit_code: int
    text: str
    out_of_memory: bool = False
    engine: bool = False
    """Whether its engine died, so that another may do better."""


ToWorker = Job | Work | Nothing | Drain
FromWorker = State | Storage | Note | Want | Beat | Refused | Committed | Failed
_TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="tell")])
_FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(Annotated[FromWorker, Field(discriminator="tell")])


def line(message: ToWorker | FromWorker) -> bytes:
    """A message as it travels."""
    return message.model_dump_json().encode() + b"\n"


def to_worker(text: bytes | str) -> ToWorker:
    """One line, read by a worker."""
    return _TO_WORKER.validate_json(text)


def from_worker(text: bytes | str) -> FromWorker:
    """One line, read by a supervisor."""
    return _FROM_WORKER.validate_json(text)
