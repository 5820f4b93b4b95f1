"""The ternary linears and what keeps them right in parallel runs.

* `linear`: the ternary linear (start here); `site`: what it knows beyond Megatron's module.
* `convert`: `ternarize_`, which swaps the linears of a built model.
* `requantize`: when weights are quantised: in every forward, or in place after each step;
  `every_step_check`: whether an optimizer allows quantising in place.
* `scale_sync`: scales of rows and projections that span tensor-parallel ranks.
* `projections`: whose rows are whose inside fused weights, for one scale per projection.
* `weight_stats`: statistics of the codes, by layer.
* `agree`: failures and decisions that all ranks share.
* `megatron_api`: calls that differ between releases of megatron-core; `version`: the tested ones.
* `optimizer_state`: the optimizer's part of a checkpoint, loadable in other layouts.
* `optimizer_parts`: what is inside a Megatron optimizer.
* `adam_step`: a guard for optimizers loaded without Apex and Transformer Engine.

Only this folder and `platforms` touch names of Megatron that are not public, and
`checkpoint.writer`, for the format of the files.
"""
