"""Turn a Llama in a GGUF file into a Hugging Face folder, with transformers.

The weights are dequantised to bfloat16; tokenizer, chat template and generation settings come
along.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging


def find_gguf(path: Path) -> Path:
    """Return the file itself, or the only one below a folder."""
    found = [path] if path.is_file() else sorted(path.rglob("*.gguf"))
    if len(found) != 1:
        sys.exit(f"--input={path}: {len(found)} GGUF files. Name one.")
    return found[0]


def main() -> None:
    """Read the arguments, convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="GGUF file, or a folder with one")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    gguf, output = find_gguf(arguments.input), arguments.output
    if output.exists():
        sys.exit(f"--output={output}: exists. Name a new folder.")
    logging.disable_progress_bar()
    name = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **name
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".tmp-{output.name}-", dir=output.parent) as scratch:
        model.save_pretrained(Path(scratch, "hf"))
        tokenizer.save_pretrained(Path(scratch, "hf"))
        Path(scratch, "hf").rename(output)
    print(f"{gguf.name}: {model.num_parameters():,} parameters -> {output}")


if __name__ == "__main__":
    main()
