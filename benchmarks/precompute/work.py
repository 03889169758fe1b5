"""What every side is asked: the same requests, as our command reads them and as a peer does."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.rollouts import read_all
from common.chat import load_tokenizer, render
from common.dataset import open_dataset
from common.errors import DataError
from common.lineage import read_provenance
from common.models import read_config
from common.prompts import load_prompts
from precompute.config import Engine, Sampling
from precompute.generate import seed_of
from precompute.plan import choose_template
from recipes.demo.prompts import write_prompts


@dataclass(frozen=True)
class Extent:
    """How much is asked, and of which engine; the same on every side."""

    engine: Engine
    rows: int
    """Of the smallest run: more than the engine holds at once, or the memory of larger ones would seem to grow."""
    tokens: int
    """Longest completion."""
    prompt_characters: int
    times: tuple[int, ...] = (1, 4, 16)
    """How many times `rows` on which memory is measured."""
    timed: int = 4
    """How many times `rows` on which speed is."""
    rounds: int = 2
    """Runs of each side for speed, which take turns."""
    shard_rows: int = 64
    batch: int = 8
    """Rows in one forward pass of transformers."""


@dataclass(frozen=True)
class Request:
    """One row as a peer is asked for it; without a completion it is to be sampled."""

    prompt_ids: list[int]
    completion_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Requests:
    """All requests of one run."""

    rows: Sequence[Request]
    longest: int
    """Prompt and completion together, in tokens; of one that is to be sampled, at most."""

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(len(row.completion_ids) for row in self.rows)

    def save(self, file: Path) -> Path:
        """Write them to `file`, as arrays: what a peer holds of them shall be little."""
        columns = {
            "prompts": _flat(row.prompt_ids for row in self.rows),
            "prompt_ends": np.cumsum([len(row.prompt_ids) for row in self.rows]),
            "completions": _flat(row.completion_ids for row in self.rows),
            "completion_ends": np.cumsum([len(row.completion_ids) for row in self.rows]),
            "seeds": np.asarray([row.seed for row in self.rows], np.int64),
        }
        np.savez(file, longest=np.int64(self.longest), allow_pickle=False, **columns)
        return file


def read_requests(file: Path) -> Iterator[Request]:
    """What `Requests.save` wrote, one after another."""
    columns = dict(np.load(file, allow_pickle=False))
    cut = {name: np.split(columns[f"{name}s"], columns[f"{name}_ends"][:-1]) for name in ("prompt", "completion")}
    for prompt, completion, seed in zip(cut["prompt"], cut["completion"], columns["seeds"], strict=True):
        yield Request(prompt.tolist(), completion.tolist(), int(seed))


def write_prompt_file(file: Path, rows: int, characters: int) -> Path:
    """`rows` prompts, no two alike: numbered beginnings of the tasks of HumanEval, over and over."""
    sources = (file.with_name("a.jsonl"), file.with_name("b.jsonl"))
    write_prompts(*sources, held_out_every=2)
    texts = [json.loads(line)["prompt"] for source in sources for line in source.read_text().splitlines()]
    lines = [{"id": f"r{row}", "prompt": f"{row}. {texts[row % len(texts)]}"[:characters]} for row in range(rows)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def sampling_of(model: Path, extent: Extent, seed: int) -> Sampling:
    """The model's own distribution, until it ends its answer."""
    return Sampling(max_tokens=extent.tokens, seed=seed, stop_ids=read_config(model).eos_token_ids)


def to_sample(model: Path, prompts: Path, sampling: Sampling) -> Requests:
    """The requests that `lopd precompute rollouts` makes of these prompts: same ids, same seeds."""
    template = choose_template(None, read_provenance(model), str(model))
    tokenizer, rows = load_tokenizer(model), []
    for prompt in load_prompts(str(prompts)).prompts:
        rows.append(Request(render(tokenizer, prompt, template), [], seed_of(sampling.seed, prompt.id, 0)))
    longest = max(len(row.prompt_ids) for row in rows) + sampling.max_tokens
    if longest >= read_config(model).max_positions:
        raise DataError(f"{longest} tokens do not fit into the model's context", where=str(model), fix="Lower --tokens")
    return Requests(rows, longest)


def to_score(url: str) -> Requests:
    """The requests that `lopd precompute score` makes of the rollouts at `url`."""
    rows = [Request(row.prompt_ids.tolist(), row.completion_ids.tolist(), 0) for row in read_all(open_dataset(url))]
    return Requests(rows, max(len(row.prompt_ids) + len(row.completion_ids) for row in rows))


def _flat(ids: Iterator[list[int]]) -> np.ndarray:
    return np.fromiter((token for row in ids for token in row), np.int32)
