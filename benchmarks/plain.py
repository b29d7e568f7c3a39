"""The yardsticks: the same Llama in plain PyTorch, as one would write it without a framework.

`PlainLlama` is nanoGPT-style code: nn.Linear, scaled_dot_product_attention, cross_entropy on whole logits. `BareLlama`
runs the operations that megalite runs (its kernels, fused projections, the loss in chunks) in one flat function, with
nothing around them: what megalite costs beyond it is the framework's own overhead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.config import ModelConfig
from megalite.kernels import Kernels
from megalite.kernels.cross_entropy import cross_entropy_loss
from megalite.model.rope import rope_table


def fastest_attention(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU cuDNN's fused attention where it takes the call, then FlashAttention; a CPU has one."""
    if device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True)


def rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos + torch.cat((-second, first), dim=-1) * sin


class PlainLayer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, dim = model.hidden_size, model.head_dim
        self.heads, self.kv_heads, self.dim = model.heads, model.kv_heads, dim
        self.norm1, self.norm2 = nn.RMSNorm(hidden, model.norm_eps), nn.RMSNorm(hidden, model.norm_eps)
        self.q = nn.Linear(hidden, model.heads * dim, bias=False)
        self.k = nn.Linear(hidden, model.kv_heads * dim, bias=False)
        self.v = nn.Linear(hidden, model.kv_heads * dim, bias=False)
        self.o = nn.Linear(model.heads * dim, hidden, bias=False)
        self.gate = nn.Linear(hidden, model.ffn_hidden_size, bias=False)
        self.up = nn.Linear(hidden, model.ffn_hidden_size, bias=False)
        self.down = nn.Linear(model.ffn_hidden_size, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x_BSH.shape
        h_BSH = self.norm1(x_BSH)
        q, k, v = (
            projection(h_BSH).view(batch, length, heads, self.dim).transpose(1, 2)
            for projection, heads in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSH = x_BSH + self.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        h_BSH = self.norm2(x_BSH)
        return x_BSH + self.down(functional.silu(self.gate(h_BSH)) * self.up(h_BSH))


class PlainLlama(nn.Module):
    """tokens [B, S], labels [B, S] -> mean loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.hidden_size, model.norm_eps)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rope_table(model.head_dim, model.max_positions, model.rope_theta, model.rope_scaling)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_BSH, length = self.embedding(tokens_BS), tokens_BS.shape[1]
        for layer in self.layers:
            x_BSH = layer(x_BSH, self.cos[:length], self.sin[:length])
        logits = self.head(self.norm(x_BSH))
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels_BS.flatten())


class BareLoss(torch.autograd.Function):
    """The loss over chunks of tokens, its gradient made on the way, as megalite's output layer does it."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, labels_N, kernels, vocab_size):  # type: ignore[no-untyped-def]
        grad_NH, grad_VH = torch.empty_like(hidden_NH), torch.zeros(weight_VH.shape)
        scale, loss = 1.0 / len(labels_N), torch.zeros((), dtype=torch.float64)
        for part in torch.arange(len(labels_N)).split(max(1, (1 << 22) // vocab_size)):
            chunk = slice(int(part[0]), int(part[-1]) + 1)
            logits, labels = hidden_NH[chunk] @ weight_VH.t(), labels_N[chunk]
            stats = kernels.cross_entropy_stats(logits, labels)
            loss += cross_entropy_loss(stats, labels, vocab_size=vocab_size).sum(dtype=torch.float64) * scale
            scales = torch.full((len(labels),), scale)
            grad = kernels.cross_entropy_grad_(logits, labels, stats, scales)
            torch.mm(grad, weight_VH, out=grad_NH[chunk])
            grad_VH += grad.t() @ hidden_NH[chunk]
        ctx.save_for_backward(grad_NH, grad_VH.to(weight_VH.dtype))
        return loss

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return *ctx.saved_tensors, None, None, None


class BareLlama(nn.Module):
    """megalite's operations in a row. Weights of a layer: norm1, qkv, o, norm2, gate_up, down."""

    def __init__(self, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        hidden, dim, ffn = model.hidden_size, model.head_dim, model.ffn_hidden_size
        self.model, self.kernels = model, kernels
        self.layer_weights = nn.ParameterList()
        for _ in range(model.layers):
            wide = (model.heads + 2 * model.kv_heads) * dim
            shapes = (
                (hidden,),
                (wide, hidden),
                (hidden, model.heads * dim),
                (hidden,),
                (2 * ffn, hidden),
                (hidden, ffn),
            )
            self.layer_weights.extend(
                nn.Parameter(torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02) for shape in shapes
            )
        self.embedding = nn.Parameter(torch.randn(model.vocab_size, hidden) * 0.02)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.head = nn.Parameter(torch.randn(model.vocab_size, hidden) * 0.02)
        self.cos, self.sin = rope_table(dim, model.max_positions, model.rope_theta, model.rope_scaling)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        model, kernels, length = self.model, self.kernels, tokens_BS.shape[1]
        x_SBH = functional.embedding(tokens_BS.t(), self.embedding)
        weights = list(self.layer_weights)
        for layer in range(0, len(weights), 6):
            norm1, qkv, out, norm2, gate_up, down = weights[layer : layer + 6]
            heads = (model.heads, model.kv_heads, model.kv_heads)
            joined = functional.linear(kernels.rms_norm(x_SBH, norm1, model.norm_eps), qkv)
            q, k, v = joined.unflatten(-1, (-1, model.head_dim)).split(heads, dim=2)
            q, k = kernels.rope(q, k, self.cos[:length], self.sin[:length])
            mixed = kernels.attention(q, k, v, causal=True).flatten(2)
            x_SBH, h_SBH = kernels.add_rms_norm(functional.linear(mixed, out), x_SBH, norm2, model.norm_eps)
            x_SBH = x_SBH + functional.linear(kernels.swiglu(functional.linear(h_SBH, gate_up)), down)
        hidden = kernels.rms_norm(x_SBH, self.norm, model.norm_eps).flatten(0, 1)
        return BareLoss.apply(hidden, self.head, labels_BS.t().flatten(), kernels, model.vocab_size)
