"""The training loop and the process around it."""
