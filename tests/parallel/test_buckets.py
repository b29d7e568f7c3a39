"""Gradient buckets: sums over data ranks, shards, the order of reductions, and shared boxes."""

import pytest
import torch
from torch import nn

from megalite.mesh import Group, Mesh
from megalite.parallel.buckets import ShardedBucket
from megalite.parallel.zero import StageBuckets, gather_parameters
from megalite.placement import PlacedParameter, Placement, row_box
from tests.support.chaos import ChaosGroups

pytestmark = pytest.mark.fast

SHAPES = {"a": (7, 5), "b": (3,), "c": (64, 3), "d": (11,), "e": (2, 9)}


def model_of(rank, dtype=torch.float32, replicas=None):
    """Odd matrices and vectors. `replicas`: for each name, ranks that hold parts of its gradient's sum."""
    module = nn.Module()
    for name, shape in SHAPES.items():
        holders = (replicas or {}).get(name, (rank,))
        box = row_box(name, shape, 0, shape[0], 0, holders, partial=len(holders) > 1)
        values = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(ord(name)))
        module.register_parameter(name, PlacedParameter(values, Placement((box,))))
    return module


def gradient(rank, name, step):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + ord(name))
    return torch.randn(SHAPES[name], generator=generator)


def backward(module, rank, step):
    """Two micro-batches; parameters finish from last to first."""
    for micro in range(2):
        for name, parameter in reversed(list(module.named_parameters())):
            parameter.grad_buffer().add_(gradient(rank, name, 2 * step + micro))
            parameter.gradient_added()


def learn(stage, module, rank):
    """A first step, in which the buckets count how often each parameter reports."""
    stage.begin(2)
    backward(module, rank, 9)
    stage.finish()
    stage.wait()


def begun(stage):
    """Reductions that have begun; those of sharded buckets do in every micro-batch."""
    return stage._launched + sum(isinstance(bucket, ShardedBucket) for bucket in stage.buckets)


def reduce_twice(rank, world, zero, limit):
    groups = ChaosGroups(seed=rank)
    mesh = Mesh(dp=world, rank=rank, make_group=groups)
    module = model_of(rank)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    stage = StageBuckets(module, mesh, zero=zero, bucket_elements=limit)
    for name, parameter in module.named_parameters():
        with stage.whole():
            assert torch.equal(parameter, before[name])  # moving into the bucket keeps the values
    seen = []
    learn(stage, module, rank)
    for step in range(2):
        stage.begin(2)
        backward(module, rank, step)
        launched = begun(stage)
        stage.finish()
        stage.wait()
        groups.verify()
        shard = {}
        for bucket in stage.buckets:
            assert bucket.updated_gradients.numel() == bucket.updated.stop - bucket.updated.start
            full = torch.full((bucket.length,), torch.nan)
            full[bucket.updated] = bucket.updated_gradients
            for slot in bucket.slots:
                name = next(name for name, value in module.named_parameters() if value is slot.parameter)
                shard[name] = full[slot.start : slot.stop].view(slot.parameter.shape).clone()
        seen.append((shard, launched, len(stage.buckets)))
    return seen


@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
@pytest.mark.parametrize(
    ("world", "zero"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3), (4, 0)]
)
def test_gradients_are_summed_over_data_ranks(pool, world, zero, limit):
    """Both micro-batches of all ranks, each once, in both steps; all reductions under way before the end."""
    results = pool.run(reduce_twice, world, world, zero, limit)
    for step in range(2):
        for name in SHAPES:
            expected = sum(gradient(rank, name, 2 * step + micro) for rank in range(world) for micro in range(2))
            whole = torch.full(SHAPES[name], torch.nan)
            for result in results:
                part = result[step][0][name]
                assert zero > 0 or not part.isnan().any()
                whole = torch.where(part.isnan(), whole, part)
            torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        for _, launched, buckets in (result[step] for result in results):
            assert launched == buckets  # overlapped: nothing was left for the end
            assert (buckets == 2) == (limit == 1 << 20 and (zero < 2 or world == 1))  # matrices, vectors


