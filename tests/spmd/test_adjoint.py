"""The backward pass of every autograd function that communicates is the adjoint of its forward pass.

Along the function's own axis, inputs are drawn as the types say that stand beside the function (R and I alike on all
ranks, V and P of each rank's own) and so are the gradients of the outputs, whose types are the dual ones. Then, for any
small step dx,

    sum over ranks of <gradient of y, change of y>  =  sum over ranks of <gradient of x, dx>

where what is invariant counts once. A sum that is missing, doubled or over the wrong ranks breaks the equation or the
equality of what must be equal, whatever the function computes. All ranks run in one process.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.kernels import Kernels, select_kernels
from megalite.mesh import CPU, GroupFactory, Mesh
from megalite.model.all_heads_norm import AllHeadsNorm
from megalite.model.build import Build
from megalite.model.lora import LoRA
from megalite.model.router import Router
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.context import ContextRegion
from megalite.parallel.context_attention import ContextAttention
from megalite.parallel.experts import Exchange, Sorting, collect, spread
from megalite.parallel.linear import enter_region, gather_ahead
from megalite.parallel.virtual_parts import shared_by_parts
from megalite.placement import PlacedParameter, row_box
from tests.spmd.typed import functions, is_local, parse
from tests.support.parity import Case
from tests.support.virtual import World

S, B, H, WIDTH, VOCABULARY = 24, 2, 8, 24, 37
STEP = 1e-3


@dataclass
class Drawn:
    """One rank's inputs by name, with their types, drawn alike or not as the types say."""

    mesh: Mesh
    axis: str
    sequence: bool
    tensors: dict[str, tuple[Tensor, str]] = field(default_factory=dict)

    @property
    def index(self) -> int:
        return self.mesh.index(self.axis)

    @property
    def stream(self) -> str:
        """The type of what flows between tensor-parallel blocks."""
        return "V" if self.sequence else "I"

    @property
    def rows(self) -> int:
        """The part of the sequence between tensor-parallel blocks."""
        return S // self.mesh.tp if self.sequence else S

    def random(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        own = self.index if kind in "VP" else -1
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {own}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def input(self, name: str, kind: str, *shape: int) -> Tensor:
        tensor = self.random(name, kind, shape).requires_grad_()
        self.tensors[name] = (tensor, kind)
        return tensor

    def parameters(self, module: torch.nn.Module) -> None:
        """Fill and add the module's parameters; replicas are R or I as their placement says."""
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, PlacedParameter)
            boxes = parameter.placement.boxes
            whole = all(len(box.replicas) == self.mesh.tp for box in boxes) and self.mesh.tp > 1
            kind = ("R" if boxes[0].partial else "I") if whole else "V"
            with torch.no_grad():
                parameter.copy_(self.random(name, kind, tuple(parameter.shape)) * 0.5 + 0.5)
            self.tensors[name] = (parameter, kind)


Setting = Callable[[Drawn, Build], tuple[Callable[[], Tensor], str]]


def build_of(mesh: Mesh, sequence: bool, kernels: Kernels, fields: dict[str, Any]) -> Build:
    heads = {"model.heads": 8, "model.kv_heads": 8, "model.head_dim": 4}
    config = Case.of({"model.hidden_size": H} | heads | fields).config(1)
    return Build(config.model, mesh, TensorRegion(mesh.group("tp"), sequence), kernels, torch.float64)


def column(drawn, build):
    part = WIDTH // drawn.mesh.tp
    boxes = tuple(
        row_box(name, shape, drawn.index * part, part, 0, (drawn.mesh.rank,))
        for name, shape in (("w", (WIDTH, H)), ("b", (WIDTH,)))
    )
    layer = build.column(boxes[:1], boxes[1:])
    drawn.parameters(layer)
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: layer(x), "V"


def row(drawn, build, prologue=None):
    part = WIDTH // drawn.mesh.tp
    layer = build.row("w", (H, WIDTH), (drawn.index * part, part))
    drawn.parameters(layer)
    x = drawn.input("x", "V", S, B, part)
    return lambda: layer(x, prologue=prologue), drawn.stream


