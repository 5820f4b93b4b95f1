"""The safetensors files of a Hugging Face folder, read one tensor at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_bitcpm.checkpoint.hf_config import read_json
from megatron_bitcpm.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_EXPORT_AGAIN = "Export the checkpoint again"


def folder_error(folder: Path, rule: str, fix: str = _EXPORT_AGAIN) -> CheckpointError:
    """Build the error of a folder that is not what it should be."""
    error = CheckpointError.of("folder", folder, rule, fix)
    assert isinstance(error, CheckpointError)
    return error


class HfFolder:
    """The tensors of a Hugging Face folder, read one at a time; a context manager.

    Raises:
        CheckpointError: files are missing, damaged, or not those of the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for name in self._list_files():
            try:
                handle = self._stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise folder_error(folder, f"{name} cannot be read: {error}".rstrip(".")) from error
            for key in handle.keys():  # noqa: SIM118 - not a dict
                if key in self._files:
                    raise folder_error(folder, f"tensor {key} is in two files")
                self._files[key] = handle

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stack.close()

    def _list_files(self) -> list[str]:
        present = sorted(path.name for path in self.folder.glob("*.safetensors"))
        wanted = [WEIGHTS_FILE]
        if (self.folder / INDEX_FILE).is_file():
            weight_map = read_json(self.folder / INDEX_FILE).get("weight_map", {})
            wanted = sorted(set(weight_map.values()))
        if present != wanted:
            missing, extra = set(wanted) - set(present), set(present) - set(wanted)
            words = [f"{name} is missing" for name in sorted(missing)]
            # Servers read every safetensors file they find.
            words += [f"{name} does not belong to it" for name in sorted(extra)]
            raise folder_error(self.folder, "; ".join(words))
        return wanted

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise folder_error(
                self.folder, f"tensor {name} cannot be read: {error}".rstrip(".")
            ) from error
        return tensor
