"""What others have measured and published, beside what the planner predicts for it.

Every number has its source, and says how its FLOPs were counted: attention's square `full` or `half`, recomputation
included (hardware FLOPs) or not (model FLOPs). Where a publication leaves something out that a prediction needs, what
is assumed stands beside it.

    Megatron 2021    Narayanan et al., arXiv:2104.04473, tables 1 and 2: A100, s 2048, full square, with recomputation
    MT-NLG           Smith et al., arXiv:2201.11990, section 2.4: the same way of counting
    Megatron H100    table of models in Megatron-LM's README: s 4096, V 131072, full square, without recomputation
    torchtitan       its benchmarks/ of December 2024 and June 2025, and docs/performance.md of April 2024 (A100)
    nanotron         scripts/scaling_benchmarks.py, comments: full square, without recomputation
    exchanges        flux issue 90 and kraken pull request 19: cuBLAS, then NCCL, on 8 H100
    ZeRO             Rajbhandari et al., arXiv:1910.02054, figure 1
    LLaMA, Llama 3   sizes from Touvron et al. 2023, table 2, and Grattafiori et al. 2024, table 3
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.planner import published_peers as peers
from benchmarks.planner.gpt import Gpt
from megalite.config import ModelConfig
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES, Device, gather_seconds, link
from megalite.planning.job import Job, Practice
from megalite.planning.stage_time import product_seconds
from megalite.planning.states import state_bytes
from megalite.planning.step_time import step_time


@dataclass(frozen=True)
class Point:
    """One published number and the prediction, in one unit. `group`: points whose order is compared."""

    name: str
    unit: str
    published: float
    predicted: float
    group: str = ""
    note: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def gpt(layers: int, hidden: int, heads: int, vocabulary: int, positions: int, tied: bool = True) -> Gpt:
    model = ModelConfig(
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        heads=heads,
        vocab_size=vocabulary,
        max_positions=positions,
        tie_embeddings=tied,
    )
    return Gpt(model)


def llama(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> Architecture:
    return Architecture(
        ModelConfig(
            layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            heads=heads,
            kv_heads=kv_heads,
            vocab_size=vocabulary,
            tie_embeddings=tied,
        )
    )


LLAMA_7B = llama(32, 4096, 11008, 32, 32, 32000)
LLAMA_13B = llama(40, 5120, 13824, 40, 40, 32000)
LLAMA_33B = llama(60, 6656, 17920, 52, 52, 32000)
LLAMA_65B = llama(80, 8192, 22016, 64, 64, 32000)
LLAMA2_70B = llama(80, 8192, 28672, 64, 8, 32000)
LLAMA3_8B = llama(32, 4096, 14336, 32, 8, 128256)
LLAMA3_70B = llama(80, 8192, 28672, 64, 8, 128256)
LLAMA3_405B = llama(126, 16384, 53248, 128, 8, 128256)
MT_NLG = gpt(105, 20480, 128, 50272, 2048)
GPT_3 = gpt(96, 12288, 96, 51200, 2048)
NANOTRON_3B = llama(28, 3072, 8192, 32, 32, 131072, tied=True)

# Billions of parameters, hidden, layers, heads, tensor, pipeline, GPUs, batch, TFLOP/s a GPU.
MEGATRON_2021: tuple[tuple[float, int, int, int, int, int, int, int, float], ...] = (
    (1.7, 2304, 24, 24, 1, 1, 32, 512, 137),
    (3.6, 3072, 30, 32, 2, 1, 64, 512, 138),
    (7.5, 4096, 36, 32, 4, 1, 128, 512, 142),
    (18.4, 6144, 40, 48, 8, 1, 256, 1024, 135),
    (39.1, 8192, 48, 64, 8, 2, 512, 1536, 138),
    (76.1, 10240, 60, 80, 8, 4, 1024, 1792, 140),
    (145.6, 12288, 80, 96, 8, 8, 1536, 2304, 148),
    (310.1, 16384, 96, 128, 8, 16, 1920, 2160, 155),
    (529.6, 20480, 105, 128, 8, 35, 2520, 2520, 163),
    (1008.0, 25600, 128, 160, 8, 64, 3072, 3072, 163),
)
MEGATRON_H100: tuple[tuple[float, int, int, int, int, int, int, int, float], ...] = (
    (1.7, 2048, 24, 16, 1, 1, 48, 192, 408.8),
    (7.1, 4096, 30, 32, 2, 1, 96, 192, 465.9),
    (16, 6144, 32, 48, 4, 1, 192, 192, 489.1),
    (32, 7168, 48, 56, 8, 1, 384, 192, 459.6),
    (70, 8192, 84, 64, 8, 2, 768, 384, 419.7),
    (119, 10240, 92, 80, 8, 4, 1536, 768, 420.5),
    (177, 12288, 96, 96, 8, 6, 2304, 1152, 432.8),
    (314, 16384, 96, 128, 8, 8, 3072, 1536, 474.4),
    (462, 18432, 112, 144, 8, 16, 6144, 3072, 459.9),
)
# Model, scheme, tensor * pipeline, batch, GPUs, micro-batch, TFLOP/s a GPU.
MEGATRON_AGAINST_ZERO = (
    ("174.6 B", "ZeRO-3", 1, 1536, 384, 4, 144),
    ("174.6 B", "ZeRO-3", 1, 1536, 768, 2, 88),
    ("174.6 B", "ZeRO-3", 1, 1536, 1536, 1, 44),
    ("174.6 B", "tensor and pipeline", 96, 1536, 384, 1, 153),
    ("174.6 B", "tensor and pipeline", 96, 1536, 768, 1, 149),
    ("174.6 B", "tensor and pipeline", 96, 1536, 1536, 1, 141),
    ("529.6 B", "ZeRO-3", 1, 2560, 640, 4, 138),
    ("529.6 B", "ZeRO-3", 1, 2240, 1120, 2, 98),
    ("529.6 B", "ZeRO-3", 1, 2240, 2240, 1, 48),
    ("529.6 B", "tensor and pipeline", 280, 2240, 560, 1, 171),
    ("529.6 B", "tensor and pipeline", 280, 2240, 1120, 1, 167),
    ("529.6 B", "tensor and pipeline", 280, 2240, 2240, 1, 159),
)
# GPUs, seconds an iteration, TFLOP/s a GPU; tensor 8, pipeline 35, batch 1920.
MT_NLG_RUNS = ((2240, 60.1, 126), (2800, 50.2, 121), (3360, 44.4, 113))
# Tensor ranks, micro-batch, TFLOP/s a GPU, tokens/s a GPU.
NANOTRON_TENSOR = (
    (2, 3, 363.66, 14167.25),
    (4, 9, 345.51, 13460.16),
    (8, 18, 279.50, 10888.53),
    (16, 40, 158.10, 6159.30),
    (32, 90, 92.66, 3609.73),
)
# Source, inner and outer features of one rank's product; milliseconds with the reduce-scatter after it, by rows.
EXCHANGES: tuple[tuple[str, int, int, dict[int, float]], ...] = (
    ("flux", 3584, 8192, {1024: 0.18, 2048: 0.2895, 4096: 0.54225, 8192: 1.04, 16384: 2.01063, 32768: 3.978}),
    ("kraken", 14336, 4096, {512: 0.133653, 1024: 0.223621, 2048: 0.422704}),
)


def parameter_points() -> list[Point]:
    """Billions of parameters, to the digits that were published."""
    points = [
        Point(f"GPT {row[0]} B (Megatron 2021)", "B", row[0], round(size.parameters / 1e9, 1))
        for row in MEGATRON_2021
        for size in (gpt(row[2], row[1], row[3], 51200, 2048),)
    ]
    for row in MEGATRON_H100:
        size = gpt(row[2], row[1], row[3], 131072, 4096, tied=False)
        digits = 1 if row[0] < 10 else 0
        points.append(Point(f"GPT {row[0]} B (Megatron H100)", "B", row[0], round(size.parameters / 1e9, digits)))
    models: tuple[tuple[str, Architecture, float, int], ...] = (
        ("LLaMA 7B", LLAMA_7B, 6.7, 1),
        ("LLaMA 13B", LLAMA_13B, 13.0, 1),
        ("LLaMA 33B", LLAMA_33B, 32.5, 1),
        ("LLaMA 65B", LLAMA_65B, 65.2, 1),
        ("Llama 3 8B", LLAMA3_8B, 8.03, 2),
        ("Llama 3 70B", LLAMA3_70B, 70.6, 1),
        ("Llama 3 405B", LLAMA3_405B, 405.0, 0),
        ("nanotron 3.57B", NANOTRON_3B, 3.57, 2),
    )
    points += [
        Point(name, "B", published, round(model.parameters / 1e9, digits)) for name, model, published, digits in models
    ]
    return points


def flops_points() -> list[Point]:
    """FLOPs that follow from a publication's own rate and time: of a step, of a token, or of a whole run."""
    points = [
        Point(
            f"MT-NLG 530B, a step, {gpus} GPUs",
            "FLOP",
            gpus * seconds * rate * 1e12,
            1920 * 2048 * MT_NLG.flops_per_token(2048, "full", "full"),
            note="full square, with recomputation",
        )
        for gpus, seconds, rate in MT_NLG_RUNS
    ]
    for tensor, _, rate, tokens in NANOTRON_TENSOR:
        predicted = NANOTRON_3B.flops_per_token(4096)
        name = f"nanotron 3.57B, a token, tensor {tensor}"
        points.append(Point(name, "FLOP", rate * 1e12 / tokens, predicted, note="full square"))
    for name, size, tokens, utilisation in (
        ("torchtitan Llama 2 13B, a token, no recomputation", LLAMA_13B, 2162, 0.611),
        ("torchtitan Llama 2 13B, a token, selective", LLAMA_13B, 1904, 0.538),
        ("torchtitan Llama 2 70B, a token, full", LLAMA2_70B, 353, 0.505),
    ):
        note = "full square; they count the embedding, too"
        points.append(Point(name, "FLOP", utilisation * 312e12 / tokens, size.flops_per_token(4096), note=note))
    for tokens, share in ((5762, 0.33), (6667, 0.39)):
        note = "full square; the share is published in whole percent"
        published = share * 989e12 / tokens
        points.append(
            Point(
                f"torchtitan Llama 3 8B, a token, {share:.0%}",
                "FLOP",
                published,
                LLAMA3_8B.flops_per_token(8192),
                note=note,
            )
        )
    return points


