"""Batches: the same global batch in every layout, masks, bad ids, reading ahead."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megalite.data.batches import Batches
from megalite.data.dataset import PADDING, SampledFile, TokenDataset, build_datasets
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.errors import UserError
from tests.support.patience import wait_until

pytestmark = pytest.mark.fast
SEQ = 13
EOD = 0


def write(prefix, lengths, seed, dtype=np.uint16, eod=False, low=1, vocab=500):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(low, vocab, length) for length in lengths]
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            if eod:
                document[-1] = EOD
            writer.add_document(document)
    return str(prefix), documents


def dataset_of(train, samples=200, seed=3, vocab_size=500, **fields):
    config = SimpleNamespace(train=train, valid=fields.pop("valid", []), split=fields.pop("split", ""))
    return build_datasets(
        config, seq_length=SEQ, seed=seed, train_samples=samples, valid_samples=0, vocab_size=vocab_size, **fields
    )[0]


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng()
    first, _ = write(tmp_path / "a", rng.integers(1, 50, 90), 1)
    second, _ = write(tmp_path / "b", rng.integers(1, 9, 200), 2, np.int32)
    return dataset_of([[0.7, first], [0.3, second]])


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2)])
def test_every_layout_sees_the_same_global_batch(dataset, dp, micro):
    samples = 24
    seen: dict[int, np.ndarray] = {}
    for rank in range(dp):
        with Batches(dataset, micro_batch_size=micro, dp_rank=rank, dp_size=dp) as batches:
            for number, batch in enumerate(batches.next_batch(48, samples)):
                assert batch.tokens_BS.shape == batch.labels_BS.shape == (micro, SEQ)
                assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
                for index in range(micro):
                    sample = 48 + number * micro * dp + rank * micro + index
                    seen[sample] = np.append(batch.tokens_BS[index].numpy(), batch.labels_BS[index, -1].numpy())
    assert sorted(seen) == list(range(48, 48 + samples))
    for sample, tokens in seen.items():
        np.testing.assert_array_equal(tokens, dataset[sample])


def test_samples_are_the_stream_of_shuffled_documents(tmp_path):
    prefix, documents = write(tmp_path / "a", np.random.default_rng().integers(1, 40, 70), 5)
    dataset = dataset_of([prefix])
    indices = dataset.sources[0].indices
    stream = np.concatenate([documents[number] for number in indices["document_index"]])
    for number in range(len(dataset.sources[0])):
        start = int(indices["shuffle_index"][number]) * SEQ
        np.testing.assert_array_equal(dataset[number], stream[start : start + SEQ + 1])


def test_uneven_batch_is_filled_with_rows_that_do_not_count(dataset):
    counted = []
    for rank in range(4):
        with Batches(dataset, micro_batch_size=2, dp_rank=rank, dp_size=4) as batches:
            read = batches.next_batch(8, 11)
        assert len(read) == 2
        for batch in read:
            valid_B = (batch.labels_BS != -100).all(dim=1)
            assert ((batch.labels_BS == -100).all(dim=1) | valid_B).all()
            counted.extend(batch.tokens_BS[valid_B].numpy())
    expected = [dataset[number][:-1] for number in range(8, 19)]
    assert sorted(map(tuple, counted)) == sorted(map(tuple, expected))


def test_document_masks_follow_the_documents(tmp_path):
    prefix, documents = write(tmp_path / "a", [5, 30, 1, 7, 4, 9, 2, 2, 60], 6)
    dataset = dataset_of([prefix], samples=20)
    indices = dataset.sources[0].indices
    owner = np.concatenate([np.full(len(documents[n]), place) for place, n in enumerate(indices["document_index"])])
    place = np.concatenate([np.arange(len(documents[n])) for n in indices["document_index"]])
    with Batches(dataset, micro_batch_size=4, document_mask=True) as batches:
        batch = batches.next_batch(0, 4)[0]
    for row in range(4):
        begin = int(indices["shuffle_index"][row]) * SEQ
        owners, places = owner[begin : begin + SEQ], place[begin : begin + SEQ]
        np.testing.assert_array_equal(batch.documents_BS[row], owners - owners[0])
        first = owners == owners[0]  # a document that began in an earlier sample begins again here
        np.testing.assert_array_equal(batch.positions_BS[row], np.where(first, places - places[0], places))


def test_without_document_masks_a_sequence_is_one_document(dataset):
    with Batches(dataset, micro_batch_size=3) as batches:
        batch = batches.next_batch(0, 3)[0]
    assert batch.positions_BS is None and batch.documents_BS is None


def test_label_after_the_end_of_a_document_is_left_out(tmp_path):
    prefix, _ = write(tmp_path / "a", [4] * 80, 7, eod=True)
    dataset = dataset_of([prefix], samples=20)
    with Batches(dataset, micro_batch_size=20, end_of_document=EOD) as batches:
        batch = batches.next_batch(0, 20)[0]
    ends = batch.tokens_BS == EOD
    assert ends.any() and (batch.labels_BS[ends] == -100).all()
    assert (batch.labels_BS[~ends] != -100).all() and (batch.labels_BS == EOD).any()


def test_last_partial_sample_is_padded_and_masked(tmp_path):
    prefix, documents = write(tmp_path / "a", [20, 3], 8)
    source = SampledFile(IndexedDataset(prefix), range(2), SEQ, 1, None, drop_last=False)
    dataset = TokenDataset([source], None, None)
    assert len(dataset) == 2
    stream = np.concatenate([documents[number] for number in source.indices["document_index"]])
    partial = int(np.flatnonzero(source.indices["shuffle_index"] == 1)[0])
    np.testing.assert_array_equal(dataset[partial], np.append(stream[SEQ:], [PADDING] * 4))
    with Batches(dataset, micro_batch_size=1, document_mask=True) as batches:
        batch = batches.next_batch(partial, 1)[0]
    assert batch.labels_BS[0, -4:].tolist() == [-100] * 4 and (batch.labels_BS[0, :-4] != -100).all()
    assert batch.tokens_BS[0, -3:].tolist() == [0] * 3
    assert batch.documents_BS[0, -1] > batch.documents_BS[0, -4]  # padding is a document of its own


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 500), (np.int32, 70000), (np.int32, -5)])
def test_id_outside_the_vocabulary_names_file_document_and_id(tmp_path, dtype, bad):
    with IndexedWriter(tmp_path / "a", dtype) as writer:
        for number in range(40):
            writer.add_document([1, 2, bad if number == 23 else 3, 4, 5])
    dataset = dataset_of([str(tmp_path / "a")], samples=15)
    with Batches(dataset, micro_batch_size=1) as batches, pytest.raises(UserError) as caught:
        for first in range(15):
            batches.next_batch(first, 1)
    assert f"a.bin: document 23: token id {bad} is outside the vocabulary of 500" in str(caught.value)


def test_next_steps_are_read_ahead_and_jumps_are_right(dataset, monkeypatch):
    read = []
    original = TokenDataset.read

    def spy(self, number, *rows):
        read.append((number, threading.current_thread().name))
        return original(self, number, *rows)

    monkeypatch.setattr(TokenDataset, "read", spy)
    with Batches(dataset, micro_batch_size=4) as batches:
        batches.next_batch(0, 4)
        wait_until(lambda: len(read) >= 12, told=lambda: read)
        assert [number for number, _ in read] == list(range(12))  # two steps ahead, no more
        assert all(name.startswith("batches") for _, name in read)
        jumped = batches.next_batch(100, 4, upcoming=[(104, 8)])[0]
        ramped = batches.next_batch(104, 8)
    np.testing.assert_array_equal(jumped.tokens_BS[2], dataset[102][:-1])
    np.testing.assert_array_equal(ramped[1].tokens_BS[3], dataset[111][:-1])
    assert sum(number == 104 for number, _ in read) == 1  # what was announced is not read twice


def test_close_ends_the_thread(dataset):
    before = threading.active_count()
    batches = Batches(dataset, micro_batch_size=4)
    batches.next_batch(0, 8)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_guesses_do_not_read_beyond_the_plan(dataset, monkeypatch):
    read = []
    monkeypatch.setattr(TokenDataset, "read", lambda self, number, *rows: read.append(number))
    with Batches(dataset, micro_batch_size=10) as batches:
        batches.next_batch(170, 10)
        batches.next_batch(180, 10)
        batches.next_batch(190, 10)
        batches.next_batch(0, 10, upcoming=[])  # the one thread has finished all guesses before this
    assert max(read) == 199


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_device(dataset):
    with Batches(dataset, micro_batch_size=4, device="cuda", document_mask=True) as batches:
        first = batches.next_batch(0, 8)[1]
        assert first.tokens_BS.is_cuda and first.documents_BS.is_cuda
        np.testing.assert_array_equal(first.tokens_BS[1].cpu(), dataset[5][:-1])
