"""Impossible combinations are refused by field, value and remedy; possible ones are not."""

import itertools
import os
from types import SimpleNamespace

import pytest

from megalite.config import check, load_config
from megalite.config.check import check_layout, check_machine
from megalite.config.rope_scaling import ROPE_SCALINGS
from megalite.errors import UserError
from megalite.model.rope import _SCALINGS, inverse_frequencies
from megalite.train.inputs import _repetition

pytestmark = pytest.mark.fast

LATENT = (
    "--model.attention mla --model.kv_lora_rank 6 --model.qk_nope_head_dim 7 --model.qk_rope_head_dim 6 "
    "--model.v_head_dim 5"
)


def layout(*overrides, world_size=1):
    base = ["--model.vocab_size", "101", "--train.global_batch_size", "12", "--train.seq_length", "96"]
    check_layout(load_config(None, [*base, *" ".join(overrides).split()]), world_size)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (6, "--parallel.tensor 4", "6 processes are not divisible by parallel.tensor = 4"),
        (
            3,
            "--parallel.tensor 3",
            "model.heads = 8 is not divisible by parallel.tensor = 3; use a parallel.tensor out",
        ),
        (4, "--parallel.tensor 4 --model.ffn_hidden_size 502", "model.ffn_hidden_size = 502 is not divisible by"),
        (1, "--model.kv_heads 3", "model.kv_heads = 3 does not divide model.heads = 8; use one of 1, 2, 4, 8"),
        (1, "--model.heads 7", "model.hidden_size = 512 is not divisible by model.heads = 7; give model.head_dim"),
        (1, "--model.head_dim 33", "model.head_dim = 33 does not split into the pairs"),
        (1, '--eval.tasks ["mmlu"]', "eval.tasks = ['mmlu'] has no effect with eval.interval = 0"),
        (1, "--eval.interval 5", "eval.interval = 5 has no eval.tasks to measure"),
        (1, '--eval.interval 5 --eval.tasks ["mmlu","mmlu"]', "names a task twice"),
        (1, '--eval.interval 5 --eval.tasks ["mmlu"]', "eval.data =  is empty; give the tasks' data, or pip:"),
        (1, '--eval.interval 5 --eval.tasks ["mmlu"] --eval.data x', "needs a tokenizer; give data.tokenizer"),
        (
            1,
            '--eval.interval 5 --eval.tasks ["mmlu"] --eval.data x --data.tokenizer byte --objective.kind reward',
            "needs a model of text, and objective.kind = reward has none",
        ),
        (1, "--data.chat_template chatml", "data.chat_template = chatml has no effect on the token files"),
        (4, "--parallel.pipeline 4 --model.layers 3", "model.layers = 3 is fewer than the 4 stages"),
        (
            2,
            "--parallel.pipeline 2 --parallel.schedule interleaved --parallel.virtual_stages 5",
            "model.layers = 8 is fewer than the 10 stages of parallel.pipeline = 2 times parallel.virtual_stages = 5",
        ),
        (2, "--parallel.pipeline 2 --parallel.virtual_stages 2", "virtual_stages = 2 does not fit parallel.schedule"),
        (2, "--parallel.pipeline 2 --parallel.schedule interleaved", "virtual_stages = 1 is too small for"),
        (
            1,
            "--parallel.schedule interleaved --parallel.virtual_stages 2",
            "parallel.pipeline = 1 is too small for parallel.schedule = interleaved",
        ),
        (
            2,
            "--train.micro_batch_size 4 --parallel.pipeline 2 --parallel.schedule interleaved --parallel.virtual_stages 2",  # noqa: E501
            "train.global_batch_size = 12 makes 3 micro-batches, not divisible by parallel.pipeline = 2",
        ),
        (
            2,
            "--parallel.tensor 2 --train.seq_length 95",
            "train.seq_length = 95 is not divisible by parallel.tensor = 2",
        ),
        (5, "", "train.global_batch_size = 12 is not divisible by train.micro_batch_size = 1 * 5 copies of the model"),
        (1, "--train.micro_batch_size 5", "use 10 or 15"),
        (2, "--parallel.expert 2", "parallel.expert = 2 splits experts, and model.experts = 0; use 1"),
        (3, "--parallel.expert 3 --model.experts 8", "parallel.expert = 3 does not divide model.experts = 8; use one"),
        (3, "--parallel.expert 2 --model.experts 8", "does not divide the 3 ranks of 3 that read different data; use"),
        (1, "--model.experts 4 --model.experts_per_token 5", "experts_per_token = 5 exceeds model.experts = 4"),
        (1, "--model.experts 4 --model.dense_layers [1,8]", "model.dense_layers = [1, 8] names layer 8 of 8; name"),
        (1, "--model.experts 4 --model.layers 1 --model.dense_layers [0]", "leaves no layer for experts"),
        (1, "--model.experts 6 --model.router_groups 4", "model.router_groups = 4 does not divide model.experts = 6"),
        (
            1,
            "--model.experts 8 --model.router_groups 4 --model.router_groups_per_token 5",
            "model.router_groups_per_token = 5 exceeds model.router_groups = 4",
        ),
        (
            1,
            "--model.experts 8 --model.experts_per_token 3 --model.router_groups 4 --model.router_groups_per_token 1",
            "model.experts_per_token = 3 exceeds the 2 experts of 1 of 4 groups; use fewer, or raise",
        ),
        (1, "--model.kv_lora_rank 8", "model.kv_lora_rank = 8 has no effect with model.attention = gqa; leave it out"),
        (1, "--model.attention mla", "model.kv_lora_rank = 0 is needed by model.attention = mla; give model.kv_lora"),
        (1, f"{LATENT} --model.v_head_dim 0", "model.v_head_dim = 0 is needed by model.attention = mla"),
        (1, f"{LATENT} --model.qk_rope_head_dim 5", "model.qk_rope_head_dim = 5 does not split into the pairs"),
        (1, f"{LATENT} --model.head_dim 12", "model.head_dim = 12 is not model.qk_nope_head_dim + model.qk_rope_head"),
        (1, f"{LATENT} --model.kv_heads 1", "model.kv_heads = 1 is not model.heads = 8, and in latent attention every"),
        (1, f"{LATENT} --model.qk_norm true", "model.qk_norm = true is not part of model.attention = mla, which"),
        (
            1,
            f"{LATENT} --model.rope_scaling {{type='yarn',mscale_all_dim=1.0}} --model.attention_multiplier 0.3",
            "model.rope_scaling = {'type': 'yarn', 'mscale_all_dim': 1.0} lacks factor, original_max_position",
        ),
        (
            1,
            f"{LATENT} --train.fp8 tensor --train.precision bf16",
            "model.heads = 8 gives a tensor rank a matrix of 104 rows or columns",
        ),
        (1, "--model.layer_types full_attention", "model.layer_types = ['full_attention'] has 1 types for"),
        (
            1,
            "--model.layers 2 --model.layer_types full_attention,sliding_attention",
            "has layers of sliding_attention, and model.sliding_window = 0; give the window's tokens",
        ),
        (
            1,
            "--model.layers 2 --model.sliding_window 8 --model.layer_types full_attention,full_attention",
            "model.sliding_window = 8 is the window of no layer in model.layer_types; leave out both",
        ),
        (1, "--model.no_rope_layers [1,8]", "model.no_rope_layers = [1, 8] names layer 8 of 8; name layers"),
        (1, "--model.no_rope_layers [1,1,0,1]", "model.no_rope_layers = [1, 1, 0, 1] names a layer twice; list the"),
        (1, "--model.rope_local_theta 1e4", "model.rope_local_theta = 10000.0 is of layers with a window, and there"),
        (1, "--model.rope_local_theta 1 --model.sliding_window 8", "model.rope_local_theta = 1.0 is too small"),
        (1, "--model.qk_norm_scope all_heads", "model.qk_norm_scope = all_heads has no effect without model.qk_norm"),
        (
            1,
            "--model.feed_forward geglu --model.experts 4",
            "model.feed_forward = geglu does not fit model.experts =",
        ),
        (1, "--model.aux_loss 0.1", "model.aux_loss = 0.1 has no effect without experts"),
        (1, "--model.shared_experts 1", "model.shared_experts = 1 has no effect without experts"),
        (
            2,
            "--parallel.tensor 2 --model.experts 4 --model.expert_ffn_hidden_size 33",
            "model.expert_ffn_hidden_size = 33 is not divisible by parallel.tensor = 2; use 32 or 34",
        ),
        (1, "--train.seq_length 8192", "train.seq_length = 8192 exceeds model.max_positions = 4096"),
        (1, "--train.batch_ramp [4,4]", "train.batch_ramp = [4, 4] is not a ramp"),
        (1, "--train.batch_ramp [4,5,100]", "does not reach train.global_batch_size = 12 in whole increments"),
        (1, "--train.batch_ramp [16,4,100]", "does not reach train.global_batch_size = 12"),
        (2, "--train.batch_ramp [2,5,100]", "train.batch_ramp = [2, 5, 100] goes through 7, which is not divisible"),
        (1, "--train.batch_ramp [4,4,0]", "train.batch_ramp[2] = 0 is too small; it must be at least 1"),
        (1, "--train.batch_ramp [4,0,9]", "train.batch_ramp[1] = 0 is too small"),
        (1, "--train.batch_ramp [-4,4,9]", "train.batch_ramp[0] = -4 is too small"),
        (
            1,
            "--train.batch_ramp [1,1,9] --train.global_batch_size 1000000",
            "[1, 1, 9] has more than 10,000 increments to train.global_batch_size = 1000000; use a larger increment",
        ),
        (1, "--optimizer.eps 1e-320", "optimizer.eps = 1e-320 is too small"),
        (1, "--model.layers 1e9", "model.layers = 1000000000 is too large; it must be at least 1 and at most 10000"),
        (
            1,
            '--data.train [[1e308,"a"],[1e308,"b"]]',
            "data.train: weights from 1e+308 to 1e+308 have no shares in floating point",
        ),
        (1, '--data.train [[0,"a"]]', "data.train: weight 0.0 of a is not a positive number; leave the file out"),
        (1, "--data.split [9,1] --data.valid c", "data.split = [9.0, 1.0] cannot be combined with data.valid"),
        (1, "--data.split [1e308,1e308]", "data.split[0] = 1e+308 is too large"),
        (1, '--model.rope_scaling {type=["yarn"]}', "model.rope_scaling.type = ['yarn'] is unknown"),
        (1, '--model.rope_scaling {type="linear",factor=nan}', "model.rope_scaling.factor = nan is not a number"),
        (
            1,
            "--train.steps 2000000000 --train.global_batch_size 16777216",
            "train.steps = 2000000000 of up to 16777216 samples come to more than 68,719,476,736 samples",
        ),
        (1, "--train.stop_after 2000", "train.stop_after = 2000 exceeds train.steps = 1000"),
        (1, "--optimizer.warmup_steps 1001", "optimizer.warmup_steps = 1001 exceeds train.steps = 1000"),
        (1, "--optimizer.min_lr 1", "optimizer.min_lr = 1.0 exceeds optimizer.lr = 0.0003"),
        (1, "--optimizer.lr 0", "optimizer.lr = 0.0 is too small; it must be above 0"),
        (1, "--optimizer.beta1 1", "optimizer.beta1 = 1.0 is too large; it must be at least 0 and below 1"),
        (1, "--optimizer.kind muno", "optimizer.kind = 'muno' is unknown; it must be one of adamw, muon"),
        (1, "--optimizer.muon_lr 0", "optimizer.muon_lr = 0.0 is too small; it must be above 0"),
        (1, "--optimizer.momentum 1", "optimizer.momentum = 1.0 is too large; it must be at least 0 and below 1"),
        (1, "--optimizer.newton_schulz_steps 0", "optimizer.newton_schulz_steps = 0 is too small"),
        (1, "--optimizer.beta2 -0.1", "optimizer.beta2 = -0.1 is too small"),
        (
            1,
            "--optimizer.schedule wsd --optimizer.decay_steps 900 --optimizer.warmup_steps 101",
            "decay_steps = 900 and",
        ),
        (1, "--model.layers 0", "model.layers = 0 is too small; it must be at least 1"),
        (1, "--model.heads 0", "model.heads = 0 is too small"),
        (1, "--train.eval_interval -1", "train.eval_interval = -1 is too small; it must be at least 0"),
        (1, "--run.seed 4294967296", "run.seed = 4294967296 is too large"),
        (1, "--parallel.zero 4", "parallel.zero = 4 is too large; it must be at least 0 and at most 3"),
        (1, "--train.fp8 row --train.precision fp32", "train.fp8 = row needs train.precision = bf16, not fp32"),
        (1, "--train.fp8 row --train.precision bf16 --model.ffn_hidden_size 40", "needs multiples of 16"),
        (
            8,
            "--parallel.context 8 --train.seq_length 15",
            "train.seq_length = 15 has too few tokens for the 2 * parallel.context = 16 pieces that it is cut into",
        ),
        (
            6,
            "--parallel.context 3 --parallel.tensor 2 --parallel.context_mode ulysses",
            "parallel.context = 3 does not divide the 4 query heads of each tensor rank, and ulysses gives every "
            "context rank as many; use a parallel.context out of 1, 2, 4, or parallel.context_mode = gather or ring",
        ),
        (1, "--parallel.context_mode rings", "parallel.context_mode = 'rings'"),
        (3, "--parallel.context 2", "3 processes are not divisible by parallel.tensor = 1 * parallel.pipeline = 1 *"),
        (1, "--train.cuda_graph true --run.device cpu", "train.cuda_graph = true needs a GPU, and run.device is cpu"),
        (
            2,
            "--train.cuda_graph true --parallel.pipeline 2",
            "parallel.pipeline = 2 is not covered by train.cuda_graph = true; use 1, or train.cuda_graph = false",
        ),
        (2, "--train.cuda_graph true --parallel.zero 3", "use 0 or 1, or train.cuda_graph = false"),
        (1, "--train.cuda_graph true --objective.kind dpo", "objective.kind = dpo is not covered by train.cuda_graph"),
        (
            1,
            "--rollout.cuda_graph true --run.device cpu",
            "rollout.cuda_graph = true needs a GPU, and run.device is cpu",
        ),
        (
            2,
            "--rollout.cuda_graph true --parallel.pipeline 2",
            "parallel.pipeline = 2 is not covered by rollout.cuda_graph = true; use 1, or rollout.cuda_graph = false",
        ),
        (1, "--train.profile [3]", "train.profile = [3] is not a range of steps"),
        (1, "--checkpoint.keep_every 1500", "checkpoint.keep_every = 1500 is not a multiple of checkpoint.interval"),
        (1, "--data.split [0,1]", "data.split = [0.0, 1.0] is out of range"),
        (
            1,
            '--data.train [[-1,"a"]]',
            "data.train: weight -1.0 of a is not a positive number; give each",
        ),
        (1, '--data.train ["b",[1,"a"]]', "mixes weighted and plain prefixes"),
        (
            1,
            '--model.rope_scaling {type="ntk"}',
            "model.rope_scaling.type = 'ntk' is unknown; known are linear, llama3",
        ),
        (1, '--model.rope_scaling {type="yarn",factor=2}', "lacks original_max_position_embeddings; yarn needs it"),
        (1, '--model.rope_scaling {type="linear",factor=2,beta=1}', "model.rope_scaling has unknown beta"),
        (1, '--model.rope_scaling {type="linear",factor="x"}', "model.rope_scaling.factor = 'x' is not a number"),
    ],
)
def test_refused(world_size, overrides, message):
    with pytest.raises(UserError) as refusal:
        layout(overrides, world_size=world_size)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, "--model.heads 6 --model.head_dim 64 --model.kv_heads 3 --parallel.tensor 2"),  # 3 kv heads on 2 ranks
        (8, "--model.kv_heads 1 --parallel.tensor 8"),
        (2, "--model.layers 3 --parallel.pipeline 2"),
        (2, "--parallel.tensor 2 --train.seq_length 95 --parallel.sequence false"),
        (4, "--parallel.pipeline 2 --parallel.schedule interleaved --parallel.virtual_stages 4"),
        (8, "--parallel.pipeline 8"),  # a copy with fewer micro-batches than stages is slow, not wrong
        (3, "--train.batch_ramp [3,3,7] --parallel.zero 0"),
        (1, "--optimizer.schedule constant --optimizer.warmup_steps 1000 --train.stop_after 1000"),
    ],
)
def test_accepted(world_size, overrides):
    layout(overrides, world_size=world_size)


