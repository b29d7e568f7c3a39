"""Several GPUs, simulated: the parts add up, count what the trainer does, and agree with what others measured."""

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import scaling
from benchmarks.planner.published import scaling_points
from benchmarks.planner.queues import queued_makespan
from megalite.config import ModelConfig
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.build import Build
from megalite.parallel.collectives import TensorRegion
from megalite.placement import row_box
from megalite.planning import DEVICES
from megalite.planning.hardware import gather_seconds, link
from megalite.planning.job import MEGALITE
from megalite.planning.stage_time import layer_work
from megalite.schedule.schedules import build_schedule
from megalite.schedule.simulate import simulate

pytestmark = pytest.mark.fast

H100 = DEVICES["h100"]
PARTS = ("products", "communication", "elementwise", "host")


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_shares_fall_with_tensor_size_and_less_so_in_wider_layers(device):
    rows = {(row["hidden"], row["tensor"]): row for row in scaling.tensor_rows(DEVICES[device])}
    for measure in ("share", "step"):
        for hidden in (4096, 8192):
            shares = [rows[hidden, tensor][measure] for tensor in (1, 2, 4, 8)]
            assert shares[0] == 1 and shares == sorted(shares, reverse=True) and len(set(shares)) == 4
        assert all(rows[8192, tensor][measure] > rows[4096, tensor][measure] for tensor in (2, 4, 8))
    for row in rows.values():
        assert row["share"] + sum(row[part] for part in PARTS) == pytest.approx(1)


def test_without_communication_only_the_products_lose():
    free = dataclasses.replace(H100, link_bandwidth=math.inf, link_latency=0.0)
    row = scaling.tensor_share(free, 4096, 8)
    assert row["communication"] == 0 and row["host"] == 0 and abs(row["elementwise"]) < 1e-4
    assert 0 < row["products"] < 0.1 and row["share"] == pytest.approx(1 - row["products"], abs=1e-4)


def test_a_slow_host_is_seen():
    """A layer of tensor 8 takes 4 ms; launching it in 5 ms forward and 7.5 backward leaves the GPUs waiting."""
    row = scaling.tensor_share(dataclasses.replace(H100, layer_overhead=5e-3), 4096, 8)
    assert row["host"] > 0.2 and row["share"] + sum(row[part] for part in PARTS) == pytest.approx(1)


