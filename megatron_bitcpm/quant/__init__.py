"""The reference mathematics of the quantisers, in pure torch.

`groups` (how groups lie in full and in sharded shapes), `sums` (the one defined order of
summation), `grids` (the levels), `scales`, `fake_quant` (codes and values), `packing` (two bits per
code), `activation` (int8 per token). A new grid is one row in `grids`.
Compiled kernels live in `megatron_bitcpm.ops`; they equal these functions bit for bit.
"""
