"""Products of linear layers in which a row's bits do not depend on the other rows (`train.batch_invariant`).

A matrix product may choose its order of summation by the number of rows: one token, a batch of them and a whole
sequence then round in different ways. Here every product has the same number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.attention.batch_invariant import LEAST_COLUMNS
from megalite.parallel.products import PLAIN, WideGradients

ROWS = 64
"""Of one product; fewer rows are padded with zeros. A product of whole sequences takes some 1.5 times as long in such
pieces, and of 64 rows as long as ever; fewer would cost more for sequences, and more for few rows."""


class RowBlocks(WideGradients):
    """`megalite.parallel.products.Products` whose outputs are computed in blocks of `ROWS` rows.

    Gradients are plain: they are needed of whole micro-batches alone.
    """

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        x_NI, outputs = x.flatten(0, -2), len(weight_OI)
        if outputs < LEAST_COLUMNS:
            weight_OI = torch.cat((weight_OI, weight_OI.new_zeros(LEAST_COLUMNS - outputs, weight_OI.shape[1])))
        rows, blocks, weight_IO = len(x_NI), -(-len(x_NI) // ROWS), weight_OI.t()
        padded_MI = x_NI.new_zeros((blocks * ROWS, x_NI.shape[1]))
        padded_MI[:rows] = x_NI
        out_MO = x_NI.new_empty((blocks * ROWS, len(weight_OI)))
        for part_RI, out_RO in zip(padded_MI.split(ROWS), out_MO.split(ROWS)):
            torch.mm(part_RI, weight_IO, out=out_RO)
        out_NO = out_MO[:rows, :outputs]
        if bias_O is not None:
            out_NO += bias_O
        y = out_NO.reshape(*x.shape[:-1], outputs)
        return y if out is None else out.copy_(y)

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        return PLAIN.input_gradient(grad, weight_OI, out)
