"""A row's model as transformers describes it; picotron reads the same class."""

from __future__ import annotations

from train_job import Job
from transformers import LlamaConfig


def llama_config(job: Job) -> LlamaConfig:
    """The job's model. Rotary base and epsilon are megalite's defaults where the preset names none."""
    shape = job.shape
    rope_theta = shape.get("rope_theta", 10000.0)
    config = LlamaConfig(  # type: ignore[call-arg]  # rope_theta, which newer transformers take by **kwargs
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=shape["max_positions"],
        rms_norm_eps=1e-5,
        rope_theta=rope_theta,
        tie_word_embeddings=shape.get("tie_embeddings", False),
        use_cache=False,
    )
    config.rope_theta = rope_theta  # picotron reads it here, where newer transformers no longer keep it
    return config
