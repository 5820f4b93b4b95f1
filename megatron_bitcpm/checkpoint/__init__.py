"""Training checkpoints: Megatron's distributed format, complete or absent.

* `store`: folders on disk.
* `state`: what a checkpoint holds and how it comes back.
* `safe_load`: no pickle of a checkpoint can run code; `pickle_names`: what one may refer to;
  `strict_pickle`: nor can one crash the reader or keep it busy.

What does not live here: other formats, see `megatron_bitcpm.conversion`.
"""
