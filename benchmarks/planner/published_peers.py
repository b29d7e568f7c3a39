"""How other programs work, as far as their published numbers depend on it: one description a program, none a number.

The layouts, models and machines are predicted by the same code as megalite's. What differs is said here, with the
reason: which kernels a program had, what it wrote to memory, what it hid under what.
"""

from __future__ import annotations

import dataclasses

from megalite.planning.architecture import vocabulary_rows
from megalite.planning.hardware import DEVICES, GIB, Device
from megalite.planning.job import Job, Practice
from megalite.planning.memory import FRAGMENTATION
from megalite.planning.states import stage_elements

MEGATRON_2021 = Practice(
    name="Megatron-LM, 2021",
    explicit_attention=True,  # before flash attention
    elementwise=2.0,  # biases, dropout and LayerNorm as kernels of their own; bias + GELU fused
    logit_bytes=34.0,  # fp32 copy of the logits, three passes over it, gradient in fp32
    loss_in_forward=False,
    overlaps_tensor="none",
)

DEEPSPEED_2021 = dataclasses.replace(
    MEGATRON_2021,
    name="DeepSpeed ZeRO-3, 2021",
    # Each parameter was gathered alone. With 174.6 B parameters a micro-batch took 65 s on 768 and on 1536 GPUs,
    # whatever was computed beside: 22 GB/s for a GPU where its node's eight adapters could move 160.
    gather_efficiency=0.14,
)

MEGATRON_2024 = Practice(
    name="Megatron-LM, 2024",
    elementwise=1.3,  # Transformer Engine fuses norms and SwiGLU; residual and dropout kernels remain
    logit_bytes=24.0,
    loss_in_forward=False,
    gradient_bytes=8.0,  # the product adds to the fp32 gradient itself
    overlaps_tensor="all",  # its README: collectives are overlapped in pieces with the products
    hiding_cost=0.0,  # its pieces are copied by the device's copy engines
)

TORCHTITAN_COMPILED = Practice(
    name="torchtitan, compiled",
    elementwise=1.3,
    logit_bytes=40.0,  # the loss was not compiled: bf16 logits, fp32 copy, log-softmax, two fp32 gradients
    loss_in_forward=False,
    gradient_bytes=4.0,  # one micro-batch a step: a bf16 gradient, reduced in fp32
    attention=0.7,  # flash attention 2, which was made for the A100
    overlaps_tensor="none",
)

TORCHTITAN_EAGER = dataclasses.replace(
    TORCHTITAN_COMPILED,
    name="torchtitan, eager",
    elementwise=4.0,  # norms, rotation (in complex fp32), SwiGLU and sums: every operation reads and writes
)

NANOTRON = Practice(
    name="nanotron, 2025",
    elementwise=2.5,
    logit_bytes=34.0,
    loss_in_forward=False,
    attention=0.7,  # flash attention 2
    overlaps_tensor="none",
)

# Hopper with 96 GB of HBM2e, 2.4 TB/s, 500 W instead of 700 W: products run at the power limit, near the lowest
# voltage, where the clock goes almost with the power.
H100_500W: Device = dataclasses.replace(
    DEVICES["h100"],
    name="NVIDIA H100 96 GB HBM2e, 500 W",
    memory=95.0 * GIB,
    memory_bandwidth=2.4e12,
    matmul_efficiency=DEVICES["h100"].matmul_efficiency * 0.8,
    attention_efficiency=(0.44, 0.34),
)


def torchtitan_memory(job: Job, *, compiled_loss: bool) -> float:
    """Bytes that torchtitan's allocator reserves on a rank, FSDP over `job.data` and tensor parallel, no pipeline.

    Parameters, gradients and both moments are fp32 shards; whole in bf16 are two layers' weights, one layer's and the
    output layer's gradients. `selective` is its per-operator policy: it keeps attention's output and every second
    product (of query, key, value, output, gate, down, up: the first, third, fifth and seventh). The loss holds all
    logits: eager as fp32 log-softmax with two gradients beside it, over split vocabularies (loss_parallel) four such
    tensors; compiled as bf16 logits and their gradient.
    """
    architecture, layer, hidden = job.architecture, job.layer, job.architecture.model.hidden_size
    elements = stage_elements(job, 0)
    rows, tokens = vocabulary_rows(architecture, job.tensor), job.tokens
    states = 16.0 * elements / job.data
    whole = 2.0 * (3 * layer.sizes.elements + 2 * rows * hidden)
    stream = hidden / job.tensor
    if job.recompute == "selective":
        products = layer.query + layer.key + layer.ffn + stream
        kept = 2.0 * (stream + layer.query + products) + 4.0 * layer.queries
    else:
        kept = 2.0 * stream
    logits = tokens * rows * (4.0 if compiled_loss else 12.0 if job.tensor == 1 else 16.0)
    entered = (
        2.0 * tokens * hidden * (2 if job.tensor > 1 else 1)
    )  # the output layer's input, gathered, and its gradient
    activations = architecture.model.layers * tokens * kept
    return (states + whole + activations + logits + entered) * (1 + FRAGMENTATION["cuda"])
