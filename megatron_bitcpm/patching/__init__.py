"""The place of the Megatron-LM and MindSpeed adaptors. Empty so far.

Will hold the catalogue of patches (each with target, reason, versions and exit) and the one-line
plug-in for users of `pretrain_gpt.py`. `ternarize_` needs none of it.
"""
