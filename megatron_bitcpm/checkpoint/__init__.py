"""Training checkpoints: Megatron's distributed format, complete or absent.

Other formats are in `megatron_bitcpm.conversion`.
"""
