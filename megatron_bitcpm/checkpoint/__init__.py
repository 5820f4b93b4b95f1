"""Checkpoints: Megatron's distributed format, and its translation to and from Hugging Face.

* `store`: folders on disk, complete or absent.
* `state`: what a checkpoint holds and how it comes back.
* `reader`: full tensors out of a checkpoint, without building a model.
* `megatron_to_hf`: the Hugging Face folder; `verify`: the proof that it equals the checkpoint.
"""