def gathering_ahead(drawn, build):
    part = WIDTH // drawn.mesh.tp
    layer = build.column((row_box("w", (WIDTH, H), drawn.index * part, part, 0, (drawn.mesh.rank,)),))
    drawn.parameters(layer)
    above = drawn.input("above", drawn.stream, drawn.rows, B, H)

    def both() -> Tensor:
        y = layer(above)
        return gather_ahead(gated(y), y)

    return both, "V"


def in_pieces(setting: Setting) -> Setting:
    """In two pieces, where there is a sequence to cut; with one row of it on each rank there is one piece."""

    def cut(drawn: Drawn, build: Build) -> tuple[Callable[[], Tensor], str]:
        region = build.region
        pieces = TensorRegion(region.group, region.sequence, 2)
        return setting(drawn, dataclasses.replace(build, region=pieces))

    return cut


def embedding(drawn, build):
    layer = build.embedding("e", (drawn.mesh.rank,))
    drawn.parameters(layer)
    ids = torch.randint(VOCABULARY, (B, S), generator=torch.Generator().manual_seed(1))
    return lambda: layer(ids), drawn.stream


def labels() -> Tensor:
    drawn = torch.randint(VOCABULARY, (B, S), generator=torch.Generator().manual_seed(2))
    drawn[:, ::5] = -100
    return drawn


def loss(drawn, build):
    head = build.head("h", (drawn.mesh.rank,), z_loss=0.01, tied_to=None)
    drawn.parameters(head)
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: head.loss(x, labels(), 0.3), "I"


def logprobs(drawn, build):
    head = build.head("h", (drawn.mesh.rank,), z_loss=0.0, tied_to=None)
    drawn.parameters(head)
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: head.logprobs(x, labels()), "I"


def score(drawn, build):
    head = build.scalar_head("h")
    drawn.parameters(head)
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: head(x), "I"


def all_heads_norm(drawn, build):
    count, dim = 8 // drawn.mesh.tp, 4
    norm = AllHeadsNorm(build, (row_box("n", (32,), drawn.index * count * dim, count * dim, 0, (drawn.mesh.rank,)),))
    drawn.parameters(norm)
    x = drawn.input("x", "V", S, B, count, dim)
    return lambda: norm(x), "V"


def router(drawn, build):
    layer = Router(build, 0)
    drawn.parameters(layer)
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: layer(x).weights_sBK, drawn.stream


def sorting() -> Sorting:
    return Sorting.of(torch.randint(5, (2 * S * B,), generator=torch.Generator().manual_seed(3)))


def spreading(drawn, build):
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: spread(x, sorting(), 2, build.region), "R"


def collecting(drawn, build):
    x = drawn.input("x", "P", 2 * S * B, H)
    return lambda: collect(x, sorting(), 2, build.region, (S, B, H)), drawn.stream


def shared_weight(drawn, build):
    weight = drawn.input("weight", "I", H)
    return lambda: torch.stack(shared_by_parts(weight, 2, build.region.group)), "R"


def entering(drawn, build):
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: enter_region(x, build.region).clone(), "R"  # it may be the input itself


def lora_column(drawn, build):
    part = WIDTH // drawn.mesh.tp
    box = row_box("l.q_proj.weight", (WIDTH, H), drawn.index * part, part, 0, (drawn.mesh.rank,))
    layer = adapted(build).column((box,))
    layer.layer.weight.requires_grad_(False)
    drawn.parameters(layer)
    x = drawn.input("x", drawn.stream, drawn.rows, B, H)
    return lambda: layer(x), "V"


def lora_row(drawn, build):
    part = WIDTH // drawn.mesh.tp
    layer = adapted(build).row("l.o_proj.weight", (H, WIDTH), (drawn.index * part, part))
    layer.layer.weight.requires_grad_(False)
    drawn.parameters(layer)
    x = drawn.input("x", "V", S, B, part)
    return lambda: layer(x), drawn.stream


