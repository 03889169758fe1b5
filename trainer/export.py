"""A trained model as ordinary safetensors: transformers, vLLM and our own rollouts open it, and it says where it is
from.

The tokenizer's files are copied as they are, because writing them anew may change them; generation stops at the stop
ids of the dataset, because that is what the model was trained to do. Where the SFT answers were asked for with a chat
template that the model lacks, it gets that one, so that it is prompted as it was trained.

    <output>/export/export.json   what the export was made of: a run that finds another one here exports again
                    README.md     the model card
                    config.json   the last to appear

Host memory of rank 0: the whole model in the exported type (2 bytes a parameter in bfloat16) and, one at a time, a
tensor in float32. The experts of a mixture, which train as one tensor a layer and are written one by one, take that
much again for as long as they are split.
"""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.canonical import sha256
from common.errors import StorageError
from common.lineage import ModelIdentity, Provenance, safetensors_metadata, write_provenance
from common.local_cache import cache_dir
from common.models import CONFIG, publish
from common.storage import NotFound, Store
from common.urls import is_url
from trainer.header import Header
from trainer.lora import merged_shards
from trainer.model import COMPUTE_TYPES
from trainer.model_card import Story, model_card
from trainer.world import World

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
)  # fmt: skip
CHAT_TEMPLATE = "chat_template.jinja"
"""Where transformers looks for the template first."""
RECORD = "export.json"
SCRATCH = ".export-"
"""Beginning of the names of folders in which an export is being written."""
CARD = "README.md"
LARGEST_FILE = "5GB"
"""Of the weights: what a download can take up again, and the Hub's own advice."""


@dataclass(frozen=True)
class Spec:
    """What an export is to be, besides its weights."""

    header: Header
    """What the checkpoint it is made from says of itself."""
    dtype: str
    """Of the weights written."""
    provenance: Provenance
    start: ModelIdentity
    """The model the run began from."""
    stop_ids: Sequence[int]
    """Become `eos_token_id` of generation_config.json."""
    scored_by: ModelIdentity | None = None
    """The model whose log-probs the run was trained on; None for SFT."""
    chat_template: str | None = None
    """Takes the place of the model's own; None to leave that."""

    def record(self) -> bytes:
        """The text of export.json."""
        return (json.dumps({**asdict(self.header), "dtype": self.dtype}, indent=2, sort_keys=True) + "\n").encode()


def is_exported(output: str, spec: Spec) -> bool:
    """Whether `output` holds a complete export of just this; config.json is the last file to appear."""
    store = Store(output).child("export")
    try:
        return store.get(RECORD) == spec.record() and store.exists(CONFIG)
    except NotFound:
        return False


def export(model: PreTrainedModel, source: Path, output: str, world: World, spec: Spec) -> None:
    """Write the sharded `model` to `<output>/export`; called by all ranks.

    Args:
        source: folder of the model the run started from: config and tokenizer are taken from it.
    """
    tensors = gather(model, COMPUTE_TYPES[spec.dtype], world)
    world.from_first(lambda: _write_and_publish(tensors, source, Store(output), spec))


def gather(model: PreTrainedModel, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """The whole model's tensors of type `dtype` in the host memory of rank 0, the tied ones once; {} on other ranks.

    Every rank sends its shards of one tensor at a time.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    whole = {}
    for name, shard in merged_shards(model):
        if name in tied:
            continue
        tensor = cast(DTensor, shard.to(world.device)).full_tensor() if isinstance(shard, DTensor) else shard
        if world.is_first:
            whole[name] = tensor.to("cpu", dtype)
    return whole


def _write_and_publish(state: dict[str, Tensor], source: Path, output: Store, spec: Spec) -> None:
    """Write to a temporary folder first, so that an export appears whole or not at all."""
    remote = is_url(output.url)
    own = sha256(output.url.encode())[:16]
    parent = cache_dir() / "exports" / own if remote else Path(output.url)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{SCRATCH}*"):  # of a run that was killed while it wrote
            shutil.rmtree(left)
        with TemporaryDirectory(dir=parent, prefix=SCRATCH) as scratch:
            folder = Path(scratch) / "export"
            _write(state, source, folder, spec)
            if remote:
                _clear(output.child("export"))
                publish(folder, output.child("export").url)
            else:
                _replace(folder, parent / "export")
    except (OSError, SafetensorError) as error:
        fix = "Mend it, then run the same command: the training is saved, only the export is done again"
        raise StorageError(f"cannot write the export: {error}", where=str(parent), fix=fix) from None


def _write(state: dict[str, Tensor], source: Path, folder: Path, spec: Spec) -> None:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.dtype = COMPUTE_TYPES[spec.dtype]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
    skeleton.save_pretrained(folder, state_dict=state, max_shard_size=LARGEST_FILE)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if spec.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(spec.chat_template)
    _write_generation_config(source, folder, spec.stop_ids)
    for file in sorted(folder.glob("*.safetensors")):
        _add_metadata(file, safetensors_metadata(spec.provenance))
    write_provenance(folder, spec.provenance.model_copy(update={"created_by": f"lightning-opd {_version()}"}))
    (folder / CARD).write_text(model_card(_story(spec)))
    (folder / RECORD).write_bytes(spec.record())


def _story(spec: Spec) -> Story:
    return Story(
        provenance=spec.provenance,
        start=spec.start,
        scored_by=spec.scored_by,
        settings=spec.header.settings,
        steps=spec.header.step,
        dtype=spec.dtype,
        stop_ids=spec.stop_ids,
    )


def _write_generation_config(source: Path, folder: Path, stop_ids: Sequence[int]) -> None:
    original = source / "generation_config.json"
    settings = json.loads(original.read_text()) if original.exists() else {}
    if stop_ids:
        settings["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _add_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Rewrite a safetensors file with more metadata, its tensors streamed through untouched.

    Format: 8 bytes little-endian length, a JSON header, then the data, which the header's offsets count from.
    """
    partial = file.with_suffix(".partial")
    with open(file, "rb") as read, open(partial, "wb") as write:
        header = json.loads(read.read(struct.unpack("<Q", read.read(8))[0]))
        header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(read, write, 1 << 24)
    os.replace(partial, file)


def _clear(export: Store) -> None:
    """Delete an older export, config.json first: from then on it is no model, and none of its files outlives it."""
    for entry in sorted(export.list(), key=lambda entry: entry.name != CONFIG):
        export.remove(entry.name)


def _replace(folder: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def _version() -> str:
    try:
        return version("lightning-opd")
    except PackageNotFoundError:
        return "from source"
