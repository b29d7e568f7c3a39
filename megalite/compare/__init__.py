"""Two runs of the same global batch, compared tensor by tensor in the order of execution."""