def adapted(build: Build) -> Build:
    adapter = Case.of({"adapter.kind": "lora", "adapter.rank": 2}).config(1).adapter
    return dataclasses.replace(build, adapter=LoRA(adapter))


def exchange(drawn, build):
    size, index = drawn.mesh.ep, drawn.index
    counts = torch.randint(4, (size, size), generator=torch.Generator().manual_seed(4)).tolist()
    leaving, arriving = counts[index], [counts[other][index] for other in range(size)]
    x = drawn.input("x", "V", sum(leaving), H)

    def both() -> Tensor:
        exchanged = Exchange(drawn.mesh.group("ep"), leaving, arriving)
        return exchanged.finish(exchanged.start(x))

    return both, "V"


def sequence_gather(drawn, build):
    region = ContextRegion.of(drawn.mesh, "gather", 1)
    x = drawn.input("x", "V", B, region.part_length(S - 3))
    return lambda: region.gather(x, S - 3), "I"


def attention(mode):
    def setting(drawn, build):
        region = ContextRegion.of(drawn.mesh, mode, 1)
        attend, length = ContextAttention(region, build.kernels), region.part_length(S)
        q, k, v = (drawn.input(name, "V", length, B, heads, 4) for name, heads in (("q", 8), ("k", 8), ("v", 8)))
        return lambda: attend(q, k, v, causal=True, window=9), "V"

    return setting


def gated(x: Tensor) -> Tensor:
    return x * x.tanh()


TENSOR: dict[str, Setting] = {
    "_ColumnLinear": column,
    "_RowLinear": row,
    "_RowLinear with a prologue": lambda drawn, build: row(drawn, build, gated),
    "_ColumnLinear with pieces": in_pieces(column),
    "_RowLinear with pieces and a prologue": in_pieces(lambda drawn, build: row(drawn, build, gated)),
    "_GatherAhead": in_pieces(gathering_ahead),
    "_Embed": embedding,
    "_Embed with pieces": in_pieces(embedding),
    "_HeadLoss with pieces": in_pieces(loss),
    "_LabelLogprobs with pieces": in_pieces(logprobs),
    "_Score with pieces": in_pieces(score),
    "_Entered with pieces": in_pieces(entering),
    "_Column with pieces": in_pieces(lora_column),
    "_Row with pieces": in_pieces(lora_row),
    "_HeadLoss": loss,
    "_LabelLogprobs": logprobs,
    "_Score": score,
    "_SplitNorm": all_heads_norm,
    "_Logits": router,
    "_Spread": spreading,
    "_Collect": collecting,
    "_Shared": shared_weight,
    "_Entered": entering,
    "_Column": lora_column,
    "_Row": lora_row,
}
OTHER: dict[str, tuple[str, Setting]] = {
    "_Start and _Finish": ("ep", exchange),
    "_Gather": ("cp", sequence_gather),
    "_Gathered": ("cp", attention("gather")),
    "_Ring": ("cp", attention("ring")),
    "_Exchanged": ("cp", attention("ulysses")),
}

FIELDS = {"_Logits": {"model.experts": 4, "model.experts_per_token": 4, "model.expert_ffn_hidden_size": 8}}
"""All experts chosen: the choice itself has no derivative."""

DUAL = {"R": "P", "P": "R", "I": "I", "V": "V"}


@dataclass
class Seen:
    """One rank's view of the equation."""

    output: Tensor
    kind: str
    change: float
    gradients: dict[str, tuple[Tensor, str, float]]


