"""Code that goes into Hugging Face folders, and the writer that puts it there.

`modeling_bitcpm.py` is copied byte for byte and runs outside this package: it imports torch and
transformers only.
"""
