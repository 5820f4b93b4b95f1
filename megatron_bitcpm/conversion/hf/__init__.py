"""Hugging Face folders: reading, writing, and the modelling file of those that need one.

* `source`, `config`, `rope`, `tensor_files`: reading.
* `writer`, `safetensors_writer`, `bin_writer`, `model_card`: writing.
* `fold`: MiniCPM's constants multiplied into the weights of a plain Llama.
* `modeling`: the file that goes into folders whose model transformers does not know.
"""
