"""The hidden folder beside an output in which it is made; its name comes when it is complete."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_bitcpm.errors import DataError


def make_scratch_folder(field: str, output: Path) -> Path:
    """Make an empty hidden folder beside an output, and the parents of both.

    Args:
        field: name of the argument that holds the output, for the message.
        output: file or folder that will be written.

    Raises:
        DataError: the place cannot be written.
    """
    if not output.name:
        raise DataError(f"{field}={output}: is no name. Name a new file or folder.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{field}={output}: cannot be written ({reason}). Name a place in a writable folder."
        ) from error
