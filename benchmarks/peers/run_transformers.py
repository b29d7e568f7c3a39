"""The Trainer of transformers as a row of `benchmarks/train.py`: LlamaForCausalLM, fused AdamW, autocast in bf16."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from llama_config import llama_config
from train_job import Job, Meter, finish, job_from_arguments, micro_batches, start_process
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Ticks(TrainerCallback):
    """Ends the run once enough steps are measured."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        self.meter.tick()
        control.should_training_stop = self.meter.done
        return control


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The benchmark's tokens, over and over."""

    def __init__(self, job: Job) -> None:
        self.rows = [row for tokens, _ in micro_batches(job, 0) for row in tokens]
        self.length = len(self.rows) * (job.warmup + job.steps + 1)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index % len(self.rows)]
        return {"input_ids": row, "labels": row}


def main() -> None:
    job = job_from_arguments()
    if job.ranks > 1:
        raise SystemExit("the Trainer of transformers runs in one process here")
    start_process(job)
    model = LlamaForCausalLM(llama_config(job))
    meter = Meter(job)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=job.device == "cpu",
            per_device_train_batch_size=job.micro,
            gradient_accumulation_steps=job.micro_batches,
            max_steps=job.warmup + job.steps,
            bf16=job.precision == "bf16",
            torch_compile=job.compile,
            optim="adamw_torch_fused",
            learning_rate=1e-3,
            max_grad_norm=1.0,
            dataloader_pin_memory=job.device != "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Samples(job), callbacks=[Ticks(meter)]).train()
    finish(meter)


if __name__ == "__main__":
    main()