def titan_job(size: Architecture, data: int, tensor: int, batch: int, recompute: str, **more: object) -> Job:
    values = {"seq_length": 8192, "device": peers.H100_500W, "practice": peers.TORCHTITAN_COMPILED} | more
    return Job(
        architecture=size,
        micro_batch_size=batch,
        micro_batches=1,
        data=data,
        tensor=tensor,
        sequence=tensor > 1,
        zero=3,
        recompute=recompute,
        **values,  # type: ignore[arg-type]
    )


def memory_points() -> list[Point]:
    """GiB that a run reserved, and the states of the ZeRO paper."""
    h200: Device = DEVICES["h200"]
    points = []
    for name, job, published, compiled, note in (
        ("Llama 3 8B, FSDP 8, eager", titan_job(LLAMA3_8B, 8, 1, 2, "selective"), 82.4, False, ""),
        ("Llama 3 8B, FSDP 8, compiled", titan_job(LLAMA3_8B, 8, 1, 2, "selective"), 77.0, False, ""),
        ("Llama 3 8B, FSDP 128, eager", titan_job(LLAMA3_8B, 128, 1, 2, "selective"), 67.0, False, ""),
        ("Llama 3 8B, FSDP 128, compiled", titan_job(LLAMA3_8B, 128, 1, 2, "selective"), 62.0, False, ""),
        ("Llama 3 8B, FSDP 8, s 32768", titan_job(LLAMA3_8B, 8, 1, 1, "full", seq_length=32768), 83.9, False, "fp8"),
        ("Llama 3 8B, FSDP 32, H200", titan_job(LLAMA3_8B, 32, 1, 2, "selective", device=h200), 47.96, True, "fp8"),
        ("Llama 3 8B, FSDP 64, H200", titan_job(LLAMA3_8B, 64, 1, 2, "selective", device=h200), 46.97, True, "fp8"),
        ("Llama 3 70B, FSDP 32, tensor 8", titan_job(LLAMA3_70B, 32, 8, 16, "full"), 71.9, False, "fp8"),
    ):
        predicted = peers.torchtitan_memory(job, compiled_loss=compiled) / 2**30
        points.append(Point(f"torchtitan {name}", "GiB", published, predicted, note=note))
    for zero, published in ((0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)):
        states = sum(state_bytes(7.5e9, 64, zero, gradient=2).values()) / 1e9
        points.append(Point(f"ZeRO-{zero}, 7.5 B, 64 GPUs, states", "GB", published, states))
    return points


