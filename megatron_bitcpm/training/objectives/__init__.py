"""What a run minimises: an objective (`base`) says what the loss of one micro-batch is."""
