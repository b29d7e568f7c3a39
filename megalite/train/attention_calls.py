"""The kinds of attention call a run will make, so that a form for each is chosen before the first step."""

from __future__ import annotations

from megalite.config import Config
from megalite.config.lengths import padded_length
from megalite.kernels.attention.call import Call
from megalite.model.sharded import DTYPES
from megalite.parallel.heads import split_heads


def attention_calls(config: Config) -> list[Call]:
    """All kinds in training and validation on any rank; the same list on every rank."""
    model, train, tensor = config.model, config.train, config.parallel.tensor
    splits = [split_heads(model.heads, model.kv_heads, tensor, index) for index in range(tensor)]
    # Without even groups, keys and values are expanded to one head per query head.
    heads = {(split.queries, split.kvs if split.grouped else split.queries) for split in splits}
    context = config.parallel.context
    if context > 1 and config.parallel.context_mode != "ulysses":
        return []  # attention over parts of the keys has one form
    if context > 1:
        splits = [split_heads(*here, context, index) for here in heads for index in range(context)]
        heads = {(split.queries, split.kvs if split.grouped else split.queries) for split in splits}
    length = padded_length(train.seq_length, context, tensor if config.parallel.sequence else 1)
    passes = (True, False) if train.eval_interval else (True,)
    return [
        Call(
            queries=length,
            keys=length,
            batch=train.micro_batch_size,
            heads=queries,
            kv_heads=kvs,
            width=max(model.head_dim, model.value_dim),  # the narrower are padded
            dtype=DTYPES[train.precision],
            gradients=gradients,
            window=window,
            softcap=model.attn_logit_softcapping or None,
            documents=config.data.document_mask or config.objective.data_format in ("sft", "preference"),
        )
        for queries, kvs in sorted(heads)
        for window in sorted(set(model.windows), key=lambda window: window or 0)
        for gradients in passes
    ]