def _speed(name: str, job: Job, published: float, group: str, recompute: str = "none", note: str = "") -> Point:
    """TFLOP/s a device, counted as published: full square, with recomputation where `recompute` says so."""
    flops = job.architecture.flops_per_token(job.seq_length, "full", recompute)
    rate = job.tokens_per_step / step_time(job).seconds / job.world
    return Point(name, "TFLOP/s", published, flops * rate / 1e12, group, note)


def _gpt_job(
    size: Architecture,
    practice: Practice,
    device: Device,
    parallel: tuple[int, int],
    gpus: int,
    batch: int,
    micro: int = 1,
) -> Job:
    tensor, pipeline = parallel
    data = gpus // (tensor * pipeline)
    return Job(
        architecture=size,
        device=device,
        seq_length=size.model.max_positions,
        micro_batch_size=micro,
        micro_batches=batch // (data * micro),
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        sequence=practice is peers.MEGATRON_2024,
        zero=1 if practice is peers.MEGATRON_2024 else 0,
        recompute="full" if practice is not peers.MEGATRON_2024 else "selective",
        practice=practice,
    )


def _megatron_points() -> list[Point]:
    a100, points = DEVICES["a100"], []
    for old in MEGATRON_2021:
        billions, hidden, layers, heads, tensor, pipeline, gpus, batch, rate = old
        size = gpt(layers, hidden, heads, 51200, 2048)
        micro = 4 if pipeline == 1 else 1
        job = _gpt_job(size, peers.MEGATRON_2021, a100, (tensor, pipeline), gpus, batch, micro)
        note = f"micro-batch not published, {micro} assumed"
        points.append(_speed(f"Megatron 2021, {billions} B", job, rate, "Megatron 2021, sizes", "full", note))
    for new in MEGATRON_H100:
        billions, hidden, layers, heads, tensor, pipeline, gpus, batch, rate = new
        size = gpt(layers, hidden, heads, 131072, 4096, tied=False)
        job = _gpt_job(size, peers.MEGATRON_2024, DEVICES["h100"], (tensor, pipeline), gpus, batch)
        note = "micro-batch 1 and no interleaving assumed"
        points.append(_speed(f"Megatron H100, {billions} B", job, rate, "Megatron H100, sizes", note=note))
    for gpus, _, rate in MT_NLG_RUNS:
        job = _gpt_job(MT_NLG, peers.MEGATRON_2021, a100, (8, 35), gpus, 1920)
        points.append(_speed(f"MT-NLG 530B, {gpus} GPUs", job, rate, "MT-NLG, copies", "full"))
    return points