class Recorder(TorchDispatchMode):
    """Notes products and collectives in order; a group of two ranks whose other rank has nothing but zeros."""

    size, index = 2, 0

    def __init__(self):
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.events.append(("product", 0))
        return function(*args, **(kwargs or {}))

    def _start(self, size: int):
        number = len(self.events)
        self.events.append(("start", number))

        class Work:
            def wait(work):
                self.events.append(("wait", number * 10 + size))

        return Work()

    def all_gather(self, output, tensor):
        output.zero_()[: len(tensor)] = tensor
        return self._start(1)

    def reduce_scatter(self, output, tensor):
        output.copy_(tensor[: len(output)])
        return self._start(1)

    def all_reduce(self, tensor):
        return self._start(2)

    def exchanges(self) -> tuple[int, int]:
        """(exposed, hidden): whether a product was started between start and wait. An all-reduce counts as two."""
        counts = [0, 0]
        for place, (kind, what) in enumerate(self.events):
            if kind == "wait":
                beside = self.events[what // 10 : place]
                counts[any(kind == "product" for kind, _ in beside)] += what % 10
        self.events = []
        return counts[0], counts[1]


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "whole"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_collectives_are_hidden_and_exposed_as_in_the_trainer(sequence, schedule):
    """The layers themselves are run, and every collective is looked at: was a product started beside it?"""
    recorder, postponed = Recorder(), []
    region = TensorRegion(recorder, sequence)
    build = Build(ModelConfig(), Mesh(), region, select_kernels({}, torch.device("cpu")))
    column = build.column((row_box("up", (8, 6), 0, 4, 0, (0,)),))
    row = build.row("down", (6, 8), (0, 4))
    for layer in (column, row):
        torch.nn.init.normal_(layer.weight)
        if schedule == "zb_h1":
            layer.weight.delay = postponed.append
    x = torch.randn(4 // region.split, 3, 6, requires_grad=True)
    with recorder:
        output = row(column(x))
        forward = recorder.exchanges()
        output.sum().backward()
        inputs = recorder.exchanges()
        for weight_gradient in postponed:
            weight_gradient()
        weights = recorder.exchanges()
    job = scaling.tensor_job(dataclasses.replace(H100, matmul_efficiency=0.01), 4096, 2)  # slow enough to hide all
    job = dataclasses.replace(job, sequence=sequence, schedule=schedule, pipeline=2, overlap_splits=1)
    exchange = gather_seconds(2.0 * 8192 * 4096, 2, link(H100, 2, 1))
    seconds = [
        2 * exchange * (exposed + MEGALITE.hiding_cost * hidden) for exposed, hidden in (forward, inputs, weights)
    ]
    work = layer_work(job)
    assert work.forward.tensor == pytest.approx(seconds[0]) and seconds[0] > 0
    if schedule == "zb_h1":
        assert len(postponed) == 2 and work.input_gradient.tensor == pytest.approx(seconds[1])
        assert work.weight_gradient.tensor == pytest.approx(seconds[2])
    assert work.backward.tensor == pytest.approx(sum(seconds[1:]))


def test_hiding_is_between_free_and_exposed_and_never_worth_more_than_the_product_beside_it():
    shares = {row["tensor 8"]: row["hidden 4096"] for row in scaling.sensitivity(H100)}
    assert shares["nothing hidden"] < shares["in one piece"] < shares["as the trainer does it"]
    assert shares["as the trainer does it"] < shares["copy engines"] < shares["hiding costs nothing"]
    assert shares["in one piece"] < shares["all under its own product, NCCL's kernels"]
    assert shares["all under its own product, copy engines"] < shares["free communication"] < 1
    assert shares["links x 0.7"] < shares["as the trainer does it"] < shares["links x 1.3"] < shares["links x 2.0"]
    slow = dataclasses.replace(H100, link_bandwidth=H100.link_bandwidth / 100)
    habits = [dataclasses.replace(MEGALITE, overlaps_tensor=mode, hiding_cost=0.0) for mode in ("none", "backward")]
    none, backward = (layer_work(scaling.tensor_job(slow, 4096, 8, habit, splits=1)).backward for habit in habits)
    assert 0 < none.tensor - backward.tensor < none.products


def test_what_others_measured_on_eight_gpus():
    """cuBLAS and NCCL one after the other, and the speeds of two tensor sizes: each within 15 %, half within 7."""
    errors = sorted(abs(point.error) for point in scaling_points())
    assert len(errors) == 11 and errors[-1] < 0.15 and errors[5] < 0.07


@pytest.mark.parametrize("name, chunks", scaling.SCHEDULES.items())
@pytest.mark.parametrize("ranks", [3, 4])
def test_equal_stages_and_free_transfers_leave_the_bubble(name, chunks, ranks):
    costs = {kind: [1.7] * ranks * chunks for kind in "FIW"} | {"B": [3.4] * ranks * chunks}
    plan = build_schedule(name, ranks, 2 * ranks, chunks)
    row = scaling.excess(plan, costs, 0.0)
    assert row["stages"] == row["transfers"] == row["unqueued"] == 0
    if name in ("1f1b", "interleaved", "zb_h1"):
        share = {"1f1b": 1, "interleaved": chunks, "zb_h1": 3}[name]
        assert row["bubble"] == pytest.approx((ranks - 1) / (share * 2 * ranks + ranks - 1))
    uneven = {kind: [0.5 * each[0], *each[1:-1], 1.5 * each[-1]] for kind, each in costs.items()}
    assert scaling.excess(plan, uneven, 0.0)["stages"] > 0
    row = scaling.excess(plan, costs, 0.1)
    assert row["links x 1.3"] < row["transfers"] < row["links x 0.7"]


def test_transfers_of_a_pair_wait_for_each_other_and_for_their_receive():
    """Two micro-batches, F = 1, B = 2, a transfer takes 3.

    The second activation is there at 2, leaves when the first has come, at 4, and is computed from 7 to 8; the
    gradients are there at 10 and 12. The first comes at 13; the second's receive stands behind 0B0, which ends at 15.
    """
    plan = build_schedule("gpipe", 2, 2)
    assert simulate(plan, transfer=3.0).makespan == 15
    assert queued_makespan(plan, transfer=3.0) == 15 + 3 + 2


@pytest.mark.parametrize("name, chunks", scaling.SCHEDULES.items())
def test_queues_never_shorten_a_step_and_do_nothing_to_free_transfers(name, chunks):
    draw = random.Random()
    plan = build_schedule(name, 4, 12, chunks)
    costs = {kind: [draw.uniform(1, 2) for _ in range(4 * chunks)] for kind in "FBIW"}
    assert queued_makespan(plan, costs) == pytest.approx(simulate(plan, costs).makespan)
    for transfer in (0.1, 0.7):
        least = simulate(plan, costs, transfer).makespan
        assert queued_makespan(plan, costs, transfer) >= least * (1 - 1e-12)


def test_the_results_in_the_repository_are_those_of_this_code(tmp_path, monkeypatch, capsys):
    output = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--output", str(output)])
    assert scaling.main() == 0
    assert "tensor parallel" in capsys.readouterr().out
    committed = Path(scaling.__file__).parent / "results" / "scaling.json"
    made, kept = (json.loads(path.read_text())["tables"] for path in (output, committed))
    remedy = "run python benchmarks/scaling.py --output benchmarks/results/scaling.json, and see docs/throughput.md"
    assert made.keys() == kept.keys(), remedy
    for title, rows in made.items():
        for mine, own in zip(rows, kept[title], strict=True):
            assert mine.keys() == own.keys(), remedy
            for name, cell in mine.items():
                same = cell == own[name] or cell == pytest.approx(own[name], rel=1e-6, abs=1e-9)
                assert same, f"{title}, {name}: {remedy}"


def test_an_unknown_gpu_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--devices", "h100", "cpu"])
    with pytest.raises(SystemExit) as stop:
        scaling.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --devices cpu: no such GPU; known: a100, h100, h200, b200\n"
