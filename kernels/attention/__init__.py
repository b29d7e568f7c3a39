"""Softmax attention for training, in the forms among which a run chooses.

Query i of S queries, key j of T keys (aligned at the end, "bottom right": query i stands at key position i + T - S):

    visible(i, j) = (j <= i + T - S  if causal) and (i + T - S - window < j  if window) and (documents equal)
    out_i = sum_j softmax_j(softcap(scale q_i . k_j)) v_j         softcap(x) = c tanh(x / c), or x where there is none

A query that sees no key gives 0, and log-sum-exp -inf. Query head h reads kv head h // (H / K).

    reference.py      the formula written out, in fp32
    sdpa.py           torch.nn.functional.scaled_dot_product_attention
    cpu.py            for CPUs, by a fixed rule: compiled (`native.py`), blocked.py, explicit products, or torch's
    flash_triton.py   FlashAttention (Dao et al. 2022 and 2023) in Triton; its kernels in flash_triton_kernels.py
    flash_gluon.py    the same with specialised warps for Hopper, in Gluon; kernels in flash_gluon_kernels.py and
                      flash_gluon_backward_kernels.py
    decode.py         one query a row to a buffer of which only the device knows how far it is filled, for graphs
    decode_triton.py  the same in Triton, the keys split over programs
    choice.py         `auto` on a GPU: one of these or of torch's backends, whichever was measured fastest
    agreement.py      the comparison with the reference that a candidate must pass before it is measured
    trial.py          the same in a process of its own, for candidates that were never proven on a device
    widths.py         values of another width than queries and keys, which all but the first are then padded for

All but decoding take (q_SBHD, k_SBKD, v_SBKD, **Options). Importing this package does not import Triton.
"""

from .reference import Documents, Options, attention_reference, visible_keys

attention = attention_reference

__all__ = ["Documents", "Options", "attention", "attention_reference", "visible_keys"]
