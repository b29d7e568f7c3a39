"""The loss on a token file: every token once, equal in every layout to the definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.source import fill_model
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.errors import UserError
from megalite.evaluation.loss import Score, Windows, count_bytes, score
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.text.tokenizers import ByteTokenizer
from tests.fixtures import golden
from tests.support.pool import Pool

NAME = "llama3_gqa"
VOCABULARY = 101


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A token file of documents of odd lengths, fresh every time."""
    random = np.random.default_rng()
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for length in (17, 1, 40, 8, 29):
            writer.add_document(random.integers(VOCABULARY, size=length))
    return str(tmp_path / "data")


def _score(rank: int, layout: dict[str, int], prefix: str, seq_length: int, **options: Any) -> Score:
    mesh = Mesh(rank=rank, **layout)
    with HuggingFaceSource(golden.folder(NAME)) as source:
        parallel = {"tensor": mesh.tp, "pipeline": mesh.pp, "context": mesh.cp, "sequence": False}
        config = golden.training_config(source.model, **parallel)
        model = ShardedModel(config, mesh, select_kernels({}, golden.CPU), trained=False)
        fill_model(model, source)
    windows = Windows(IndexedDataset(prefix), seq_length, VOCABULARY, options.pop("max_samples", None))
    return score(windows, model, **options)


def _definition(prefix: str, seq_length: int) -> tuple[float, int]:
    """Sum and count of the next-token losses, one window after the other."""
    stage, total, count = golden.whole_model(NAME), 0.0, 0
    ids = torch.from_numpy(IndexedDataset(prefix).tokens.astype(np.int64))
    for start in range(0, len(ids) - 1, seq_length):
        window = ids[start : start + seq_length + 1]
        logits_SV = stage.logits(stage(window[None, :-1], stage.positions(len(window) - 1)))[:, 0]
        total += torch.nn.functional.cross_entropy(logits_SV.double(), window[1:], reduction="sum").item()
        count += len(window) - 1
    return total, count


@pytest.mark.fast
@pytest.mark.parametrize(("seq_length", "micro_batch_size"), [(13, 1), (13, 4), (94, 2), (500, 3), (7, 100)])
def test_the_definition(prefix: str, seq_length: int, micro_batch_size: int) -> None:
    """Windows that divide the file and windows that do not, longer than it, fewer than a micro-batch."""
    if seq_length > 128:
        seq_length = 128
    total, count = _definition(prefix, seq_length)
    result = _score(0, {}, prefix, seq_length, micro_batch_size=micro_batch_size)
    assert count == 94 == result.tokens
    assert result.total == pytest.approx(total, rel=1e-6)
    assert result.loss == pytest.approx(total / 94, rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(total / 94), rel=1e-5)


@pytest.mark.fast
def test_the_first_samples_only(prefix: str) -> None:
    first = _score(0, {}, prefix, 13, max_samples=3)
    assert (first.samples, first.tokens) == (3, 39)
    assert _score(0, {}, prefix, 13, max_samples=1000).tokens == 94


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2, "dp": 2}, {"cp": 2, "dp": 2}], ids=str)
def test_layouts_agree(pool: Pool, prefix: str, layout: dict[str, int]) -> None:
    """Tensor, pipeline, data and context ranks, with a last global micro-batch that is not full."""
    alone = _score(0, {}, prefix, 13, micro_batch_size=3)
    world_size = math.prod(layout.values())
    for result in pool.run(_score_in_layout, world_size, layout, prefix):
        assert result.tokens == 94
        assert result.total == pytest.approx(alone.total, rel=1e-6)


def _score_in_layout(rank: int, layout: dict[str, int], prefix: str) -> Score:
    return _score(rank, layout, prefix, 13, micro_batch_size=3)


@pytest.mark.fast
def test_document_masks(prefix: str) -> None:
    """With masks, a token's loss is that of its document alone (one window holds the file)."""
    stage, total = golden.whole_model(NAME), 0.0
    file = IndexedDataset(prefix)
    documents = [torch.from_numpy(file.document(number).astype(np.int64)) for number in range(file.documents)]
    for document, following in zip(documents, [*documents[1:], None]):
        logits_SV = stage.logits(stage(document[None], stage.positions(len(document))))[:, 0].double()
        targets = document[1:] if following is None else torch.cat([document[1:], following[:1]])
        total += torch.nn.functional.cross_entropy(logits_SV[: len(targets)], targets, reduction="sum").item()
    assert _score(0, {}, prefix, 100, document_mask=True).total == pytest.approx(total, rel=1e-6)
    assert _score(0, {}, prefix, 100).total != pytest.approx(total, rel=1e-4)


@pytest.mark.fast
def test_bytes_and_bits(tmp_path: Path) -> None:
    """The whole file's bytes are known from its description, a part's from the tokenizer."""
    text = "naïve text, and more of it " * 9
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(ByteTokenizer().encode(text))
        writer.finish({"text_bytes": len(text.encode())})
    file = IndexedDataset(tmp_path / "data")
    assert count_bytes(Windows(file, 50, 257), None) == (len(text.encode()), "json")
    assert count_bytes(Windows(file, 50, 257, 2), None) is None
    assert count_bytes(Windows(file, 50, 257, 2), ByteTokenizer()) == (100, "tokenizer")
    assert Score(10 * np.log(2), 7, 1).bits_per_byte(20) == pytest.approx(0.5)


@pytest.mark.fast
def test_unknown_tokens_are_refused(prefix: str) -> None:
    file = IndexedDataset(prefix)
    highest = int(file.tokens.max())
    with pytest.raises(UserError, match=rf"data\.bin: token id {highest} .*model\.vocab_size = {highest}"):
        for number in range(len(windows := Windows(file, 13, highest))):
            windows.ids(number)