def _zero_points() -> list[Point]:
    sizes, points = {"174.6 B": GPT_3, "529.6 B": gpt(105, 20480, 128, 51200, 2048)}, []
    for size, scheme, parallel, batch, gpus, micro, rate in MEGATRON_AGAINST_ZERO:
        practice = peers.DEEPSPEED_2021 if parallel == 1 else peers.MEGATRON_2021
        layout = {1: (1, 1), 96: (8, 12), 280: (8, 35)}[parallel]
        job = _gpt_job(sizes[size], practice, DEVICES["a100"], layout, gpus, batch, micro)
        if parallel == 1:
            job = dataclasses.replace(job, zero=3)
        note = "calibrates ZeRO-3's gathering" if (size, scheme, gpus) == ("174.6 B", "ZeRO-3", 768) else ""
        points.append(_speed(f"{scheme} {size}, {gpus} GPUs", job, rate, f"schemes, {size}", "full", note))
    return points


def _titan_points() -> list[Point]:
    def rate(tokens: float, size: Architecture) -> float:
        return size.flops_per_token(8192) * tokens / 1e12

    eager = peers.TORCHTITAN_EAGER
    rows = [
        ("8B, FSDP 8, eager", titan_job(LLAMA3_8B, 8, 1, 2, "selective", practice=eager), 5762, "eager"),
        ("8B, FSDP 128, eager", titan_job(LLAMA3_8B, 128, 1, 2, "selective", practice=eager), 5605, "eager"),
        ("8B, FSDP 8", titan_job(LLAMA3_8B, 8, 1, 2, "selective"), 6667, "8B layouts"),
        ("8B, FSDP 128", titan_job(LLAMA3_8B, 128, 1, 2, "selective"), 6514, "8B layouts"),
        ("8B, FSDP 8, tensor 8", titan_job(LLAMA3_8B, 8, 8, 12, "selective"), 4378, "8B layouts"),
        ("70B, FSDP 32, tensor 8", titan_job(LLAMA3_70B, 32, 8, 16, "full"), 597.3, ""),
    ]
    return [
        _speed(f"torchtitan {name}", job, rate(tokens, job.architecture), f"torchtitan {group}" if group else "")
        for name, job, tokens, group in rows
    ]


