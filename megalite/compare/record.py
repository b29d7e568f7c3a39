"""Recording a run from outside: hooks on its modules, and what stands before and after each optimizer step.

The model's code knows nothing of it. In a forward pass every module's output is recorded, and the input of a
row-parallel layer, which holds what attention or an activation made. In backward a module's part of the gradient of
its input is recorded, and the gradient of its output. What a layer computes a second time in backward is left out.

    forward       weights of the start, tokens and labels, activations, loss
    backward      gradients of activations and, after its layer's, of each parameter, reduced over all ranks
    update        gradient norm, learning rate, the optimizer's state, weights

S tokens of a sequence, s those on this rank, B samples of a micro-batch, F features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalite.compare.pieces import (
    BACKWARD,
    FORWARD,
    INPUT,
    LOSS,
    MASTER,
    NORM,
    RATE,
    START,
    STATE,
    WEIGHT,
    Piece,
    Port,
    Sampling,
    Turn,
    bits_of,
)
from megalite.compare.place import Features, TokenGrid, input_features, module_names, output_features
from megalite.compare.rounding import Rounding
from megalite.model.head import VocabParallelHead
from megalite.model.router import Choice
from megalite.parallel.embedding import VocabParallelEmbedding
from megalite.parallel.linear import RowParallelLinear
from megalite.placement import Box, PlacedParameter, placed_parameters
from megalite.schedule.ops import Op
from megalite.train.trainer import StepResult, Trainer

_BLOCK = re.compile(r"layers\.\d+")


@dataclasses.dataclass(frozen=True)
class _Site:
    """A module of a stage, and the name under which something of it is recorded.

    `doer` is what computes that, `within` the module around it.
    """

    stage: int
    path: str
    name: str
    module: nn.Module
    doer: str
    within: str

    @staticmethod
    def of(stage: int, path: str, name: str, module: nn.Module) -> _Site:
        return _Site(stage, path, name, module, name, name.rpartition(".")[0] or "model")

    def part(self, name: str, doer: str = "") -> _Site:
        """Something else of the module."""
        return dataclasses.replace(self, name=f"{self.name}.{name}", doer=doer or self.doer)


class Recorder:
    """Records the steps of one trainer on this rank; its pieces are `pieces`.

    With `rounding`, what is recorded is moved at random on the way (see `megalite.compare.rounding`).
    """

    def __init__(self, trainer: Trainer, sampling: Sampling | None = None, rounding: Rounding | None = None) -> None:
        self.trainer, self.sampling, self.rounding = trainer, sampling or Sampling(), rounding
        self.pieces: list[Piece] = []
        self._mesh, self._hidden = trainer.mesh, trainer.config.model.hidden_size
        self._step, self._samples, self._clock = 0, 0, 0
        self._op: Op | None = None
        self._turns: dict[tuple[str, str, float], Turn] = {}
        self._owners: dict[int, tuple[_Site, ...]] = {}

    def start(self) -> None:
        """Once weights are there, before the first step: record them, and listen from now on."""
        if self.rounding is not None and self.rounding.weights:
            self._round_weights(self.rounding)
        self._record_weights(START, "initial weights")
        for number, stage in self.trainer.stages.items():
            stage.sums_in_norms = False  # what a layer gives is recorded, so it has to be there
            names = module_names(stage)
            for path, module in stage.named_modules():
                if path in names:
                    self._attach(_Site.of(number, path, names[path], module))
        self.trainer.observe, self.trainer.graph = self._observe, None  # nothing can be heard of a replay
        accumulate = self.trainer.accumulate

        def accumulated(*args: Any, **options: Any) -> Any:
            shares = accumulate(*args, **options)
            self._record_gradients()
            return shares

        self.trainer.accumulate = accumulated  # type: ignore[method-assign]

    @contextlib.contextmanager
    def step(self, number: int, samples: int, lr: float) -> Iterator[Callable[[StepResult], None]]:
        """Around a step of `samples` samples; the caller passes on its result."""
        self._step, self._samples = number, samples
        results: list[StepResult] = []
        yield results.append
        (result,) = results
        self._record_number("loss", "loss", "objective", (LOSS, 1), result.loss)
        self._record_number("grad_norm", "grad_norm", "gradient norm", (NORM,), result.grad_norm)
        self._record_number("lr", "lr", "learning rate schedule", (RATE,), lr)
        self._record_state()
        self._record_weights(WEIGHT, "optimizer")

    # Hooks

    @contextlib.contextmanager
    def _observe(self, op: Op) -> Iterator[None]:
        self._op, self._clock = op, 0
        try:
            yield
        finally:
            self._op = None

    def _attach(self, site: _Site) -> None:
        module = site.module
        module.register_forward_pre_hook(functools.partial(self._before, site))
        module.register_forward_hook(functools.partial(self._after, site))
        for parameter in placed_parameters(module):
            self._owners[id(parameter)] = (*self._owners.get(id(parameter), ()), site)
        if hasattr(module, "add_and_norm"):  # a norm that is called with what is added before it
            added = site.part("residual", site.within)
            inner: Any = module.add_and_norm
            module.__dict__["add_and_norm"] = functools.partial(self._add_and_norm, site, added, inner)
        if isinstance(module, VocabParallelHead):
            module.loss = functools.partial(self._loss, site, module.loss)  # type: ignore[method-assign]
            module.logprobs = functools.partial(self._logprobs, site, module.logprobs)  # type: ignore[method-assign]

    def _before(self, site: _Site, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._op is None or self._op.kind != "F" or not args or not isinstance(args[0], Tensor):
            return None
        x = args[0]
        if isinstance(module, VocabParallelEmbedding):
            self._record_ids("tokens", x)
            return None
        if isinstance(module, RowParallelLinear) or _BLOCK.fullmatch(site.path):
            name = f"{site.name}.input"
            where = f"{site.within} forward" if isinstance(module, RowParallelLinear) else f"input of {site.name}"
            features = list(input_features(module, name, x.shape[-1], self._hidden))
            self._record_tokens("activation", where, FORWARD, site.stage, self._op.micro, x, features)
        return (self._watched(site, x), *args[1:])

    def _watched(self, site: _Site, x: Tensor, called: str = "input") -> Tensor:
        """The module's input as a tensor of its own in the graph, whose gradient is this module's part of it alone."""
        op = self._op
        if op is None or not (x.requires_grad and torch.is_grad_enabled() and x.is_floating_point()):
            return x
        features = list(input_features(site.module, f"{site.name}.{called}", x.shape[-1], self._hidden))
        alias = x.view_as(x)
        alias.register_hook(self._listener(site, f"{site.name} backward", op.micro, features))
        return alias

    def _listener(self, site: _Site, operation: str, micro: int, features: Sequence[Features]) -> Any:
        def listen(gradient: Tensor) -> None:
            kind = "activation_gradient"
            self._record_tokens(kind, operation, BACKWARD, -site.stage, micro, gradient, features, gradient=True)

        return listen

    def _after(self, site: _Site, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._recorded(site, output)
        if self._op is not None and isinstance(output, Choice):
            return dataclasses.replace(output, weights_sBK=self._recorded(site.part("weights"), output.weights_sBK))
        return None

    def _recorded(self, site: _Site, output: Tensor) -> Tensor:
        """A module's output, recorded in forward and watched in backward; rounded at random in a run for the noise."""
        op = self._op
        if op is None or not output.is_floating_point():
            return output
        if output.dim() == 2:  # [B, s], of a scalar head
            features, values_sBF = [Features(site.name, 1, 0, 1)], output.t().unsqueeze(-1)
        else:
            features, values_sBF = list(self._output_features(site, output)), output
        if self.rounding is not None and features:
            output = self.rounding.both_ways(output, *self._rounding_key(site, op.micro, output, features))
            values_sBF = output if values_sBF.dim() == output.dim() else output.t().unsqueeze(-1)
        if op.kind != "F":  # computed once more for backward
            return output
        self._record_tokens("activation", f"{site.doer} forward", FORWARD, site.stage, op.micro, values_sBF, features)
        if output.requires_grad and output.dim() > 2:
            where = f"{site.within} backward"
            output.register_hook(self._listener(site, where, op.micro, features))
        return output

    def _output_features(self, site: _Site, output: Tensor) -> Iterable[Features]:
        width = output.shape[-1]
        if output.dim() != 3:
            return []
        if site.name.endswith(".weights"):  # of a router's choice
            return [Features(site.name, width, 0, width)]
        return output_features(site.module, site.name, width, self._hidden)

    def _rounding_key(self, site: _Site, micro: int, output: Tensor, features: Sequence[Features]) -> tuple[Any, ...]:
        grid = self._grid()
        count = output.shape[0]
        part = self._mesh.index("tp") if output.dim() == 3 and grid.is_cut(count) else -1
        first = [(one.name, one.first) for one in features]
        return site.name, self._step, micro, self._mesh.samples_index, self._mesh.index("cp"), part, first

    def _add_and_norm(
        self, site: _Site, added: _Site, inner: Any, x: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._op is None or self._op.kind != "F":
            total, y = inner(x, residual)
        else:
            total, y = inner(self._watched(site, x, "added"), residual)
            if total.requires_grad:  # the gradient from the stream alone: what y passes on is the norm's own business
                total = total.view_as(total)
        return self._recorded(added, total), self._recorded(site, y)

    def _loss(self, site: _Site, inner: Any, hidden: Tensor, labels_BS: Tensor, scale: Any) -> Tensor:
        op = self._op
        if op is None or op.kind != "F":
            return inner(hidden, labels_BS, scale)
        self._record_ids("labels", labels_BS)
        loss: Tensor = inner(self._watched(site, hidden), labels_BS, scale)
        if self._mesh.index("tp") == 0:  # all tensor ranks have the same
            port = self._port(f"{site.name}.loss", "loss", f"{site.name} forward", (LOSS, 0))
            self._keep(port, (1,), (0,), loss.detach().reshape(1), partial=True)
        return loss

    def _logprobs(self, site: _Site, inner: Any, hidden: Tensor, labels_BS: Tensor) -> Tensor:
        if self._op is None or self._op.kind != "F":
            return inner(hidden, labels_BS)
        self._record_ids("labels", labels_BS)
        result: Tensor = inner(self._watched(site, hidden), labels_BS)
        return self._recorded(site.part("logprobs"), result)

    # Before and after an update

    def _record_gradients(self) -> None:
        for segment in self.trainer.optimizer.segments:
            gradient = segment.gradient
            assert gradient is not None
            owners = {
                box.name: self._owners.get(id(slot.parameter), ())
                for slot in segment.bucket.slots
                for box in slot.parameter.placement.boxes
            }
            for box, part in segment.pieces():
                values = gradient[part]
                if self.rounding is not None:
                    values.copy_(self.rounding(values, "gradient", self._step, box.name, box.offset, box.size))
                stage, place, owner = self._backward_place(owners[box.name], box.name)
                port = self._port(box.name, "gradient", f"{owner} backward", (BACKWARD, -stage, place))
                self._keep(port, box.shape, box.offset, values.view(box.size))

    def _backward_place(self, sites: Sequence[_Site], name: str) -> tuple[int, float, str]:
        """(stage, place, module) of a parameter's gradient: after the innermost of its modules of which a gradient was
        recorded."""
        stage = sites[0].stage if sites else 0
        owner = name.rpartition(".")[0]
        for site in reversed(sites):
            for watched in (f"{site.name}.input", f"{site.name}.added", site.name, owner):
                turn = self._turns.get(("activation_gradient", watched, BACKWARD))
                if turn is not None:
                    return stage, turn[-1] + 0.5, owner
        return stage, 1e9, owner  # after all of the stage: the embedding

    def _record_state(self) -> None:
        for segment in self.trainer.optimizer.segments:
            state = dict(segment.state)
            if segment.separate_master:
                state[MASTER] = segment.master.detach()
            for name in sorted(state):
                if state[name].shape != segment.master.shape:
                    continue
                for box, part in segment.pieces():
                    turn = (STATE, float(name == MASTER))
                    port = self._port(f"{name}: {box.name}", "optimizer_state", "optimizer", turn)
                    self._keep(port, box.shape, box.offset, state[name][part].view(box.size))

    def _weights(self) -> Iterator[tuple[PlacedParameter, Box]]:
        for stage in self.trainer.stages.values():
            for parameter in placed_parameters(stage):
                if parameter.tied_to is None:
                    yield from ((parameter, box) for box in parameter.placement.boxes)

    @torch.no_grad()
    def _record_weights(self, phase: int, operation: str) -> None:
        with contextlib.ExitStack() as stack:
            for buckets in self.trainer.buckets.values():
                stack.enter_context(buckets.whole())
            for parameter, box in self._weights():
                port = self._port(box.name, "weight", operation, (phase,))
                self._keep(port, box.shape, box.offset, box.view(parameter))

    @torch.no_grad()
    def _round_weights(self, rounding: Rounding) -> None:
        rounded: dict[int, Tensor] = {}

        def write(parameter: PlacedParameter) -> None:
            parameter.copy_(rounded.get(id(parameter), parameter))

        with contextlib.ExitStack() as stack:
            for buckets in self.trainer.buckets.values():
                stack.enter_context(buckets.whole())
            for parameter, box in self._weights():
                values = rounded.setdefault(id(parameter), parameter.detach().clone())
                box.view(values).copy_(rounding(box.view(values), "weight", box.name, box.offset, box.size))
        self.trainer.fill(write)
        for segment in self.trainer.segments:
            segment.take_parameters()

    # Pieces

    def _grid(self) -> TokenGrid:
        size, length = self.trainer.shape
        region = next(iter(self.trainer.stages.values())).region
        return TokenGrid(self._mesh, self.trainer.context, region, length, size, self._samples)

    def _port(self, name: str, kind: str, operation: str, turn: Turn) -> Port:
        turn = self._turns.setdefault((kind, name, turn[0]), tuple(map(float, turn)))
        return Port(name, kind, self._step, operation, turn)

    def _record_number(self, name: str, kind: str, operation: str, turn: Turn, value: float) -> None:
        self._keep(self._port(name, kind, operation, turn), (1,), (0,), torch.tensor([value], dtype=torch.float64))

    def _record_ids(self, name: str, ids_BS: Tensor) -> None:
        assert self._op is not None
        features = [Features(name, 1, 0, 1)]
        self._record_tokens("input", "data", INPUT, 0, self._op.micro, ids_BS.t().unsqueeze(-1), features)

    def _record_tokens(
        self,
        kind: str,
        operation: str,
        phase: int,
        stage: int,
        micro: int,
        values_sBF: Tensor,
        features: Sequence[Features],
        *,
        gradient: bool = False,
    ) -> None:
        grid = self._grid()
        if values_sBF.dim() != 3 or grid.rows(values_sBF.shape[0]) is None:
            return
        self._clock += 1
        partial = gradient and not grid.is_cut(values_sBF.shape[0])
        for one in features:
            port = self._port(one.name, kind, operation, (phase, stage, self._clock))
            held = values_sBF.detach()[..., one.local : one.local + one.count]
            for (row, sample), values in grid.boxes(held, micro):
                shape = (grid.length, self._samples, one.total)
                self._keep(port, shape, (row, sample, one.first), values, partial=partial and one.partial)

    def _keep(
        self, port: Port, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor, *, partial: bool = False
    ) -> None:
        kept, corner = self.sampling.take(port.name, shape, offset, values)
        bits = bits_of(values, shape, offset) if self.sampling.hashed and not partial else None
        if kept.size or bits is not None:
            size = tuple(values.shape)
            self.pieces.append(Piece(port, self._mesh.rank, shape, offset, size, kept, corner, partial, bits))
