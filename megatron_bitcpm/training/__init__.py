"""The trainer: `trainer.train` runs what a configuration describes, on megatron.core alone."""
