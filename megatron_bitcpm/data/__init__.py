"""From text to micro-batches: `tokenizer_train`, `prepare`, then `dataset`.

Importing this package imports neither megatron nor transformers.
"""
