"""picotron (github.com/huggingface/picotron) as a row of `benchmarks/train.py`: its model, layers and steps.

The checkout is the user's (`--against picotron=PATH`) and stays as it is. What stands in its way without a GPU is put
in place from here: modules that it imports and does not use on a CPU, and `torch.cuda.synchronize`. Tokens come from
the benchmark instead of a data set. In bf16 it trains as it does on GPUs: weights and Adam's moments in bf16, without
fp32 master weights, and it never clips gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from llama_config import llama_config
from train_job import Job, Meter, finish, job_from_arguments, micro_batches, start_process

UNUSED = {
    "flash_attn": (),
    "flash_attn.flash_attn_interface": ("flash_attn_func",),
    "flash_attn.layers": (),
    "flash_attn.layers.rotary": ("apply_rotary_emb",),
    "flash_attn.ops": (),
    "flash_attn.ops.triton": (),
    "flash_attn.ops.triton.layer_norm": ("layer_norm_fn",),
    "wandb": (),
    "datasets": ("Features", "Sequence", "Value", "load_dataset"),
}
"""Imported at the top of picotron's files, called only with a GPU or with its own data."""


def make_importable(job: Job) -> None:
    """Everything that must be so before picotron is imported."""
    if job.device == "cpu":
        for name, attributes in UNUSED.items():
            module = ModuleType(name)
            module.__dict__.update(dict.fromkeys(attributes), __path__=[])
            sys.modules.setdefault(name, module)
        torch.cuda.synchronize = lambda device=None: None
    fused = job.device != "cpu" and job.precision == "bf16"
    dtype = "bfloat16" if job.precision == "bf16" else "float32"
    device = "cpu" if job.device == "cpu" else "cuda"
    os.environ.update({"FLASH_ATTEN": str(int(fused)), "CONTEXT_PARALLEL": "0", "DTYPE": dtype, "DEVICE": device})
    sys.path.insert(0, job.peer_path)


class Tokens:
    """What picotron's steps ask of its data loader."""

    def __init__(self, job: Job, replica: int) -> None:
        self.grad_acc_steps = job.micro_batches
        self._batches = cycle(micro_batches(job, replica))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        tokens, labels = next(self._batches)
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1).contiguous()
        return {"input_ids": tokens, "target_ids": labels, "position_ids": places, "hidden_states": None}


def build(job: Job, device: torch.device, dtype: torch.dtype) -> Any:
    """The model, laid out as picotron's own training script does it."""
    from picotron.data_parallel.data_parallel import DataParallelBucket
    from picotron.model import Llama
    from picotron.pipeline_parallel.pipeline_parallel import PipelineParallel
    from picotron.tensor_parallel.tensor_parallel import apply_tensor_parallel

    config = llama_config(job)
    model = Llama(config)
    if job.tensor > 1:
        model = apply_tensor_parallel(model)
    if job.pipeline > 1:
        model = PipelineParallel(model, config)
    model.reset_parameters()
    with torch.no_grad():  # its unit-variance embedding is kept out of the first losses
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.mul_(0.02)
    model = model.to(dtype).to(device)
    return DataParallelBucket(model) if job.data > 1 else model


def main() -> None:
    job = job_from_arguments()
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    make_importable(job)
    device = start_process(job)
    if job.ranks == 1:  # picotron wants a process group in any case
        backend = "gloo" if job.device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, init_method=f"file://{job.store}", rank=0, world_size=1)
    import picotron.process_group_manager as pgm

    pgm.setup_process_group_manager(tp_size=job.tensor, cp_size=1, pp_size=job.pipeline, dp_size=job.data)
    from picotron.pipeline_parallel.pipeline_parallel import train_step_pipeline_1f1b
    from picotron.utils import average_loss_across_dp_cp_ranks
    from train import train_step

    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    model = build(job, device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = Tokens(job, pgm.process_group_manager.dp_rank)
    shape = (job.micro, job.preset.seq_length, job.shape["hidden_size"])

    def step() -> float:
        optimizer.zero_grad()
        if job.pipeline > 1:
            loss = train_step_pipeline_1f1b(model, loader, shape, device, dtype)
        else:
            loss = train_step(model, loader, device)
        loss = average_loss_across_dp_cp_ranks(loss, device)
        optimizer.step()
        if hasattr(model, "reset"):
            model.reset()
        return float(loss)

    meter = Meter(job)
    meter.run(step)
    finish(meter)


if __name__ == "__main__":
    main()
