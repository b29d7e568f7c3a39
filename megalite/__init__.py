"""megalite: a 3D-parallel trainer for Llama-family language models."""

__version__ = "0.1.0"
