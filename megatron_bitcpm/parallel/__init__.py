"""The ternary linears and what keeps them right in parallel runs.

Start with `linear`, then `convert` (`ternarize_`) and `requantize` (when weights are quantised).
Only this folder, `patching`, `platforms` and, for its files, `checkpoint.writer` and
`checkpoint.safe_load` touch names of Megatron that are not public.
"""
