"""Layer 1: the reference mathematics of the quantisers, in pure torch.

One file per grid (`ternary`), beside what every grid shares: `groups` (how groups lie in full and
in sharded shapes) and `sums` (the one defined order of summation). A new grid is one new file here.
Compiled kernels live in `megatron_bitcpm.ops`; they equal these functions bit for bit.
"""
