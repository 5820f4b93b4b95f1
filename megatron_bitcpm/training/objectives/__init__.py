"""What a run minimises: an objective (`base`) says what the loss of one micro-batch is.

* `next_token`: the cross entropy of the next token.
"""
