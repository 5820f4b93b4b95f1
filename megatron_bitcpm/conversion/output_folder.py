"""Which outputs of a conversion may be replaced: models, files of tensors, reports."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, SIDE_FOLDER
from megatron_bitcpm.checkpoint.store import TRACKER
from megatron_bitcpm.conversion.megatron.folder import RELEASE, SHARD_FILE
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import TOKENIZER_FILES
from megatron_bitcpm.publish import Output

_Known = Mapping[str, Any]
"""Patterns of names -> None for a file, what is known in it for a folder."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_MODEL_NAMES = (
    *_WEIGHTS,
    *TOKENIZER_FILES,
    "*.index.json",
    "config.json",
    "config.json.bak*",
    "generation_config.json",
    "bitcpm_*.json",
    "chat_template.*",
    "modeling_*.py",
    "configuration_*.py",
    "tokenization_*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
)
_MODEL: _Known = {**dict.fromkeys(_MODEL_NAMES), "additional_chat_templates": {"*": None}}
_RELEASE: _Known = {
    MODEL_FILE: None,
    SIDE_FOLDER: _MODEL,
    "mp_rank_*": {SHARD_FILE: None},
    **dict.fromkeys(("*.distcp", ".metadata", "metadata.json", "common.pt")),
}
_CHECKPOINT: _Known = {TRACKER: None, RELEASE: _RELEASE}
_OLD_TORCH_FILE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How `torch.save` began its files before they were archives."""


def new_folder(output: Path, overwrite: bool) -> AbstractContextManager[Path]:
    """Give a folder that becomes `output` (no symbolic link); only a whole model is replaced."""
    return Output(output, overwrite, why_kept=_why_no_model).new_folder()


def new_file(output: Path, overwrite: bool) -> AbstractContextManager[Path]:
    """Give a place for a file that becomes `output`; only a file of tensors is replaced."""
    return Output(output, overwrite, why_kept=_why_no_tensors).new_file()


def _why_no_model(output: Path) -> str | None:
    """Return why a folder must not be deleted as an old model, None where it may.

    It may only if all of it is what models consist of: among anything else somebody's work can be.
    """
    rule = "is not a converted model, so it is not replaced"
    if not output.is_dir():
        return f"{rule} (it is a file)"
    is_checkpoint = (output / TRACKER).is_file() and (output / RELEASE / MODEL_FILE).is_file()
    has_weights = any(any(output.glob(pattern)) for pattern in _WEIGHTS)
    foreign = _find_foreign(output, _CHECKPOINT if is_checkpoint else _MODEL)
    if foreign is not None:
        return f"{rule} (it holds {foreign.relative_to(output)}, which is not part of one)"
    if not is_checkpoint and not ((output / "config.json").is_file() and has_weights):
        return f"{rule} (it has no config.json with weights)"
    return None


def _find_foreign(folder: Path, known: _Known) -> Path | None:
    """Return the first entry, by name, that is not among the known ones."""
    for path in sorted(folder.iterdir()):
        pattern = next((p for p in known if fnmatchcase(path.name, p)), None)
        if pattern is None or path.is_dir() != (known[pattern] is not None):
            return path
        if known[pattern] is not None and (found := _find_foreign(path, known[pattern])):
            return found
    return None


def _why_no_tensors(output: Path) -> str | None:
    """Return why a file must not be deleted as old weights, None where it may; by its beginning."""
    rule = "is not a file of tensors, so it is not replaced"
    if not output.is_file():
        return rule
    if zipfile.is_zipfile(output):
        try:
            with zipfile.ZipFile(output) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, ValueError):
            names = []
        return None if any(name.endswith("/data.pkl") for name in names) else rule
    with output.open("rb") as stream:
        start = stream.read(len(_OLD_TORCH_FILE))
    is_safetensors = start[8:9] == b"{" and (
        int.from_bytes(start[:8], "little") <= output.stat().st_size - 8
    )
    return None if is_safetensors or start == _OLD_TORCH_FILE else rule


def check_report(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse a place for a Markdown report before the work for it begins.

    An older report, by its suffix, may be there; `inputs` are read, and must not change.
    """
    with _report(path).explain():
        if rule := _why_no_report(path, inputs):
            raise CheckpointError(f"markdown={path}: {rule}.")


def _why_no_report(path: Path, inputs: Sequence[Path]) -> str | None:
    real = Path(os.path.realpath(path))
    for read in inputs:
        folder = Path(os.path.realpath(read))
        # A single weights file stands for its folder.
        if (folder.parent / "config.json").is_file() and folder.is_file():
            folder = folder.parent
        if folder == real or folder in real.parents:
            return f"would change the input {read}. Name another file"
    if path.is_dir():
        return "is a folder. Name a file in it"
    if path.exists() and path.suffix.lower() != ".md":
        return "exists and is not a .md file, so it is not replaced. Name another file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}. Make it, or name another file"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"the folder {path.parent} cannot be written to. Name another file"
    return None


def write_report(path: Path, text: str) -> None:
    """Write a Markdown report whose place was checked."""
    with _report(path).new_file() as scratch:
        scratch.write_text(text, encoding="utf-8")


def _report(path: Path) -> Output:
    return Output(path, overwrite=True, field="markdown")
