"""What `benchmarks/kernels.py` measures: every operation at the sizes of Llama 3 8B, beside everyone else who does it.

A peer is called as its own documentation says, on inputs in the layout that it prefers; layouts are made beforehand.
The first implementation of a case is ours, under the name of what was chosen ("megalite triton", "megalite
reference"); the eager formulas here are those of Hugging Face's Llama, written out, and share no code with ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_setting import Call, Case, Setting, directions, liger, missing, optional, working
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.config import ModelConfig
from megalite.kernels import fp8, fp8_blocks, grouped, grouped_torch, select_kernels, symmetric
from megalite.kernels.attention import Documents
from megalite.kernels.attention.call import Call as AttentionCall
from megalite.kernels.attention.decode import Filled
from megalite.kernels.attention.trial import admitted
from megalite.kernels.dispatch import attention_candidates
from megalite.mesh import Mesh
from megalite.model.build import Build
from megalite.parallel.collectives import TensorRegion

EPS = 1e-5


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, eager_norm(total, weight)


def norm_cases(at: Setting) -> Iterator[Case]:
    x, residual = (at.randn(at.sizes.tokens, at.sizes.hidden) for _ in range(2))
    weight, theirs = at.randn(at.sizes.hidden), liger(at)
    once, ours, absent = x.numel() * x.element_size(), at.name("rms_norm"), missing(at, ("Liger-Kernel", theirs))
    calls: dict[str, Call] = {
        ours: lambda x, w: at.kernels.rms_norm(x, w, EPS),
        "torch eager": eager_norm,
        "torch F.rms_norm": lambda x, w: F.rms_norm(x, (at.sizes.hidden,), w, EPS),
        **at.compiled(eager_norm),
    }
    if theirs:
        calls["Liger-Kernel"] = lambda x, w: theirs.liger_rms_norm(x, w, EPS)
    contenders = {who: (call, [x, weight]) for who, call in calls.items()}
    yield from directions("rms_norm", contenders, "bytes", (2 * once, 3 * once), absent)
    calls = {
        ours: lambda x, r, w: at.kernels.add_rms_norm(x, r, w, EPS),
        "torch eager": eager_add_norm,
        **at.compiled(eager_add_norm),
    }
    if theirs:
        calls["Liger-Kernel"] = lambda x, r, w: theirs.liger_fused_add_rms_norm(x, r, w, EPS)
    contenders = {who: (call, [x, residual, weight]) for who, call in calls.items()}
    yield from directions("add_rms_norm", contenders, "bytes", (4 * once, 4 * once), absent)


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[B, heads, S, D] with cos and sin [S, D]."""

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rope_cases(at: Setting) -> Iterator[Case]:
    q, k = (at.randn(at.sizes.tokens, 1, heads, at.sizes.width) for heads in (at.sizes.heads, at.sizes.kv_heads))
    angle = torch.rand(at.sizes.tokens, at.sizes.width // 2, device=at.device)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    narrow_cos, narrow_sin, theirs = cos.to(at.dtype), sin.to(at.dtype), liger(at)

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return eager_rope(q, k, narrow_cos, narrow_sin)

    batched = [x.permute(1, 2, 0, 3).contiguous() for x in (q, k)]
    contenders: dict[str, tuple[Call, list[Tensor]]] = {
        at.name("rope"): (lambda q, k: at.kernels.rope(q, k, cos, sin), [q, k]),
        "torch eager": (eager, batched),
        **{who: (call, batched) for who, call in at.compiled(eager).items()},
    }
    if theirs:
        strided = [x.permute(1, 2, 0, 3) for x in (q.clone(), k.clone())]  # as a projection gives them; in place
        contenders["Liger-Kernel"] = lambda q, k: theirs.liger_rope(q, k, narrow_cos[None], narrow_sin[None]), strided
    moved = 2.0 * (q.numel() + k.numel()) * q.element_size()
    yield from directions("rope", contenders, "bytes", (moved, moved), missing(at, ("Liger-Kernel", theirs)))


def swiglu_cases(at: Setting) -> Iterator[Case]:
    gate_up, theirs = at.randn(at.sizes.tokens, 2 * at.sizes.ffn), liger(at)
    halves = [x.contiguous() for x in gate_up.chunk(2, dim=-1)]

    def eager(x: Tensor) -> Tensor:
        return F.silu(x[..., : at.sizes.ffn]) * x[..., at.sizes.ffn :]

    calls: dict[str, Call] = {at.name("swiglu"): at.kernels.swiglu, "torch eager": eager, **at.compiled(eager)}
    contenders = {who: (call, [gate_up]) for who, call in calls.items()}
    if theirs:
        contenders["Liger-Kernel"] = theirs.liger_swiglu, halves
    half = gate_up.numel() * gate_up.element_size() / 2
    yield from directions("swiglu", contenders, "bytes", (3 * half, 5 * half), missing(at, ("Liger-Kernel", theirs)))


def grouped_cases(at: Setting) -> Iterator[Case]:
    """All tokens as rows of 8 experts, unevenly many of each, times one matrix of a feed-forward."""
    experts, (inputs, outputs) = 8, (at.sizes.hidden, at.sizes.ffn)
    x, grad = at.randn(at.sizes.tokens, inputs), at.randn(at.sizes.tokens, outputs)
    weight = at.randn(experts, outputs, inputs)
    total = torch.zeros(experts, outputs, inputs, device=at.device)
    ends = torch.linspace(0, 1, experts + 1, device=at.device).square().mul(at.sizes.tokens).long()[1:]
    flop, others = 2.0 * at.sizes.tokens * inputs * outputs, {"torch grouped_mm": grouped_torch, "loop": grouped}
    for name, first, second in (
        ("grouped_product", x, weight),
        ("grouped_input_gradient", grad, weight),
        ("grouped_weight_gradient_", total, grad),
    ):
        rest = (x, ends) if first is total else (ends,)
        absent: list[str] = []
        calls: dict[str, Callable[[], Any]] = {
            at.name("grouped"): partial(getattr(at.kernels, name), first, second, *rest),
            **{who: partial(getattr(module, name), first, second, *rest) for who, module in others.items()},
        }
        yield Case(name.strip("_"), 0.0, flop, working(calls, absent), None, absent)


def symmetric_cases(at: Setting) -> Iterator[Case]:
    """Muon's two products for a matrix of the feed-forward; flop are those of a plain product."""
    rows, columns = sorted((at.sizes.hidden, at.sizes.ffn))
    a = at.randn(rows, columns)
    gram = symmetric.symmetric_product(a)
    ours = replace(at, kernels=select_kernels({"symmetric": "triton"}, at.device)) if at.gpu else at
    product = ours.kernels.symmetric_product
    for name, matrix, addend in (("gram", a, None), ("gram_squared", gram, gram)):
        absent: list[str] = []
        calls: dict[str, Callable[[], Any]] = {ours.name("symmetric"): partial(product, matrix, addend)}
        if at.gpu:
            calls["torch"] = partial(symmetric.symmetric_product, matrix, addend)
        yield Case(name, 0.0, 2.0 * rows * rows * matrix.shape[1], working(calls, absent), None, absent)


def same_codes(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise RuntimeError unless codes and scales are the specification's."""
    if not all(torch.equal(a.float(), b.float()) for a, b in zip(ours, expected, strict=True)):
        raise RuntimeError("codes or scales in 8 bits are not those of megalite.kernels.fp8")


def fp8_cases(at: Setting) -> Iterator[Case]:
    """Casts of activations, gradients and a weight, bit for bit those of the specification, and a product beside that
    in bf16, to a few percent."""
    x, weight = at.randn(at.sizes.tokens, at.sizes.hidden), at.randn(at.sizes.ffn, at.sizes.hidden)
    numbers, gradients = fp8.DTYPES
    for per_row in (False, True):
        scales = "row" if per_row else "tensor"
        reads = 1 if per_row else 2  # a tensor's largest magnitude must be known first
        for what, name, matrix, dtype, moved in (
            ("activations", "fp8_cast", x, numbers, reads * x.element_size() + 1),
            ("gradients", "fp8_cast", x, gradients, reads * x.element_size() + 1),
            ("weight, both ways", "fp8_cast_transpose", weight, numbers, 2 * x.element_size() + 2),
        ):
            ours = partial(getattr(at.kernels, name), matrix, dtype, per_row=per_row)
            plain = partial(getattr(fp8, name), matrix, dtype, per_row=per_row)
            same_codes(ours(), plain())
            absent = missing(at)
            calls: dict[str, Callable[[], Any]] = {
                at.name("fp8"): ours,
                "torch eager": plain,
                **at.compiled(plain),
            }
            label = f"fp8 {what}, a scale a {scales}"
            yield Case(label, float(moved * matrix.numel()), 0, working(calls, absent), None, absent)
        if at.gpu:
            product = scaled_product(at, x, weight, per_row)
            yield fp8_product_case(at, x, weight, scales, at.name("fp8"), product)

    numbers = fp8.DTYPES[0]
    for what, name, matrix, moved in (
        ("activations, scales of 128", "fp8_cast_blocks", x, x.element_size() + 1),
        ("weight, both ways, scales of 128 x 128", "fp8_cast_weight_blocks", weight, x.element_size() + 2),
    ):
        block_cast, plain = (partial(getattr(of, name), matrix, numbers) for of in (at.kernels, fp8_blocks))
        same_codes(block_cast(), plain())
        calls = {at.name("fp8_blocks"): block_cast, "torch eager": plain}
        yield Case(f"fp8 {what}", float(moved * matrix.numel()), 0, working(calls, absent), None, absent)
    if at.gpu:
        (a, a_scales), (b, b_scales, _) = at.kernels.fp8_cast_blocks(x, numbers), block_cast()
        product = partial(at.kernels.fp8_block_product, a, a_scales, b, b_scales)
        yield fp8_product_case(at, x, weight, "128", at.name("fp8_blocks"), product)


def scaled_product(at: Setting, x: Tensor, weight: Tensor, per_row: bool) -> Call:
    """The forward product of what is cast already."""
    (a, a_scale), (b, b_scale) = (at.kernels.fp8_cast(matrix, fp8.DTYPES[0], per_row=per_row) for matrix in (x, weight))
    options = {"scale_a": a_scale, "scale_b": b_scale.t(), "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return partial(torch._scaled_mm, a, b.t(), **options)


def fp8_product_case(at: Setting, x: Tensor, weight: Tensor, scales: str, name: str, product: Call) -> Case:
    exact, absent = (x @ weight.t()).float(), missing(at)
    error = float((product().float() - exact).norm() / exact.norm())
    if not error < 0.06:
        raise RuntimeError(f"the product in 8 bits, a scale a {scales}, is {error:.1%} off")
    calls: dict[str, Callable[[], Any]] = {name: product, "torch bf16": lambda: x @ weight.t()}
    flop = 2.0 * x.shape[0] * weight.numel()
    return Case(f"fp8 product, a scale a {scales}", 0, flop, working(calls, absent), None, absent)


def loss_cases(at: Setting) -> Iterator[Case]:
    logits, theirs = at.randn(at.sizes.tokens, at.sizes.vocab), liger(at)
    source, leaf = logits.clone(), logits.clone().requires_grad_()
    targets = torch.randint(0, at.sizes.vocab, (at.sizes.tokens,), device=at.device)
    grad_N, name = torch.full((at.sizes.tokens,), 1 / at.sizes.tokens, device=at.device), at.name("cross_entropy")

    def eager(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float(), targets)

    def with_gradient(loss: Call) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(leaf), leaf)

    calls: dict[str, Callable[[], Any]] = {
        name: lambda: at.kernels.cross_entropy_stats_grad_(logits, targets, grad_N),
        "torch eager": with_gradient(eager),
        **{who: with_gradient(call) for who, call in at.compiled(eager).items()},
    }
    if theirs:  # it, too, writes the gradient over its input
        calls["Liger-Kernel"] = lambda: theirs.liger_cross_entropy(logits.requires_grad_(), targets).backward()

    def prepare() -> None:
        logits.requires_grad_(False).copy_(source)
        logits.grad = None

    absent, once = missing(at, ("Liger-Kernel", theirs)), float(logits.numel() * logits.element_size())
    yield Case("cross_entropy forward + gradient", 2 * once, 0, working(calls, absent), prepare, absent)
    width = at.sizes.vocab // 8
    shard = source[:, :width].clone()

    def sharded() -> Any:
        stats = at.kernels.cross_entropy_stats(shard, targets)
        return at.kernels.cross_entropy_grad_(shard, targets, stats, grad_N)

    def restore() -> None:
        shard.copy_(source[:, :width])

    what = "cross_entropy shard of 8, without the collective"
    yield Case(what, 3 * once / 8, 0, {name: sharded}, restore, ["peers (none splits at the collective)"])


def fused_loss_cases(at: Setting) -> Iterator[Case]:
    """The output layer and its loss: ours is the trainer's, on one rank."""
    mesh = Mesh(device=at.device)
    model = ModelConfig(vocab_size=at.sizes.vocab, hidden_size=at.sizes.hidden)
    build = Build(model, mesh, TensorRegion(mesh.group("tp"), False), at.kernels, at.dtype)
    head = build.head("head", (0,), z_loss=0.0, tied_to=None)
    hidden = at.randn(at.sizes.tokens, 1, at.sizes.hidden).requires_grad_()
    weight = at.randn(at.sizes.vocab, at.sizes.hidden).div_(64).requires_grad_()
    head.weight.data.copy_(weight.detach())
    head.weight.main_grad = torch.zeros(weight.shape, device=at.device)
    targets, theirs = torch.randint(0, at.sizes.vocab, (at.sizes.tokens,), device=at.device), liger(at)
    flat, labels_1S, scale = hidden.detach().squeeze(1).requires_grad_(), targets[None], 1.0 / at.sizes.tokens

    def eager() -> Any:
        return torch.autograd.grad(F.cross_entropy((flat @ weight.t()).float(), targets), (flat, weight))

    calls: dict[str, Callable[[], Any]] = {
        at.name("cross_entropy"): lambda: torch.autograd.grad(head.loss(hidden, labels_1S, scale), hidden),
        "torch eager": eager,
    }
    if theirs:
        calls["Liger-Kernel"] = lambda: torch.autograd.grad(
            theirs.liger_fused_linear_cross_entropy(flat, weight, targets), (flat, weight)
        )
    absent = missing(at, ("Liger-Kernel", theirs))
    flop = 6.0 * at.sizes.tokens * at.sizes.hidden * at.sizes.vocab
    yield Case("linear + cross_entropy", 0, flop, working(calls, absent), None, absent)


def sdpa(backend: SDPBackend | None) -> Call:
    """Torch's operator on [S, B, heads, D], causal, with one backend or with whichever it takes."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)

    if backend is None:
        return call

    def limited(*tensors: Tensor) -> Any:
        with sdpa_kernel(backend):
            return call(*tensors)

    return limited


def attention_peers(at: Setting) -> tuple[dict[str, Call], list[str]]:
    """Everyone else who computes causal attention here, and who is not installed."""
    peers: dict[str, Call] = {"SDPA default": sdpa(None)}
    if not at.gpu:
        return peers, []
    peers |= {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    absent: list[str] = []
    if specialised := specialised_attention(at):
        peers["specialised warps"] = specialised
    else:
        absent.append("specialised warps")
    other = optional("flash_attn")
    if other is None:
        return peers, [*absent, "flash-attn"]
    peers["flash-attn"] = lambda q, k, v: other.flash_attn_func(*(x.transpose(0, 1) for x in (q, k, v)), causal=True)
    return peers, absent


def specialised_attention(at: Setting) -> Call | None:
    """The Gluon form, where it exists and its trial in a child ends well; otherwise a row without it."""
    form = attention_candidates(at.device).get("gluon")
    length, heads, kv_heads, width = at.sizes.lengths[0], at.sizes.heads, at.sizes.kv_heads, at.sizes.width
    kind = AttentionCall(length, length, 1, heads, kv_heads, width, at.dtype, gradients=True)
    return form if form and admitted("gluon", [kind], at.device, seconds=40.0) else None


def attention_cases(at: Setting) -> Iterator[Case]:
    (peers, absent), name, heads = attention_peers(at), at.name("attention"), at.sizes.heads

    def inputs(length: int, batch: int, width: int) -> list[Tensor]:
        counts = (heads, at.sizes.kv_heads, at.sizes.kv_heads)
        return [at.randn(length, batch, count, width) for count in counts]

    def cost(length: int, batch: int, width: int) -> tuple[float, float]:
        forward = 2.0 * batch * heads * length * length * width
        return forward, 2.5 * forward

    longest = at.sizes.lengths[-1]
    shapes = [(length, at.sizes.width) for length in at.sizes.lengths] + [(longest, at.sizes.width // 2)]
    for length, width in shapes:
        batch = max(1, at.sizes.attention_tokens // length)
        tensors = inputs(length, batch, width)
        contenders = {who: (call, tensors) for who, call in {name: at.kernels.attention, **peers}.items()}
        amounts = cost(length, batch, width)
        yield from directions(f"attention causal s{length} d{width}", contenders, "flop", amounts, absent)
    length, packed = longest // 8, inputs(longest, 1, at.sizes.width)
    documents = Documents(torch.arange(8, device=at.device).repeat_interleave(length)[:, None])
    batched = [x.view(8, length, *x.shape[2:]).transpose(0, 1).contiguous() for x in packed]
    contenders = {
        name: (lambda q, k, v: at.kernels.attention(q, k, v, documents=documents), packed),
        **{f"{who}, batched": (call, batched) for who, call in peers.items()},
    }
    amounts = cost(length, 8, at.sizes.width)
    yield from directions(f"attention 8 documents of {length}", contenders, "flop", amounts, absent)


def decode_cases(at: Setting) -> Iterator[Case]:
    """One query a row to a full buffer, as in generation: few rows, and many."""
    heads, kv_heads, width, length = at.sizes.heads, at.sizes.kv_heads, at.sizes.width, at.sizes.lengths[-1]
    name = f"megalite {'triton' if at.gpu else 'reference'}"
    theirs = getattr(optional("flash_attn"), "flash_attn_with_kvcache", None) if at.gpu else None
    for rows in (1, 64):
        q_1BHD = at.randn(1, rows, heads, width)
        k_BKTD, v_BKTD = at.randn(2, rows, kv_heads, length, width)
        filled = Filled(*(torch.full((n,), x, device=at.device) for n, x in ((rows, 0), (1, length))))
        k_TBKD, v_TBKD = (x.permute(2, 0, 1, 3) for x in (k_BKTD, v_BKTD))
        q_BKGD = q_1BHD.view(rows, kv_heads, -1, width)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(at.kernels.decode_attention, q_1BHD, k_TBKD, v_TBKD, filled),
            "SDPA default": partial(F.scaled_dot_product_attention, q_BKGD, k_BKTD, v_BKTD),
        }
        if theirs is not None:
            cache = [x.transpose(1, 2).contiguous() for x in (k_BKTD, v_BKTD)]
            lengths = torch.full((rows,), length, dtype=torch.int32, device=at.device)
            calls["flash-attn"] = partial(theirs, q_1BHD.transpose(0, 1), *cache, cache_seqlens=lengths)
        absent = ["flash-attn"] if at.gpu and theirs is None else []
        moved = 2.0 * k_BKTD.numel() * k_BKTD.element_size()
        yield Case(f"decode s{length} rows {rows}", moved, 0, working(calls, absent), None, absent)


def optimizer_cases(at: Setting) -> Iterator[Case]:
    count = at.sizes.tokens * at.sizes.hidden
    w, g, m, v = (torch.rand(count, device=at.device) for _ in range(4))
    options = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    param, theirs = torch.empty(count, dtype=torch.bfloat16, device=at.device), torch.nn.Parameter(w.clone())
    theirs.grad = g
    fused, foreach = (
        torch.optim.AdamW([theirs], lr=1e-6, fused=True),
        torch.optim.AdamW([theirs], lr=1e-6, foreach=True),
    )
    calls: dict[str, Callable[[], Any]] = {
        at.name("adamw"): lambda: at.kernels.adamw_(w, g, m, v, step=10, param_out=param, **options),
        "torch fused AdamW (no bf16 copy)": fused.step,
        "torch foreach AdamW (no bf16 copy)": foreach.step,
    }
    absent: list[str] = []
    yield Case("adamw", 30.0 * count, 0, working(calls, absent), None, absent)
    calls = {
        at.name("adamw"): lambda: at.kernels.square_sum(g),
        "torch vector_norm fp64": lambda: torch.linalg.vector_norm(g, dtype=torch.float64),
    }
    yield Case("square_sum", 4.0 * count, 0, calls)


GROUPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "rms_norm": norm_cases,
    "rope": rope_cases,
    "swiglu": swiglu_cases,
    "grouped": grouped_cases,
    "symmetric": symmetric_cases,
    "fp8": fp8_cases,
    "cross_entropy": loss_cases,
    "linear_cross_entropy": fused_loss_cases,
    "attention": attention_cases,
    "decode": decode_cases,
    "adamw": optimizer_cases,
}
