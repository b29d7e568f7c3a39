"""The machines: what a device computes, holds and moves, and which link a group of ranks talks over.

Rates are bytes or FLOPs a second, in one direction, for one device. The data sheets give the peaks; the efficiencies
are the one calibration of the planner, the same for all models and layouts, each with its reason beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalite.model.cost import PEAK_FLOPS

GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """One device and the node around it.

    `matmul_flops` is the data sheet's dense bf16 peak (MFU is counted against it; 0: not known), `memory` what a
    process can use in bytes (0: not known), `price` a usual price in dollars for a device-hour (0: none).
    """

    name: str
    matmul_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    per_node: int
    price: float
    matmul_efficiency: float
    attention_efficiency: tuple[float, float]
    """Forward and backward, of the FLOPs that causal attention needs (half of the square)."""
    fp32_flops: float = 0.0
    link_efficiency: float = 0.75
    """Of the link's peak that a large collective moves: 330 to 360 of 450 GB/s are seen on Hopper nodes."""
    network_efficiency: float = 0.8
    link_latency: float = 12e-6
    """Start of a collective or transfer inside a node, seconds."""
    network_latency: float = 25e-6
    """The same across nodes, for each doubling of the number of ranks."""
    layer_overhead: float = 350e-6
    """Host time to launch one layer's forward, seconds; a device that is faster than this waits for its host."""

    @property
    def is_gpu(self) -> bool:
        return self.memory > 0


# Large bf16 products: cuBLAS reaches 0.87 of the A100's peak; of the H100's and H200's 0.80 was measured
# (790 TFLOP/s), of which sustained work under the power limit keeps nine tenths. B200 is taken as the H100.
# Attention: flash attention's forward and backward over long causal sequences; the Hopper kernels reach more of the
# forward, and no kernel much more than 0.45 in the backward.
DEVICES: dict[str, Device] = {
    "a100": Device(
        name="NVIDIA A100 80 GB SXM",
        matmul_flops=PEAK_FLOPS["A100"],
        memory=79.1 * GIB,
        memory_bandwidth=2.04e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        per_node=8,
        price=1.8,
        matmul_efficiency=0.87,
        attention_efficiency=(0.55, 0.45),
    ),
    "h100": Device(
        name="NVIDIA H100 80 GB SXM",
        matmul_flops=PEAK_FLOPS["H100"],
        memory=79.1 * GIB,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        per_node=8,
        price=2.8,
        matmul_efficiency=0.72,
        attention_efficiency=(0.55, 0.42),
    ),
    "h200": Device(
        name="NVIDIA H200 141 GB SXM",
        matmul_flops=PEAK_FLOPS["H200"],
        memory=139.0 * GIB,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        per_node=8,
        price=3.5,
        matmul_efficiency=0.72,
        attention_efficiency=(0.55, 0.42),
    ),
    "b200": Device(
        name="NVIDIA B200 180 GB SXM",
        matmul_flops=PEAK_FLOPS["B200"],
        memory=178.0 * GIB,
        memory_bandwidth=7.7e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        per_node=8,
        price=5.0,
        matmul_efficiency=0.72,
        attention_efficiency=(0.50, 0.40),
    ),
    # One core of a server with matrix units (AMX), as measured for docs/LOG.md; its peak is not known, so no MFU. Ranks
    # on one machine talk through gloo over shared memory.
    "cpu": Device(
        name="CPU core",
        matmul_flops=0.0,
        memory=0.0,
        memory_bandwidth=8e9,
        link_bandwidth=1.5e9,
        network_bandwidth=1e9,
        per_node=64,
        price=0.0,
        matmul_efficiency=1.0,
        attention_efficiency=(0.6, 0.3),
        fp32_flops=150e9,
        link_efficiency=1.0,
        link_latency=200e-6,
        layer_overhead=500e-6,
    ),
}

CPU_BF16_FLOPS = 1.1e12
"""bf16 products of one core with AMX."""


def product_rate(device: Device, element_bytes: int) -> float:
    """FLOP/s of large matrix products."""
    if device.is_gpu:
        # fp32 runs without TF32, a sixteenth of the tensor cores' rate.
        return device.matmul_flops * device.matmul_efficiency / (1 if element_bytes == 2 else 16)
    return device.fp32_flops if element_bytes == 4 else CPU_BF16_FLOPS


@dataclass(frozen=True)
class Link:
    """The link of a group of ranks: bandwidth in bytes/s per rank, latency of one collective."""

    bandwidth: float
    latency: float
    crosses: bool
    """Whether the group leaves the node."""


def link(device: Device, size: int, stride: int) -> Link:
    """The link of a group of `size` ranks, `stride` apart in rank order (tensor: 1, data: tensor size, ...).

    Nodes hold consecutive ranks. A group with g ranks in each node has g network adapters to leave it, so a collective
    is limited by the slower of the node's links and g adapters.
    """
    inside = device.link_bandwidth * device.link_efficiency
    span = (size - 1) * stride + 1
    if span <= device.per_node and (device.per_node % stride == 0 or stride == 1):
        return Link(inside, device.link_latency, False)
    members = max(1, device.per_node // stride) if stride < device.per_node else 1
    outside = device.network_bandwidth * device.network_efficiency * min(members, size)
    latency = device.network_latency * max(1.0, math.log2(max(2, size)))
    return Link(min(inside, outside), latency, True)


def transfer_link(device: Device, stride: int) -> Link:
    """Neighbours in the pipeline, `stride` ranks apart: one adapter each."""
    if stride < device.per_node:
        return Link(device.link_bandwidth * device.link_efficiency, device.link_latency, False)
    return Link(device.network_bandwidth * device.network_efficiency, device.network_latency, True)


def ring_link(device: Device, size: int, stride: int) -> Link:
    """Each of `size` ranks, `stride` apart, sends to the next. A step takes as long as the pair that leaves a node."""
    over = link(device, size, stride)
    if not over.crosses:
        return over
    return Link(device.network_bandwidth * device.network_efficiency, device.network_latency, True)


def exchange_seconds(own_bytes: float, size: int, device: Device, stride: int) -> float:
    """An all-to-all: every rank sends `own_bytes` in equal parts, those for other nodes by its adapter."""
    if size == 1:
        return 0.0
    over, part = link(device, size, stride), own_bytes / size
    near = min(size, max(1, device.per_node // stride)) if over.crosses else size
    inside = (near - 1) * part / (device.link_bandwidth * device.link_efficiency)
    outside = (size - near) * part / (device.network_bandwidth * device.network_efficiency) if over.crosses else 0.0
    return over.latency + max(inside, outside)


def gather_seconds(total_bytes: float, size: int, over: Link) -> float:
    """An all-gather to, or reduce-scatter of, `total_bytes` on each of `size` ranks (ring: (n-1)/n of them move)."""
    if size == 1 or total_bytes == 0:  # nothing is sent
        return 0.0
    return over.latency + total_bytes * (size - 1) / size / over.bandwidth