def test_every_remedy_for_the_batch_size_works():
    for world_size, micro in itertools.product((2, 3, 4), (1, 2, 5)):
        try:
            layout(f"--train.global_batch_size 71 --train.micro_batch_size {micro}", world_size=world_size)
        except UserError as refusal:
            for size in str(refusal).rpartition("use ")[2].split(" or "):
                layout(f"--train.global_batch_size {size} --train.micro_batch_size {micro}", world_size=world_size)


@pytest.fixture
def machine(tmp_path):
    for name in ("corpus.bin", "corpus.idx", "half.bin", "t.model"):
        (tmp_path / name).write_bytes(b"x")

    def run(overrides=""):
        words = [word.replace("@", f"{tmp_path}/") for word in overrides.split()]
        config = load_config(None, ["--run.dir", f"{tmp_path}/run", "--data.tokenizer", f"{tmp_path}/t.model", *words])
        check_machine(config)

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", "data.train is empty; name token files"),
        ("--data.train @nothing", "nothing.bin does not exist; make it with tools/preprocess_data.py"),
        ("--data.train @half", "half.idx does not exist"),
        ("--data.train @corpus.bin", "give the prefix without .bin"),
        ("--data.train @corpus --data.valid @gone", "data.valid names"),
        ("--data.train @corpus --data.tokenizer @gone.model", "gone.model does not exist; name a sentencepiece .model"),
        ("--data.train @corpus --data.tokenizer=''", "model.vocab_size = 0 is unknown; give it, or data.tokenizer"),
        ("--data.train @corpus --checkpoint.load @gone", "gone does not exist; name a checkpoint"),
        (
            "--data.train @corpus --train.eval_interval 5",
            "train.eval_interval = 5 needs validation data; give data.valid",
        ),
        ("--data.train @corpus --train.eval_interval 5 --data.split [1]", "needs validation data"),
        ("--data.train @corpus --run.dir @t.model/run", "t.model is a file; choose another directory"),
    ],
)
def test_machine_refuses(machine, overrides, message):
    with pytest.raises(UserError) as refusal:
        machine(overrides)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_machine_accepts(machine):
    machine("--data.train @corpus")
    machine("--data.train @corpus --train.eval_interval 5 --data.split [99,1]")
    machine('--data.train [[1,"@corpus"]] --train.eval_interval 5 --data.valid @corpus --data.tokenizer byte')