def _interleaving_points() -> list[Point]:
    """Both ran in fp8 with asynchronous tensor parallelism, which is not modelled: only their ratio can be compared."""
    base = dataclasses.replace(titan_job(LLAMA3_405B, 8, 8, 4, "full"), pipeline=8, micro_batches=8)
    runs = {
        "1F1B": dataclasses.replace(base, schedule="1f1b"),
        "interleaved": dataclasses.replace(base, schedule="interleaved", virtual_stages=2),
    }
    seconds = {name: step_time(job).seconds for name, job in runs.items()}
    name, note = "torchtitan 405B, interleaved over 1F1B", "8 micro-batches and 2 stages a rank, its defaults"
    return [Point(name, "ratio", 128 / 100, seconds["1F1B"] / seconds["interleaved"], note=note)]


def _nanotron_points() -> list[Point]:
    points = []
    for tensor, micro, rate, _ in NANOTRON_TENSOR:
        job = Job(
            architecture=NANOTRON_3B,
            device=DEVICES["h100"],
            seq_length=4096,
            micro_batch_size=micro,
            micro_batches=1,
            tensor=tensor,
            sequence=True,
            zero=0,
            practice=peers.NANOTRON,
        )
        points.append(_speed(f"nanotron 3.57B, tensor {tensor}", job, rate, "nanotron, tensor size"))
    return points


def scaling_points() -> list[Point]:
    """What tensor parallelism costs: products with a collective after them, and two tensor sizes' speeds as a ratio."""
    points = []
    for source, inner, outer, times in EXCHANGES:
        for rows, published in times.items():
            job = Job(LLAMA3_8B, DEVICES["h100"], rows, 1, 1, tensor=8)
            talk = gather_seconds(2.0 * rows * outer, 8, link(job.device, 8, 1))
            predicted = 1e3 * (product_seconds(job, rows, inner, outer) + talk)
            points.append(Point(f"{source}, {rows} x {inner} x {outer}, reduce-scatter", "ms", published, predicted))
    speeds = {point.name: point for point in [*_titan_points(), *_nanotron_points()]}
    for name, base in (
        ("torchtitan 8B, FSDP 8, tensor 8", "torchtitan 8B, FSDP 8"),
        ("nanotron 3.57B, tensor 8", "nanotron 3.57B, tensor 2"),
    ):
        one, other = speeds[name], speeds[base]
        ratio = one.published / other.published, one.predicted / other.predicted
        points.append(Point(f"{name}, over {base.rpartition(', ')[2]}", "ratio", *ratio))
    return points


def speed_points() -> list[Point]:
    """Throughput, counted as the publication counts it."""
    return [*_megatron_points(), *_zero_points(), *_titan_points(), *_interleaving_points(), *_nanotron_points()]


def order_agreement(points: list[Point], tolerance: float = 0.05) -> tuple[int, int]:
    """(pairs in the right order, pairs) of one group, leaving out those published within `tolerance` of each other."""
    right = pairs = 0
    for place, one in enumerate(points):
        for other in points[:place]:
            if abs(one.published / other.published - 1) <= tolerance:
                continue
            pairs += 1
            right += (one.published > other.published) == (one.predicted > other.predicted)
    return right, pairs
