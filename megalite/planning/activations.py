"""What forward keeps for backward, and what a layer needs while it is being computed; bytes for one micro-batch.

The counts follow megalite's own autograd functions and kernels (a test runs them and looks at what autograd saved).
Widths a token: h hidden (cut over the tensor ranks where sequence parallel), q queries, k keys, v = k values, f
feed-forward of this rank. Fused and plain kernels keep

    norm 1 of h: its input h, output h        projection: q + 2k        attention: rotated q + k, output q
    norm 2 of h: the sum h, output h          up and gate: 2f           SwiGLU: f

A sparse layer keeps, for each of its `copies` of a token, h gathered and 2f of an expert, and a few numbers of routing.
Attention adds the log-sum-exp of each head, or on a CPU in bf16 what its form there keeps. `selective` drops the
rotated q + k, attention's statistics and SwiGLU's f; `full` keeps the layer's input alone.
Source of the accounting: Korthikanti et al. 2022, sections 3 and 4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megalite.kernels.attention.cpu import form as attention_form
from megalite.kernels.cross_entropy import CHUNK_ELEMENTS, PRODUCT_BYTES
from megalite.parallel.heads import split_heads
from megalite.planning.architecture import LayerShare, vocabulary_rows
from megalite.planning.job import Job
from megalite.planning.latent_cost import LatentWidths

NORMS = {"sandwich_norm": 4}
"""Norms of the stream in a layer, by `model.block`; two in all others."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage for one micro-batch."""

    kept: float
    """Held from its forward to its backward."""
    forward: float
    """Beyond that, at most, while forward runs (the loss left out)."""
    backward: float
    """Beyond that, at most, while backward runs."""
    loss: float
    """Beyond that, while the output layer runs in forward; 0 but on the last stage."""
    postponed: float
    """Bytes that the W of a split backward still needs after its I."""


def _norm_kept(job: Job, width: float) -> float:
    """Bytes a token that an RMSNorm of `width` elements keeps, its output left out."""
    return job.element_bytes * width + 4


def _query_key_norm_kept(job: Job, layer: LayerShare) -> float:
    """The same for norms of queries and keys, whose input is the projection that is kept anyway."""
    model = job.architecture.model
    if not model.qk_norm:
        return 0.0
    return 8.0 if model.qk_norm_scope == "all_heads" else 4.0 * (layer.queries + layer.kvs)


def _attention_kept(job: Job, layer: LayerShare) -> float:
    """Bytes a token between the two projections, the projection's output and the mixed values included; in latent
    attention also of the projections down."""
    size, grouped = job.element_bytes, layer.queries % layer.kvs == 0
    if layer.latent is not None:
        return layer.latent.down_kept(size, job.split) + _latent_kept(job, layer, layer.latent)
    if job.recompute == "selective":
        return size * (2 * layer.query + 2 * layer.key)
    norms = _query_key_norm_kept(job, layer)
    if _attention_form(job, layer) == "reference":
        return _written_out_kept(job, layer, norms)
    if not grouped:  # every query head gets its own copy of keys and values
        return size * (4 * layer.query) + 4 * layer.queries + norms
    if job.context > 1 and job.context_mode == "ulysses":
        return _exchanged_kept(job, layer, norms)
    kept = 3 * layer.query + 3 * layer.key
    if job.device.is_gpu and not norms:  # rotation takes values out of the projection, which nobody keeps then
        kept -= layer.query + layer.key
    form = _attention_form(job, layer)
    if form == "explicit" and layer.kvs > 1 and job.micro_batch_size > 1:
        # The product copies the values, since samples and heads do not lie in one run; nobody else, then, but norms of
        # queries and keys keeps the projection's output.
        kept += layer.key if norms else -(layer.query + layer.key)
    if form == "explicit":  # scores and mask
        statistics = 2.0 * layer.queries * job.seq_length + job.seq_length / job.micro_batch_size
    else:
        statistics = 0.0 if form == "blocked" else 4.0 * layer.queries
    return size * kept + statistics + norms


