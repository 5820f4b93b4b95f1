"""Model families, built from stock megatron.core modules."""
