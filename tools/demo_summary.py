"""The end of `make demo`: losses side by side, a generated sample, where everything is."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.evaluation.compare import compare_runs
from megatron_bitcpm.evaluation.generate import generate

PROMPT_TOKENS = 12


def read_prompt(folder: Path) -> str:
    """Return the beginning of the first validation document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # Documents are views of the memory map, which goes away with the dataset.
    dataset = IndexedDataset(str(folder / "data" / "text_valid"))
    tokens = dataset[0][:PROMPT_TOKENS].tolist()
    return load_tokenizer(folder / "tokenizer").decode(tokens)


def main() -> None:
    """Print the summary of a demo's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    plot = folder / "loss.png"
    runs = [f"ternary={folder / 'ternary'}", f"full precision={folder / 'full-precision'}"]
    result = compare_runs(runs, plot)
    ternary, full = result["validation_loss"].values()
    bigram = result["bigram"]

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="validation loss, nats per token")
    for column in ("model", "loss", "peak learning rate", "minus ternary"):
        table.add_column(column)
    rates = result["learning_rate"]
    table.add_row("ternary", f"{ternary:.4f}", f"{rates['ternary']:g}", "")
    table.add_row(
        "full precision", f"{full:.4f}", f"{rates['full precision']:g}", f"{full - ternary:+.4f}"
    )
    table.add_row("bigram", f"{bigram:.4f}", "", f"{bigram - ternary:+.4f}")
    console.print(table)
    if ternary > bigram:
        console.print(
            "Above the bigram model: too few steps or too little text to have learnt much."
        )

    prompt = read_prompt(folder)
    console.print("\nA sample of the ternary model (transformers, from the Hugging Face folder):")
    console.print(f"[bold]{escape(repr(prompt))}[/bold] ->")
    console.print(generate(folder / "hf", prompt, max_new_tokens=96, temperature=0.7), markup=False)
    console.print(
        f"""
Hugging Face folder     {folder / "hf"}
checkpoint              {folder / "ternary"}
losses                  {plot} and {folder / "ternary" / "metrics.jsonl"}
TensorBoard             tensorboard --logdir {folder}
Next                    source .venv/bin/activate
                        bitcpm generate --model {folder / "hf"} --prompt 'def '
                        torchrun --nproc_per_node 2 -m megatron_bitcpm train --config FILE""",
        markup=False,
    )


if __name__ == "__main__":
    main()
