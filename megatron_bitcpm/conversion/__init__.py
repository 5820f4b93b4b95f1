"""Models between formats, tensor by tensor: Megatron, Hugging Face; and the proof that they agree.

* `source`: `ModelSource`, a model of any format under Hugging Face's names; `open` opens one.
* `names`: the table between Megatron's fused linears and Hugging Face's projections.
* `stamp`: the quantiser of a model, and the values of the training forward.
* `hf`, `megatron`: readers and writers of the two families of formats.
* `convert`: one call for every conversion; `qat_convert`: a single file of latents.
* `verify`: proves one model sound, or two the same; `inspect`: says what a model is.

Everything is read and written one tensor at a time. No process group and no Megatron is needed.
"""
