"""Training checkpoints: Megatron's distributed format, complete or absent."""