def share(rank, world, dtype):
    groups = ChaosGroups(seed=rank)
    module = model_of(rank, dtype)
    stage = StageBuckets(module, Mesh(dp=world, rank=rank, make_group=groups), zero=1, bucket_elements=100)
    for number, bucket in enumerate(stage.buckets):
        bucket.parameters.fill_(-1)
        bucket.parameters[bucket.shard] = torch.arange(bucket.shard.start, bucket.shard.stop).to(dtype) + number
    gather_parameters([stage])
    stage.wait_for_all_gather()
    groups.verify()
    return {name: value.detach().float() for name, value in module.named_parameters()}, [
        [(slot.start, slot.parameter.shape) for slot in bucket.slots] for bucket in stage.buckets
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updated_shards_reach_every_rank(pool, dtype):
    results = pool.run(share, 3, 3, dtype)
    values, slots = results[0]
    for other, _ in results[1:]:
        assert all(torch.equal(other[name], values[name]) for name in values)
    expected = [
        (torch.arange(start, start + shape.numel()).to(dtype) + number).float().view(shape)
        for number, bucket in enumerate(slots)
        for start, shape in bucket
    ]
    found = [
        any(value.shape == want.shape and torch.equal(value, want) for value in values.values()) for want in expected
    ]
    assert len(found) == len(SHAPES) and all(found)


def sum_shared(rank):
    """tp 2 x dp 2: `c` is held by both tensor ranks, each with a part of the gradient; `b` is a plain copy."""
    groups = ChaosGroups(seed=rank)
    mesh = Mesh(dp=2, tp=2, rank=rank, make_group=groups)
    module = model_of(rank, replicas={"c": mesh.ranks_along("tp")})
    stage = StageBuckets(module, mesh, zero=0, bucket_elements=1)
    learn(stage, module, rank)
    stage.begin(2)
    backward(module, rank, 0)
    prompt = begun(stage)
    stage.finish()
    stage.wait()
    groups.verify()
    return prompt, len(stage.buckets), {name: value.main_grad.clone() for name, value in module.named_parameters()}


def test_shared_boxes_are_summed_once_and_the_others_not_at_all(pool):
    results = pool.run(sum_shared, 4)
    for rank, (prompt, buckets, gradients) in enumerate(results):
        assert (prompt, buckets) == (4, 5)  # the shared one waits for its sum within the model
        for name, value in gradients.items():
            ranks = range(4) if name == "c" else (rank % 2, rank % 2 + 2)
            expected = sum(gradient(other, name, micro) for other in ranks for micro in range(2))
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_comes_after_its_reduction_has_begun_is_an_error():
    """A weight that is used more often than in the step before must not lose its gradient in silence."""
    module = model_of(0)
    silent = Mesh(make_group=lambda ranks, rank: Group(ranks, rank, None))
    stage = StageBuckets(module, silent, zero=1, bucket_elements=1)
    learn(stage, module, 0)
    stage.begin(2)
    backward(module, 0, 0)
    with pytest.raises(RuntimeError, match="the gradient of b was added to after its reduction had begun"):
        module.b.gradient_added()


def test_what_decays_and_what_does_not_lie_apart():
    stage = StageBuckets(model_of(0), Mesh(make_group=lambda ranks, rank: Group(ranks, rank, None)), zero=1)
    assert [bucket.decays for bucket in stage.buckets] == [True, False]
    for bucket in stage.buckets:
        assert {slot.parameter.dim() == 2 for slot in bucket.slots} == {bucket.decays}
        assert bucket.length % 64 == 0


def held(rank, world, zero):
    """Bytes that stay between steps: (parameters, gradients), and the most that one forward and backward pass held."""
    groups = ChaosGroups(seed=rank)
    module = nn.Module()
    module.layers = nn.ModuleList()
    for layer in range(5):
        block = nn.Module()
        box = row_box(f"model.layers.{layer}.w", (64, 60), 0, 64, 0, (rank,))
        block.w = PlacedParameter(torch.full((64, 60), float(layer)), Placement((box,)))
        module.layers.append(block)
    stage = StageBuckets(module, Mesh(dp=world, rank=rank, make_group=groups), zero=zero, bucket_elements=64 * 60)

    def size():
        parameters = sum(bucket.parameters.untyped_storage().size() for bucket in stage.buckets)
        return parameters, 4 * sum(bucket.gradients is not None and bucket.length for bucket in stage.buckets)

    peak = [0, 0]
    for _ in range(2):
        stage.begin(1)
        for way in (range(5), reversed(range(5))):
            for layer in way:
                weight = module.layers[layer].w
                assert (weight.gathered() == layer).all()
                peak = [max(old, new) for old, new in zip(peak, size())]
        for layer in reversed(range(5)):
            weight = module.layers[layer].w
            weight.grad_buffer().add_(1.0)
            peak = [max(old, new) for old, new in zip(peak, size())]
            weight.gradient_added()
        stage.finish()
        stage.wait()
        gather_parameters([stage])
        stage.wait_for_all_gather()
    assert all((bucket.updated_gradients == world).all() for bucket in stage.buckets)
    groups.verify()
    return size(), tuple(peak)


@pytest.mark.parametrize(
    ("zero", "between", "peak"),
    [(1, (5, 5), (5, 5)), (2, (5, 0), (5, 1)), (3, (0, 0), (2, 1))],
)
def test_what_zero_keeps_whole(pool, zero, between, peak):
    """In layers: parameters and gradients held whole between steps, and at most within one."""
    layer = 64 * 60 * 4
    for result in pool.run(held, 2, 2, zero):
        assert result == (tuple(layer * n for n in between), tuple(layer * n for n in peak))


def forget_and_add(rank, zero):
    """Gradients of a step after one that left NaNs: added to, overwritten, and one that nothing is added to."""
    module = model_of(rank)
    stage = StageBuckets(
        module, Mesh(dp=2, rank=rank, make_group=ChaosGroups(seed=rank)), zero=zero, bucket_elements=90
    )
    for left in (torch.nan, 1.0, 2.0):
        stage.begin(1)
        for name, parameter in reversed(list(module.named_parameters())):
            if name == "c" and left == 1.0:
                continue
            if name == "a":
                total, stale = parameter.grad_target()
                assert stale and parameter.grad_target() == (total, False)
                total.fill_(left)
            else:
                parameter.grad_buffer().add_(left)
            parameter.gradient_added()
        stage.finish()
        stage.wait()
        for bucket in stage.buckets:
            whole, used = torch.zeros(bucket.length), bucket.updated_gradients
            for slot in bucket.slots:
                nothing = slot.parameter is module.c and left == 1.0
                whole[slot.start : slot.stop] = 0.0 if nothing else 2 * left
            torch.testing.assert_close(used, whole[bucket.updated], equal_nan=True)


@pytest.mark.parametrize("zero", range(4))
def test_gradients_of_the_step_before_do_not_count(pool, zero):
    pool.run(forget_and_add, 2, zero)
