"""What a model is made of, without torch where it can be helped.

* `tensors`: THE MAP, one row for each tensor of a layer and of a model; families, names by format.
* `model`: `ModelConfig`, the architecture of one model, and what follows from it.
* `layout`: how a model lies over ranks. `counts`: parameters, FLOPs, ternary linears.
* `folding`: the constants of a MiniCPM that became part of a Llama.
* `hf_config`, `hf_rope`: the architecture in a Hugging Face config.json, in both directions.
"""
