"""Megatron checkpoints: torch_dist and legacy ``mp_rank_*`` shards, at any layout.

* `folder`, `open`: which folder a path means, and how it is opened.
* `source`: fused weights as a `ModelSource`; `torch_dist_reader`, `legacy_reader` fill it.
* `shards`: what each rank of a layout holds; `torch_dist_writer`, `legacy_writer` write it,
  `output` makes the folder around it.
* `stock_args`: the argparse.Namespace that Megatron keeps in its checkpoints.
"""
