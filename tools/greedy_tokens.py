"""Decode greedily with Hugging Face folders, and compare each token with Megatron's choice.

Transformers decodes; then Megatron reads prompt and continuation and says for each place which
token it finds most likely after those before. While all choices are equal, that is its own greedy
decoding; the count ends at the first difference. Both compute in float32 on the values of the
training forward. Exits with 1 unless all tokens are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from megatron_bitcpm.evaluation.generate import load_hf_model, load_hf_tokenizer
from megatron_bitcpm.evaluation.logits import megatron_logits, megatron_model


def decode_folder(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Return the continuation that transformers finds."""
    model = load_hf_model(folder, torch.float32)
    # Without an end token: `min_new_tokens` would forbid it, and so change the choice.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation


def count_equal(
    model: torch.nn.Module, prompt: list[int], continuation: list[int], vocab_size: int
) -> int:
    """Return at how many places, from the first on, Megatron chooses the same token."""
    ids = torch.tensor([[*prompt, *continuation[:-1]]])
    choices = megatron_logits(model, ids)[0, len(prompt) - 1 :, :vocab_size].argmax(-1).tolist()
    equal = [mine == theirs for mine, theirs in zip(choices, continuation, strict=True)]
    return equal.index(False) if False in equal else len(equal)


def main() -> int:
    """Decode with every folder and compare with Megatron."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint or run")
    parser.add_argument("--folders", type=Path, nargs="+", required=True, help="made from it")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    tokenizer = load_hf_tokenizer(arguments.folders[0])
    prompt: list[int] = tokenizer(arguments.prompt)["input_ids"]
    # Before Megatron's platform is prepared: that changes torch for the whole process.
    decoded = {f.name: decode_folder(f, prompt, arguments.new_tokens) for f in arguments.folders}
    with megatron_model(arguments.checkpoint) as model:
        equal = {
            name: count_equal(model, prompt, ids, len(tokenizer)) for name, ids in decoded.items()
        }
    first = next(iter(decoded.values()))
    report = {
        "prompt": arguments.prompt,
        "tokens": arguments.new_tokens,
        "equal": equal,
        "distinct": len(set(first)),
        "text": tokenizer.decode(first),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return int(any(count != arguments.new_tokens for count in equal.values()))


if __name__ == "__main__":
    sys.exit(main())
