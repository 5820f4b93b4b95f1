"""Hugging Face folders: reading, writing, and the modelling file of those that need one.

* `source`, `config`, `tensor_files`: reading.
* `writer`, `weight_files`, `tensor_writers`, `side_files`, `model_card`: writing.
* `fold`: MiniCPM's constants multiplied into the weights of a plain Llama.
* `modeling`: the file that goes into folders whose model transformers does not know.
"""