def _latent_kept(job: Job, layer: LayerShare, latent: LatentWidths) -> float:
    """The same between the projections up and the one out."""
    size = job.element_bytes
    if job.recompute == "selective":
        return latent.selective_kept(size, layer.query, layer.mixed, job.tensor)
    if job.context > 1 and job.context_mode == "ulysses":
        return latent.exchanged_kept(size, layer.queries, layer.mixed, job.context)
    kept = latent.attention_kept(size, layer.queries, layer.mixed)
    form = _attention_form(job, layer)
    if form in ("explicit", "reference"):  # all scores as well
        scores = 8.0 if form == "reference" else 2.0
        kept += scores * layer.queries * job.seq_length + job.seq_length / job.micro_batch_size
    return kept


def _written_out_kept(job: Job, layer: LayerShare, norms: float) -> float:
    """The same where attention is written out in fp32, as on CPUs for bounded scores: scores before and after the
    softmax, mask, the heads of queries, keys and values as each query head reads them, their mixture, sums."""
    size = job.element_bytes
    projection = layer.query + 2 * layer.key if norms or size == 4 else 0
    scores = 8.0 * layer.queries * job.seq_length + job.seq_length / job.micro_batch_size
    return size * (projection + layer.query) + scores + 16.0 * layer.query + 5.0 * layer.queries + norms


def _exchanged_kept(job: Job, layer: LayerShare, norms: float) -> float:
    """The same where heads are exchanged: nobody but norms keeps the projection's output or rotated heads; attention
    keeps its heads of all rows and their output, which is then exchanged back."""
    size, ranks = job.element_bytes, job.context
    width = layer.query // layer.queries
    split = split_heads(layer.queries, layer.kvs, ranks, 0)
    heads = ranks * width * (split.queries + 2 * split.kvs)
    projection = layer.query + 2 * layer.key if norms else 0
    return size * (projection + heads + 2 * layer.query) + 4.0 * layer.queries + norms


def _attention_form(job: Job, layer: LayerShare) -> str:
    """Which form of attention computes the layer: `explicit`, `blocked`, `reference`, or `fused` for all that keep
    log-sum-exps.

    CPUs are taken to have the compiled kernels, and matrix units for bf16 (AMX).
    """
    if job.device.is_gpu or job.context > 1:
        return "fused"
    if job.architecture.model.attn_logit_softcapping:
        return "reference"
    dtype = torch.float32 if job.element_bytes == 4 else torch.bfloat16
    sizes = (job.seq_length, job.seq_length, layer.queries, layer.kvs, job.architecture.model.head_dim)
    form = attention_form(dtype, *sizes, causal=True, trains=True, compiled=True, matrix_units=True)
    return form if form in ("explicit", "blocked") else "fused"


def layer_kept(job: Job) -> float:
    """Bytes that one layer keeps of a micro-batch until its backward."""
    layer = job.layer
    size, hidden = job.element_bytes, layer.hidden / job.split
    if job.recompute == "full":
        return job.tokens * size * hidden
    return job.tokens * _inside_kept(job, layer)


def _inside_kept(job: Job, layer: LayerShare) -> float:
    size, hidden = job.element_bytes, layer.hidden / job.split
    norms = NORMS.get(job.architecture.model.block, 2) * _norm_kept(job, layer.hidden) / job.split
    norms += _norm_factors_kept(job, layer) / job.tokens
    feed_forward = layer.ffn * (2 if job.recompute == "selective" else 3)
    kept = norms + size * (2 * hidden + feed_forward) + _attention_kept(job, layer) + _experts_kept(job, layer)
    kept += size * _gathered_kept(job, layer)
    return kept + (_adapter_kept(job, layer) if job.architecture.frozen else 0.0)


def _gathered_kept(job: Job, layer: LayerShare) -> float:
    """Elements a token of the inputs of column-parallel matrices that are kept whole, beyond this rank's own. Where a
    replicated matrix or a router has the same input, it keeps the rank's own beside it."""
    if not job.keep_gathered or job.split == 1 or job.architecture.frozen:
        return 0.0
    columns = [matrix for matrix in layer.sizes.matrices if matrix.split and not matrix.rows and matrix.used == 1]
    own = sum((layer.latent is not None and not layer.latent.queries, layer.copies and layer.ffn > 0)) * layer.hidden
    return sum(matrix.inputs for matrix in columns) * (1 - 1 / job.split) + own / job.split


