"""How a model lies over tensor-, pipeline- and context-parallel ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bitcpm.arch.model import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; what the world has beyond them is data parallel.

    Ranks that share each layer, stages of consecutive layers, chunks of layers on each stage
    (interleaved schedule), ranks that share each sequence.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one replica of the model and one sequence."""
        return self.tp * self.pp * self.cp

    @property
    def pieces(self) -> int:
        """Pieces that the layers are cut into: stages x chunks on a stage."""
        return self.pp * self.vpp

    def sizes(self) -> dict[str, int]:
        """Return what a checkpoint records: tensor, pipeline and virtual pipeline size."""
        return {"tp": self.tp, "pp": self.pp, "vpp": self.vpp}

    def problems(self, model: ModelConfig, rows: int | None = None) -> Iterator[tuple[str, str]]:
        """Yield (axis, rule) for each size under which Megatron could not hold a model.

        `rows` are those of the embedding, with its padding; None where they are not known.
        """
        if self.vpp > 1 and self.pp == 1:
            yield "vpp", "has no effect with pipeline size 1"
        for name, value in (
            ("num_attention_heads", model.num_attention_heads),
            ("ffn_hidden_size", model.ffn_hidden_size),
            ("the padded vocabulary", rows),
        ):
            if value is not None and value % self.tp:
                yield "tp", f"does not divide {name} {value}"
        groups = model.num_query_groups
        if groups % self.tp and self.tp % groups:
            yield "tp", f"neither divides nor is a multiple of num_query_groups {groups}"
        if model.num_layers % self.pieces:
            axis = "vpp" if self.vpp > 1 else "pp"
            yield axis, f"{model.num_layers} layers cannot be cut into {self.pieces} equal pieces"

    def suggest(self, axis: str, model: ModelConfig, rows: int | None = None) -> str:
        """Return the sizes up to 64 of an axis that work beside the others, as a fix."""
        sizes = [
            size
            for size in range(1, 65)
            if axis not in dict(dataclasses.replace(self, **{axis: size}).problems(model, rows))
        ]
        if axis != "vpp":
            return f"Use {', '.join(map(str, sizes))}"
        # One chunk on a stage is what an absent size means.
        larger = ", ".join(map(str, sizes[1:]))
        return f"Use {larger}, or leave it out" if larger else "Leave it out"

    def layers(self, model: ModelConfig, pp_rank: int, chunk: int) -> range:
        """Return the global numbers, from 0, of a chunk's layers; chunks go round the stages."""
        assert model.num_layers % self.pieces == 0, "see `problems`"
        count = model.num_layers // self.pieces
        first = (chunk * self.pp + pp_rank) * count
        return range(first, first + count)

    def layers_of_stage(self, model: ModelConfig, pp_rank: int) -> list[int]:
        """Return the global numbers, from 0, of all layers of a pipeline stage."""
        chunks = range(self.vpp)
        return [layer for chunk in chunks for layer in self.layers(model, pp_rank, chunk)]


def pad_rows(vocab_size: int, multiple: int) -> int:
    """Return the rows of an embedding that is padded to a multiple.

    In training the multiple does not depend on the layout: padded rows take part in the softmax.
    """
    return -(-vocab_size // multiple) * multiple