def look(
    rank: int, make: GroupFactory, setting: Setting, axis: str, size: int, sequence: bool, fields: dict[str, Any]
) -> Seen:
    mesh = Mesh(**{axis: size}, rank=rank, make_group=make)
    for one in ("tp", "cp", "ep"):
        mesh.group(one)
    drawn = Drawn(mesh, axis, sequence)
    kernels = select_kernels({"default": "reference", "attention": "sdpa"}, CPU)
    call, kind = setting(drawn, build_of(mesh, sequence, kernels, fields))
    output = call()
    # The fused loss must be the root of backward: its gradient is 1.
    slope = torch.ones_like(output) if output.dim() == 0 else drawn.random("slope", DUAL[kind], output.shape)
    trained = {name: pair for name, pair in drawn.tensors.items() if pair[0].requires_grad}
    gradients = torch.autograd.grad(
        output, [tensor for tensor, _ in trained.values()], slope.to(output.dtype, copy=True)
    )
    steps = {name: drawn.random(f"step {name}", k, tuple(x.shape)) for name, (x, k) in trained.items()}

    def moved(by: float) -> Tensor:
        for name, (tensor, _) in trained.items():
            tensor.data.add_(steps[name], alpha=by)
        result = call().detach().double()
        for name, (tensor, _) in trained.items():
            tensor.data.sub_(steps[name], alpha=by)
        return result

    change = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    found = {
        name: (gradient, k, float((gradient.double() * steps[name]).sum()))
        for (name, (_, k)), gradient in zip(trained.items(), gradients)
    }
    return Seen(output.detach(), kind, float((change * slope).sum()), found)


DECLARED = {cls.__name__: parse(cls.spmd) for cls in functions() if not is_local(cls)}  # type: ignore[attr-defined]


def check_declarations(name: str, seen: Seen, sequence: bool) -> None:
    """What was drawn, and the dual of what was drawn for the output, have the types that stand beside the function."""
    names = name.split(" with ")[0].split(" and ")
    declared = DECLARED[names[0]] | {"out": DECLARED[names[-1]].get("out", "")}
    letters = {what: pair.split("|")[0 if sequence else -1] for what, pair in declared.items()}
    kinds = {what: kind for what, (_, kind, _) in seen.gradients.items() if what in STREAMS}
    wanted = {letter for what, letter in letters.items() if what.split("_")[0] in STREAMS}
    if letters["out"]:
        assert (seen.kind, set(kinds.values()) or wanted) == (letters["out"], wanted), f"{name} declares {declared}"


STREAMS = ("x", "q", "k", "v", "hidden", "inputs", "rows", "buffer")


def check(name: str, setting: Setting, axis: str, size: int, sequence: bool, fields: dict[str, Any]) -> None:
    ranks = World(size).run(lambda rank, make: look(rank, make, setting, axis, size, sequence, fields))
    for seen in ranks:
        if seen.kind in "RI":
            torch.testing.assert_close(seen.output, ranks[0].output, rtol=0, atol=0, msg="the outputs differ")
        for what, (gradient, kind, _) in seen.gradients.items():
            if kind in "IP":
                first = ranks[0].gradients[what][0]
                torch.testing.assert_close(gradient, first, msg=f"the gradients of {what} differ")
    check_declarations(name, ranks[0], sequence)
    ours = sum(seen.change for seen in (ranks[:1] if ranks[0].kind == "I" else ranks))
    theirs, size_of = 0.0, 0.0
    for what, (_, kind, _) in ranks[0].gradients.items():
        terms = [seen.gradients[what][2] for seen in (ranks[:1] if kind == "I" else ranks)]
        theirs, size_of = theirs + sum(terms), size_of + sum(map(abs, terms))
    assert abs(ours - theirs) <= 2e-4 * (size_of + abs(ours)), f"{ours} of the outputs, {theirs} of the inputs"


SIZES = [pytest.param(2, marks=pytest.mark.fast), 4, 8]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", TENSOR)
@pytest.mark.parametrize("size", SIZES)
def test_along_the_tensor_axis(name, size, sequence):
    check(name, TENSOR[name], "tp", size, sequence, FIELDS.get(name, {}))


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("size", SIZES)
def test_along_the_other_axes(name, size):
    axis, setting = OTHER[name]
    check(name, setting, axis, size, False, {})
