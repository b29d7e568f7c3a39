"""The worker pool: results by rank, failures with their traceback, hangs and deaths survived."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.pool import Pool, WorkerError

pytestmark = pytest.mark.fast


def sum_over_ranks(rank: int, tensor: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    mine = tensor * (rank + 1)
    dist.all_reduce(mine)
    return rank, torch.get_num_threads(), mine


def fail_on(rank: int, guilty: int) -> None:
    if rank == guilty:
        raise KeyError("the guilty line")
    dist.barrier()


def die_on(rank: int, guilty: int) -> None:
    if rank == guilty:
        os._exit(7)
    time.sleep(0.2)


def wait_for_nobody(rank: int) -> None:
    if rank == 1:
        dist.recv(torch.empty(1), src=0)


def process_id(rank: int) -> int:
    return os.getpid()


def test_results_come_in_rank_order(pool):
    tensor = torch.randn(5)
    for world_size in (1, 3, 4):
        results = pool.run(sum_over_ranks, world_size, tensor)
        assert [rank for rank, _, _ in results] == list(range(world_size))
        for _, threads, total in results:
            assert threads == 1
            torch.testing.assert_close(total, tensor * sum(range(1, world_size + 1)))


def test_workers_are_kept_between_runs(pool):
    assert pool.run(process_id, 4) == pool.run(process_id, 4)


def test_failure_names_the_rank_that_failed_first(pool):
    with pytest.raises(WorkerError, match=r"(?s)rank 2 of 3 failed.*fail_on.*the guilty line"):
        pool.run(fail_on, 3, 2)
    assert len(pool.run(process_id, 4)) == 4


def test_a_dead_worker_is_reported_and_replaced(pool):
    with pytest.raises(WorkerError, match=r"(?s)rank 1 of 2 failed.*exit code 7"):
        pool.run(die_on, 2, 1)
    assert len(set(pool.run(process_id, 4))) == 4


def test_a_hang_ends_with_the_stacks_of_those_who_hang():
    hasty = Pool(2)
    try:
        with pytest.raises(WorkerError, match=r"(?s)ranks \[0, 1\] did not finish.*rank 1.*wait_for_nobody"):
            hasty.run(wait_for_nobody, 2, timeout=2.0)
        assert len(hasty.run(process_id, 2)) == 2
    finally:
        hasty.close()