def _adapter_kept(job: Job, layer: LayerShare) -> float:
    """Bytes a token that an adapter keeps, less what frozen matrices without one do not keep: their inputs."""
    adapted, hidden = set(layer.sizes.adapted), layer.hidden / job.split
    kept = len(adapted) * job.architecture.adapter.rank / job.split
    if not adapted & {"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"}:
        kept -= hidden
    if layer.latent is not None:
        kept -= 0 if "q_b_proj" in adapted else layer.latent.queries / job.split
        kept -= 0 if "kv_b_proj" in adapted else layer.latent.keys / job.split
    if "o_proj" not in adapted and (
        job.recompute == "selective"
        or _attention_form(job, layer) in ("explicit", "reference")
        or (job.context > 1 and job.context_mode == "ulysses")
        or (layer.latent is not None and layer.latent.padded)
    ):  # other forms of attention keep their output themselves
        kept -= layer.mixed
    if layer.ffn and not layer.copies:
        kept -= 0 if adapted & {"gate_proj", "up_proj"} else hidden
        kept -= 0 if "down_proj" in adapted or job.recompute == "selective" else layer.ffn
    return job.element_bytes * kept


def _norm_factors_kept(job: Job, layer: LayerShare) -> float:
    """Bytes of the fp32 sums 1 + weight of a layer's norms."""
    model = job.architecture.model
    if not model.zero_centered_norm:
        return 0.0
    heads = layer.query + layer.key if model.qk_norm_scope == "all_heads" else 2 * model.head_dim
    inside = heads if model.qk_norm and job.recompute != "selective" else 0
    return 4.0 * (NORMS.get(model.block, 2) * layer.hidden + inside)


def _experts_kept(job: Job, layer: LayerShare) -> float:
    """Bytes a token that its experts and their router keep: each copy's input, gate and up, weight and places in the
    order by expert (once more on the experts' ranks); scores and choices."""
    if not layer.copies:
        return 0.0
    orders = 16.0 * (2 if job.expert > 1 else 1)
    rows = job.element_bytes * (layer.hidden + 2 * layer.expert_ffn) + 4.0 + orders
    routing = 4.0 * layer.experts + 8.0 * layer.copies + 12.0 * layer.copies
    return layer.copies * rows + routing / job.split


def _layer_working(job: Job) -> tuple[float, float]:
    """(forward, backward): most bytes beyond what is kept while one layer is computed.

    Forward is widest around the down projection: SwiGLU's output where it is not kept, the product before it is summed
    over the ranks, the sum. Backward is widest in SwiGLU: the gradients of the stream, of its output and its inputs,
    and the same output once more where it was recomputed; the weight's gradient waits beside them in bf16.
    """
    layer = job.layer
    size, hidden, whole = job.element_bytes, layer.hidden / job.split, float(layer.hidden)
    gathered = whole if job.split > 1 else 0.0
    recomputes = job.recompute == "selective"
    # The plain SwiGLU needs a temporary of its own.
    extra = 0.0 if job.device.is_gpu else 1.0
    forward = size * (whole + hidden + layer.ffn * (extra + (1 if recomputes else 0)))
    swiglu = hidden + gathered + layer.ffn * ((4 if recomputes else 2) + extra)
    up = hidden + gathered + whole + hidden
    if job.overlap_splits > 1:  # the weight gradient of down is put off until then, with what it needs
        up += whole + (layer.ffn if recomputes else 0)
    attention = _context_working(job, layer)
    forward = max(forward, attention[0])
    backward = max(size * max(swiglu, up), attention[1])
    if layer.copies:
        # Outputs of the experts in the order by expert and in that of the tokens; in backward their gradients, those
        # of SwiGLU's output and inputs, and its output once more.
        forward = max(forward, size * (layer.copies * (2 * whole + layer.expert_ffn) + whole))
        backward = max(backward, size * (layer.copies * (whole + 4 * layer.expert_ffn) + whole))
    if job.recompute == "full":
        backward += _inside_kept(dataclasses.replace(job, recompute="none"), layer)
    return job.tokens * forward, job.tokens * backward + _fresh_gradient(job, layer.largest_matrix)


