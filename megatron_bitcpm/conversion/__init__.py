"""Models between formats, tensor by tensor: Megatron, Hugging Face; and the proof that they agree.

* `source`: `ModelSource`, a model of any format under Hugging Face's names; `open` opens one.
* `hf`, `megatron`: readers and writers of the two families of formats.
* `convert`, `options`, `output_folder`: one call for every conversion, and what it may replace;
  `qat_convert`: a single file of latents.
* `verify`, `comparison`, `difference`: prove one model sound, or two the same.
* `inspect`, `derive_architecture`, `projection_totals`, `inspect_text`: say what a model is.
* `codes`, `infer_grid`, `quantization_error`: what stored values tell about their quantiser.
* `file_source`, `tensor_stream`, `torch_file_writer`: tensors from and to single files.

Everything is read and written one tensor at a time. No process group and no Megatron is needed.
"""
