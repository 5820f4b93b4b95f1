"""The place of formats for other runtimes: GGUF and packed 2-bit files. Empty so far.

The Hugging Face folder is written by `megatron_bitcpm.checkpoint`.
"""
