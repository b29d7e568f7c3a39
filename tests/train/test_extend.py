"""A run that is made longer than it was planned keeps the order of its data, also into another epoch."""

import numpy as np

from megalite.checkpoint.manifest import MANIFEST, Manifest
from megalite.data.indexed import IndexedWriter
from tests.train.test_command_line import call, metrics


def planned(folder):
    newest = max((folder / "run" / "checkpoints").glob("step_*"))
    return Manifest.from_file(newest / MANIFEST).state["planned_samples"]


def test_a_longer_plan_continues_the_order_of_the_shorter(tmp_path):
    rng = np.random.default_rng(1)
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        for _ in range(30):
            writer.add_document(rng.integers(0, 50, 40))  # 99 samples of 12 tokens in an epoch
    (tmp_path / "recipe.toml").write_text(f"""
run.device = "cpu"
model = {{ layers = 1, hidden_size = 24, heads = 6, kv_heads = 3, ffn_hidden_size = 32, vocab_size = 50 }}
data.train = ["{tmp_path}/tokens"]
log.tensorboard = false
optimizer.warmup_steps = 0
train = {{ seq_length = 12, micro_batch_size = 2, global_batch_size = 8, precision = "fp32" }}
""")
    assert call(tmp_path, "--train.steps", "8").returncode == 0  # 64 samples
    begun = metrics(tmp_path)
    longer = call(tmp_path, "--train.steps", "20")  # 160 samples: two epochs, which as one plan have another order
    assert longer.returncode == 0, longer.stderr
    assert metrics(tmp_path)[:8] == begun and len(metrics(tmp_path)) == 20
    assert planned(tmp_path) == 64
    other = call(tmp_path, "--train.steps", "30", "--run.seed", "7")
    assert other.returncode == 2
    assert "run.seed was 1234 and is 7; restore the data" in other.stderr and "order was" not in other.stderr