def inference_bytes(job: Job) -> float:
    """Most bytes that a forward pass without gradients has at once, in the feed-forward of a layer: the stream, its
    norm, up, gate and SwiGLU's output, and the product of the down projection."""
    layer = job.layer
    rows = layer.copies * (2.0 * layer.hidden + 3.0 * layer.expert_ffn)
    return job.tokens * job.element_bytes * (3.0 * layer.hidden + 3.0 * layer.ffn + rows)


def _context_working(job: Job, layer: LayerShare) -> tuple[float, float]:
    """(forward, backward) bytes a token while attention talks to the other ranks of a sequence."""
    size, ranks, key = job.element_bytes, job.context, 2.0 * layer.key
    if ranks == 1:
        return 0.0, 0.0
    if job.context_mode == "gather":  # keys and values as they arrive and in order; in order, with two copies of grads
        return 2 * size * ranks * key, 3 * size * ranks * key + size * layer.query
    if job.context_mode == "ring":  # own and arriving ones, fp32 sums; and three of gradients
        wide = 4.0
        return 2 * size * key + (2 * wide + size) * layer.query, (2 * size + 3 * wide) * key + (
            wide + size
        ) * layer.query
    heads = layer.query + key  # leaving and arriving, and in order
    return 3 * size * heads, 3 * size * heads + size * layer.query


def _fresh_gradient(job: Job, elements: float) -> float:
    """Bytes of a weight gradient before it is added to its fp32 sum: in bf16, on CPUs beside its fp32 form."""
    if job.element_bytes == 4:
        return 0.0
    return elements * (2.0 if job.device.is_gpu else 6.0)


def loss_working(job: Job) -> float:
    """Bytes that the output layer needs for a micro-batch: gathered input, its gradient, one chunk of logits."""
    model, size = job.architecture.model, job.element_bytes
    rows = vocabulary_rows(job.architecture, job.tensor)
    limit = CHUNK_ELEMENTS["cuda" if job.device.is_gpu else "cpu"]
    chunk = min(job.tokens, max(1, limit // rows)) * rows * size
    gathered = model.hidden_size * (2 if job.split > 1 else 1)
    product = min(rows * model.hidden_size, PRODUCT_BYTES // size)
    if model.final_logit_softcapping:
        chunk *= 2  # and the slope of the bound
    return job.tokens * size * gathered + chunk + _fresh_gradient(job, product)


def stage_memory(job: Job, stage: int) -> StageMemory:
    """What stage `stage` holds and needs for one micro-batch."""
    architecture, hidden = job.architecture, job.architecture.model.hidden_size / job.split
    stream = job.tokens * job.element_bytes * hidden
    kinds = job.kinds(stage)
    forward, backward = (max(parts) for parts in zip(*(_layer_working(kind) for kind, _ in kinds)))
    kept = sum(count * layer_kept(kind) for kind, count in kinds)
    loss = 0.0
    if stage == 0:
        kept += job.tokens * (8 + 1)  # the ids, and which of them this rank holds
    if stage == job.stages - 1:
        # The final norm's input, and the gradient that the output layer has made already; its own output goes. (It is
        # that output where log-probabilities or values are read.)
        kept += job.tokens * _norm_kept(job, architecture.model.hidden_size) / job.split + stream
        loss = loss_working(job) if job.head == "vocabulary" else 0.0
    elif job.owners[stage] != job.owners[stage + 1]:
        kept += stream  # the output that was sent is held until its gradient comes back
    postponed = job.tokens * job.element_bytes * sum(count * _postponed_width(kind) for kind, count in kinds)
    return StageMemory(kept, forward, backward, loss, postponed)


def _postponed_width(job: Job) -> float:
    """Elements a token that a layer's products need for weight gradients that are put off: their inputs and output
    gradients; those of the stream stay cut by sequence."""
    layer = job.layer
    stream = (4 if layer.ffn else 2) * layer.hidden / job.split
    experts = layer.copies * (2 * layer.hidden + 3 * layer.expert_ffn)
    attention: float = 2 * layer.query + 2 * layer.key
    if layer.latent is not None:
        attention = layer.latent.postponed(layer.query, layer.mixed, job.split)
    return stream + attention + 3 * layer.ffn + experts
