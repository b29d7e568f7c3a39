"""Rotary position embedding: the table of angles, with the scalings that extend a model's context.

Half-split layout (Hugging Face, GPT-NeoX): channel i is rotated with channel i + D / 2. Sources: Su et al. 2021
(RoPE), the Llama 3.1 release (`llama3` scaling), Peng et al. 2023 (YaRN, section 3.2 and equation 22).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megalite.config.rope_scaling import yarn_magnitude


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """The D / 2 frequencies in radians per position (fp32), and the factor on cosine and sine."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    speeds = 1.0 / theta**exponents
    return _SCALINGS[scaling["type"]](speeds, theta, scaling) if scaling else (speeds, 1.0)


def _linear(speeds: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """All frequencies are divided by `factor`."""
    return speeds / scaling["factor"], 1.0


def _llama3(speeds: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Low frequencies are divided by `factor`, high ones are kept, those in between are blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    turns = original * speeds / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    blended = (1 - blend) * speeds / factor + blend * speeds
    wavelength = 2 * math.pi / speeds
    slow, fast = wavelength > original / low, wavelength < original / high
    return torch.where(slow, speeds / factor, torch.where(fast, speeds, blended)), 1.0


def _yarn(speeds: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Channels with many rotations within the original context are kept, those with few are interpolated."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    head_dim = 2 * len(speeds)

    def channel(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.get("beta_fast", 32.0)), channel(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0.0, 1.0)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        magnitude = _yarn_magnitude(factor, scaling.get("mscale"), scaling.get("mscale_all_dim"))
    return speeds / factor * (1 - keep) + speeds * keep, float(magnitude)


def _yarn_magnitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    if mscale and mscale_all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return yarn_magnitude(factor)


_SCALINGS: Mapping[str, Callable[[Tensor, float, Mapping[str, Any]], tuple[Tensor, float]]] = MappingProxyType(
    {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
)
"""By type of `megalite.config.rope_scaling`: the scaled frequencies, and the factor on cosine and sine."""


def rope_table(head_dim: int, positions: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, D], fp32; the two halves of the channels are equal."""
    speeds, magnitude = inverse_frequencies(head_dim, theta, scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), speeds)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * magnitude, angles.sin() * magnitude