def test_packages_and_devices_that_are_missing(machine, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.wandb = true needs a package; pip install wandb, or set it to false"):
        machine("--data.train @corpus --log.wandb true --log.tensorboard false")
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"run\.device = cuda but torch sees no GPU here"):
        machine("--data.train @corpus --run.device cuda --log.tensorboard false")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_place(machine, tmp_path):
    (tmp_path / "fixed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="read-only"):
        machine("--data.train @corpus --run.dir @fixed/run")


def test_check_does_both(tmp_path):
    config = load_config(None, ["--model.vocab_size", "9", "--parallel.tensor", "2"])
    with pytest.raises(UserError, match="3 processes"):
        check(config, 3)
    with pytest.raises(UserError, match=r"data\.train is empty"):
        check(config, 2)


def test_every_rope_scaling_can_be_computed():
    assert set(_SCALINGS) == set(ROPE_SCALINGS)
    for kind, scaling in ROPE_SCALINGS.items():
        values = {key: str(bound.high) for key, bound in scaling.needed.items()} | {"low_freq_factor": "1"}
        table = ",".join(f"{key}={values[key]}" for key in scaling.needed)
        layout(f'--model.rope_scaling {{type="{kind}",{table}}} --model.rope_theta 1e30')
        config = load_config(None, ["--model.rope_scaling", f'{{type="{kind}",{table}}}'])
        speeds, magnitude = inverse_frequencies(64, 1e30, config.model.rope_scaling)
        assert len(speeds) == 32 and speeds.isfinite().all() and magnitude > 0


@pytest.mark.parametrize(
    ("tokens", "weights", "samples", "words"),
    [
        ([55_000_000], None, 9_765_376, "182 times your 55 M tokens"),
        ([1_000_000_000], None, 100, ""),
        ([1024], None, 2, "2 times your 1.02 k tokens"),
        ([10**9, 10**6], [0.5, 0.5], 100_000, "51 times file 1's 1 M tokens"),
    ],
)
def test_a_check_says_how_often_data_repeats(tokens, weights, samples, words):
    sources = [
        SimpleNamespace(cut=SimpleNamespace(tokens_per_epoch=each), file=SimpleNamespace(prefix=f"file {number}"))
        for number, each in enumerate(tokens)
    ]

    class Samples(SimpleNamespace):
        def __len__(self):
            return samples

    assert _repetition(Samples(sources=sources, weights=weights, seq_length=1024)) == words
