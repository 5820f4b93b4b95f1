"""Convert models through Megatron in many layouts and back, and print what differs, as Markdown.

Every way begins and ends with a Hugging Face folder. What came back is compared with the beginning
by safetensors and torch alone: each value of each tensor, the meaning of config.json, and the bytes
of all other files. Codes are the signs of the seven projections, as a pseudo-quantised model has
them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_bitcpm.conversion.convert import convert

LAYOUTS = {
    "TP2": (2, 1, None),
    "TP3": (3, 1, None),
    "PP2": (1, 2, None),
    "TP2 x PP2": (2, 2, None),
    "TP3 x PP2": (3, 2, None),
    "PP2 x VPP2": (1, 2, 2),
    "TP2 x PP2 x VPP2": (2, 2, 2),
}
# Written anew by every writer of such a folder.
NOT_COMPARED = ("README.md", "bitcpm_quantizer.json")
# Spelled differently by the versions of transformers, or of no meaning to the model.
SPELLINGS = (
    "torch_dtype",
    "dtype",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "transformers_version",
    "_name_or_path",
    "architectures",
    "auto_map",
)

# What an absent key means.
DEFAULTS = {"attention_dropout": 0.0, "pretraining_tp": 1}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a Hugging Face folder, of either kind of file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= torch.load(path, weights_only=True, mmap=True)
    return tensors


def read_meaning(folder: Path) -> dict[str, Any]:
    """Return what config.json means: the rotary settings resolved, whatever their spelling."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] == "longrope":
        longest = config["max_position_embeddings"]
        original = config.pop("original_max_position_embeddings", None) or longest
        original = rope.setdefault("original_max_position_embeddings", original)
        growth = max(longest / original, 1.0)
        rope.setdefault("factor", growth)
        attention = math.sqrt(1 + math.log(growth) / math.log(original))
        rope["attention_factor"] = rope.get("attention_factor") or attention
    rest = {key: value for key, value in config.items() if key not in SPELLINGS}
    return {
        **DEFAULTS,
        **rest,
        "rope": rope,
        "dtype": config.get("torch_dtype") or config.get("dtype"),
    }


def compare_folders(first: Path, second: Path) -> dict[str, Any]:
    """Return tensors, differing values, differing codes, and names of files that differ."""
    a, b = load_weights(first), load_weights(second)
    if not a:
        sys.exit(f"{first}: no weights")
    values = codes = 0
    for name in a.keys() | b.keys():
        left, right = a.get(name), b.get(name)
        if left is None or right is None or left.shape != right.shape or left.dtype != right.dtype:
            differing = max(t.numel() for t in (left, right) if t is not None)
            values, codes = values + differing, codes + differing
            continue
        # As integers: NaN equals itself, and -0 does not equal 0.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
        values += int((left.view(bits) != right.view(bits)).sum())
        if "_proj." in name:
            codes += int((left.sign() != right.sign()).sum())
    files = [
        path.name
        for path in sorted(first.iterdir())
        if path.suffix not in (".safetensors", ".bin", ".py")
        and not path.name.endswith(".index.json")
        and path.name not in ("config.json", *NOT_COMPARED)
        and not (
            (second / path.name).is_file()
            and (second / path.name).read_bytes() == path.read_bytes()
        )
    ]
    if read_meaning(first) != read_meaning(second):
        files.append("config.json")
    return {"tensors": len(a), "values": values, "codes": codes, "files": files}


def go_one_way(start: Path, stops: list[tuple[str, str]], form: str, work: Path) -> dict[str, Any]:
    """Convert through the stops and back to a Hugging Face folder; see `compare_folders`.

    Args:
        start: Hugging Face folder.
        stops: (format, key of `LAYOUTS`) of each checkpoint on the way.
        form: of the folder at the end.
        work: existing folder for what is written; checkpoints that are there are used again.
    """
    begin = time.perf_counter()
    here = start
    for kind, layout in stops:
        tp, pp, vpp = LAYOUTS[layout]
        name = f"{here.name}--{kind}-{layout.replace(' ', '').lower()}"
        if not (work / name / "latest_checkpointed_iteration.txt").is_file():
            convert(
                here,
                work / name,
                format=kind,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                virtual_pipeline_parallel_size=vpp,
            )
        here = work / name
    back = work / "back"
    convert(here, back, form=form, overwrite=back.exists())
    return compare_folders(start, back) | {"seconds": round(time.perf_counter() - begin, 1)}


def main() -> int:
    """Read the arguments, go all ways, print the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="Hugging Face folders")
    parser.add_argument(
        "--form", default="plain", help="form of the folders: plain, latent, pseudo"
    )
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = []
    print(
        "| model | through | tensors | differing values | differing codes | files that differ "
        "| s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for folder in arguments.folders:
        work = arguments.work / folder.name
        work.mkdir(parents=True, exist_ok=True)
        ways = [[(k, name)] for k in ("torch_dist", "legacy") for name in arguments.layouts]
        first, last = arguments.layouts[0], arguments.layouts[-1]
        ways += [
            [("torch_dist", first), ("legacy", last)],
            [("legacy", first), ("torch_dist", last)],
        ]
        for stops in ways:
            row = go_one_way(folder, stops, arguments.form, work)
            through = ", then ".join(f"{kind} {layout}" for kind, layout in stops)
            rows.append({"model": folder.name, "through": through, **row})
            print(
                f"| {folder.name} | {through} | {row['tensors']} | {row['values']} | "
                f"{row['codes']} | {', '.join(row['files']) or 'none'} | {row['seconds']} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return int(any(row["values"] or row["codes"] or row["files"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
