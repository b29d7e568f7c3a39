"""The products of tensor-parallel layers with their collectives beside them, in pieces along the sequence.

    gather, then product    piece i + 1 is gathered while piece i is multiplied; the first gather has nothing beside it
    product, then sum       piece i is summed over the ranks while piece i + 1 is multiplied; the last sum has nothing

With one piece (`TensorRegion.pieces`) each is one product and one collective. Rows of a product do not depend on each
other, and products are written to the places of their rows in one tensor, so that what follows sees no pieces: weight
gradients are single products over the whole sequence. Where two forward passes take turns (`megalite.parallel.turns`),
their products are whole, and their collectives run beside the other pass.

Shapes: S full sequence of the micro-batch, s = S / tp under sequence parallelism, else S, B micro-batch, I / O input
and output features of the whole layer, i / o this rank's share of them.
Source: Wang et al. 2023 (overlap of communication with dependent computation by decomposition); TransformerEngine's
`num_splits` is the same number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from megalite.mesh import Work
from megalite.parallel.collectives import AllOf, Piece, TensorRegion
from megalite.parallel.products import Products

Multiply = Callable[..., Tensor]
"""(rows) -> their product; with `out`, written to that."""


def gathered_output(
    region: TensorRegion, products: Products, x_sBI: Tensor, weight_oI: Tensor, bias_o: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gather(x) @ weight^T + bias, gather(x)): [S, B, o] and [S, B, I]."""
    if region.pieces == 1 or region.turns.taken:
        whole_SBI, gathered = region.gather_start(x_sBI)
        if region.split > 1:
            region.turns.give()
        gathered.wait()
        return products.output(whole_SBI, weight_oI, bias_o), whole_SBI
    whole_SBI, pieces = region.gather_pieces(x_sBI)
    y_SBo = x_sBI.new_empty((*whole_SBI.shape[:-1], weight_oI.shape[0]))
    for piece, arrived in pieces:
        arrived.wait()
        products.output(whole_SBI[piece.whole], weight_oI, bias_o, out=y_SBo[piece.whole])
    return y_SBo, whole_SBI


def summed_output(region: TensorRegion, products: Products, x_SBi: Tensor, weight_Oi: Tensor) -> Tensor:
    """The sum over the ranks of x @ weight^T: [s, B, O]."""
    if region.size > 1 and region.turns.taken:
        region.turns.give()
        total_sBO, summed = region.sum_start(products.output(x_SBi, weight_Oi, None))
        region.turns.give()
    else:
        total_sBO, summed = _summed(region, lambda rows: products.output(rows, weight_Oi, None), x_SBi)
    summed.wait()
    return total_sBO


def summed_input_gradient(
    region: TensorRegion, products: Products, grad_SBo: Tensor, weight_oI: Tensor
) -> tuple[Tensor, Work]:
    """The sum over the ranks of grad @ weight, [s, B, I], valid after the wait."""
    return _summed(region, lambda rows: products.input_gradient(rows, weight_oI), grad_SBo)


def _summed(region: TensorRegion, multiply: Multiply, x_S: Tensor) -> tuple[Tensor, Work]:
    if region.pieces == 1:
        return region.sum_start(multiply(x_S))
    pieces = region.cut(x_S.shape[0] // region.split)
    total_s, works = None, []
    for piece in pieces:
        partial = multiply(x_S[piece.whole])
        if total_s is None:
            total_s = partial.new_empty((pieces[-1].part.stop, *partial.shape[1:]))
        works.append(region.scatter_start(total_s[piece.part], partial))
    assert total_s is not None
    return total_s, AllOf(works)


class GatheredGradient:
    """The gradient [s, B, O] of a row-parallel layer's output on its way to all ranks, from the moment of creation."""

    def __init__(self, region: TensorRegion, grad_sBO: Tensor) -> None:
        if region.pieces == 1:
            self.whole_SBO, self._arrived = region.gather_start(grad_sBO)
            self._pieces = None
        else:
            self.whole_SBO, self._pieces = region.gather_pieces(grad_sBO)

    def input_gradient(self, products: Products, weight_Oi: Tensor) -> Tensor:
        """whole @ weight, [S, B, i]; `whole_SBO` may be read from then on."""
        if self._pieces is None:
            self._arrived.wait()
            return products.input_gradient(self.whole_SBO, weight_Oi)
        grad_SBi = self.whole_SBO.new_empty((*self.whole_SBO.shape[:-1], weight_Oi.shape[1]))
        for piece, arrived in self._pieces:
            arrived.wait()
            products.input_gradient(self.whole_SBO[piece.whole], weight_Oi, out=grad_SBi[piece.whole])
        return grad_SBi


class GatheredRows:
    """An activation [s, B, H] on its way to all ranks, from the moment of creation, and taken by tokens, place =
    position * B + row: `rows_NH` is the whole by tokens."""

    def __init__(self, region: TensorRegion, x_sBH: Tensor) -> None:
        self._pieces: deque[tuple[Piece, Work]] = deque()
        if region.split == 1:
            self.whole = x_sBH
        else:
            self.whole, pieces = region.gather_pieces(x_sBH)
            self._pieces.extend(pieces)
        self.rows_NH = self.whole.flatten(0, 1)

    def take(self, tokens: slice) -> Tensor:
        """These tokens, [n, H]; waits for what has to arrive for them."""
        while self._pieces and self._pieces[0][0].whole.start * self.whole.shape[1] < tokens.stop:
            self._pieces.popleft()[1].wait()
        return self.rows_NH[tokens]


class SummedRows:
    """A tensor [S, B, H] that is written token after token and summed over the ranks as far as it is made."""

    def __init__(self, region: TensorRegion, whole_SBH: Tensor) -> None:
        self._region, self._whole = region, whole_SBH
        self.rows_NH = whole_SBH.flatten(0, 1)
        self._works: list[Work] = []
        if region.split > 1:
            rows = whole_SBH.shape[0] // region.split
            self._total, self._pieces = whole_SBH.new_empty((rows, *whole_SBH.shape[1:])), deque(region.cut(rows))

    def made(self, tokens: int) -> None:
        """The first so many tokens are final."""
        if self._region.split == 1:
            return
        while self._pieces and self._pieces[0].whole.stop * self._whole.shape[1] <= tokens:
            piece = self._pieces.popleft()
            self._works.append(self._region.scatter_start(self._total[piece.part], self._whole[piece.whole]))

    def finish(self) -> Tensor:
        """The sum [s, B, H], when all tokens are made."""
        if self._region.split == 1:
            return self._region.sum(self._whole)
        self.made(len(self.rows_NH))
        AllOf(self._works).wait()
        return self._total
