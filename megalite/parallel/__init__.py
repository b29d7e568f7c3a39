"""Parallelism: collectives, tensor, pipeline, data."""
