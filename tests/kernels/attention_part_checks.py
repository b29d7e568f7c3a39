"""Attention over parts of the keys against the formula: shared by the tests of every form."""

import torch
from torch import Tensor

from megalite.kernels.attention import attention_reference
from megalite.kernels.attention.parts import AttentionParts, Seen, merge
from megalite.kernels.attention.reference import document_begins

LENGTH, BATCH = 53, 2


def over_parts(
    form: AttentionParts,
    tensors: list[Tensor],
    rows_S: Tensor,
    parts: list[Tensor],
    begins_BT: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Output and log-sum-exp of the queries in `rows_S`, and the gradients of q, k, v."""
    q, k, v, grad = tensors
    scale = 0.4
    begins = None if begins_BT is None else begins_BT[:, rows_S]
    sights = [Seen.between(rows_S, part, begins, window) for part in parts]
    own_q, own_grad = q[rows_S], grad[rows_S]
    out = torch.zeros(own_q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    lse = out.new_full((q.shape[1], q.shape[2], len(rows_S)), -torch.inf)
    for part, seen in zip(parts, sights):
        one, one_lse = form.forward(own_q, k[part], v[part], seen, scale, softcap)
        assert one.dtype == q.dtype and bool((one_lse == -torch.inf).all()) == bool(
            (seen.first_BS == seen.last_BS).all()
        )
        out, lse = merge(out, lse, one.to(out.dtype), one_lse)
    grads = [torch.zeros_like(own_q), torch.zeros_like(k), torch.zeros_like(v)]
    for part, seen in zip(parts, sights):
        given = (own_grad, own_q, k[part], v[part], out.to(q.dtype), lse)
        grad_q, grad_k, grad_v = form.backward(*given, seen, scale, softcap)
        grads[0] += grad_q
        grads[1][part] += grad_k
        grads[2][part] += grad_v
    return [out, lse, *grads]


def expected(
    tensors: list[Tensor], rows_S: Tensor, documents: Tensor | None, window: int | None, softcap: float | None
) -> list[Tensor]:
    q, k, v, grad = (x.detach().double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"documents": documents, "window": window, "softcap": softcap, "scale": 0.4}
    out, lse = attention_reference(*leaves, return_lse=True, **options)
    grad_q, grad_k, grad_v = torch.autograd.grad(out[rows_S], leaves, grad[rows_S])
    return [out[rows_S], lse[..., rows_S], grad_q[rows_S], grad_k, grad_v]


def check(
    form: AttentionParts,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    heads: tuple[int, int] = (6, 2),
    width: int = 24,
    packed: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    limit: float = 2e-6,
) -> None:
    """Queries from two far pieces of the rows; the keys in three parts, of which one comes after all queries."""
    shapes = [
        (LENGTH, BATCH, heads[0], width),
        *[(LENGTH, BATCH, heads[1], width)] * 2,
        (LENGTH, BATCH, heads[0], width),
    ]
    tensors = [torch.randn(shape, device=device).bfloat16().to(dtype) for shape in shapes]
    rows_S = torch.tensor([*range(3, 20), *range(37, 46)], device=device)
    pieces = [[*range(5), *range(21, 30)], [*range(5, 21), *range(30, 46)], [*range(46, LENGTH)]]
    parts = [torch.tensor(rows, device=device) for rows in pieces]
    documents = begins = None
    if packed:
        documents = torch.randint(0, LENGTH, (LENGTH, BATCH), device=device).sort(0).values // 9
        begins = document_begins(documents).t()
    found = over_parts(form, tensors, rows_S, parts, begins, window, softcap)
    for mine, theirs in zip(found, expected(tensors, rows_S, documents, window, softcap), strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < limit, (tuple(theirs.shape), error)
