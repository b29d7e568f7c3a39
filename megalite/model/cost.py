"""What a token costs, and what the device could do: the numbers behind TFLOP/s and MFU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalite.config import ModelConfig

if TYPE_CHECKING:
    import torch

FORMULA = "6 * matmul parameters + 12 * layers * heads * head_dim * sequence, causal attention counted full"

# Dense bf16 matmul peak from the data sheets, FLOP/s, by a part of the device's name; the first match counts.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that every token is multiplied with: all matrices, with the output layer, without the embedding."""
    attention = model.hidden_size * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    return model.layers * (attention + feed_forward) + model.vocab_size * model.hidden_size


def parameter_count(model: ModelConfig) -> int:
    """All parameters of the model, exact."""
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    bias = model.head_dim * (model.heads + 2 * model.kv_heads) if model.attention_bias else 0
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    return matmul_parameters(model) + embedding + model.layers * (bias + norms) + model.hidden_size


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward, by `FORMULA`; recomputation does not count."""
    attention = 12 * model.layers * model.heads * model.head_dim * seq_length
    return 6.0 * matmul_parameters(model) + attention


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, None where it is not known (megalite does not guess)."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
