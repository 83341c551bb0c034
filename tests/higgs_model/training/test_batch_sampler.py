"""Batch sampling: every sample once per epoch, within the limits, and reproducible from any batch number."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.errors import BadInput
from higgs_model.training.batch_sampler import BatchSampler
from higgs_model.training.collator import Collator
from higgs_model.training.model_source import ModelSource
from higgs_model.training.settings import BatchSettings, DataSettings
from tests.higgs_model.training import helpers


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    rows = helpers.write_rows(folder, 40, speaker=lambda number: None if number % 5 == 0 else f"s{number % 3}")
    return helpers.prepare_dataset(helpers.build_settings(folder), rows, size=7)


LIMITS = st.builds(
    BatchSettings,
    positions=st.integers(200, 900),
    longest=st.integers(100, 200),
    pack=st.booleans(),
)
DATA = st.builds(
    DataSettings, manifest=st.just("x"), reference=st.sampled_from([0.0, 0.5, 1.0]), turns=st.integers(1, 4)
)


@settings(max_examples=40)
@given(limits=LIMITS, data=DATA, seed=st.integers(0, 99))
def test_epoch_has_every_sample_once_within_limits(samples, limits, data, seed):
    epoch = BatchSampler(samples, data, limits, seed).epoch(3)
    sequences = [sequence for batch in epoch for row in batch for sequence in row]
    assert sorted(row for sequence in sequences for row in sequence.rows) == list(range(len(samples)))
    for sequence in sequences:
        speakers = {samples[row].speaker for row in sequence.rows}
        assert len(speakers) == 1
        assert len(sequence.rows) <= data.turns
        if sequence.reference >= 0:
            assert speakers == {samples[sequence.reference].speaker} != {None}
            assert sequence.reference not in sequence.rows
            assert data.reference > 0
        elif data.reference == 1.0:
            assert speakers == {None}
        assert sequence.num_positions <= limits.longest
    for batch in epoch:
        lengths = [sum(sequence.num_positions for sequence in row) for row in batch]
        assert max(lengths) <= limits.longest
        assert len(batch) * (-(-max(lengths) // 8) * 8) <= limits.positions
        assert limits.pack or all(len(row) == 1 for row in batch)


@settings(max_examples=15)
@given(limits=LIMITS, data=DATA)
def test_sequence_lengths_match_collated_batches(samples, limits, data):
    collate = Collator(CONFIG)
    for batch in BatchSampler(samples, data, limits, 1).epoch(0):
        collated = collate([[samples.example(sequence) for sequence in row] for row in batch])
        assert collated.indices.num_valid == sum(sequence.num_positions for row in batch for sequence in row)
        assert collated.indices.num_positions <= limits.positions
        assert collated.num_labels == sum(2 * len(sequence.rows) for row in batch for sequence in row)


@settings(max_examples=15)
@given(limits=LIMITS, data=DATA, done=st.integers(0, 60))
def test_iteration_resumes_from_any_batch(samples, limits, data, done):
    def take(start, count):
        return list(itertools.islice(BatchSampler(samples, data, limits, 7).iterate_from(start), count))

    assert take(0, done + 5)[done:] == take(done, 5)


def test_packing_fills_rows(samples):
    data, limits = DataSettings(manifest="x"), BatchSettings(positions=800, longest=400, pack=True)
    packed = BatchSampler(samples, data, limits, 0).epoch(0)
    rows = [sum(sequence.num_positions for sequence in row) for batch in packed for row in batch]
    assert np.mean(sorted(rows)[1:]) > 0.9 * 400


def test_epochs_and_seeds_change_the_order(samples):
    def order(seed, epoch):
        return BatchSampler(samples, DataSettings(manifest="x"), BatchSettings(), seed).epoch(epoch)

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_overlong_sample_is_a_row_error_and_not_truncated(tmp_path):
    settings = helpers.build_settings(tmp_path, batch={"positions": 160, "longest": 160})
    rows = helpers.write_rows(tmp_path, 3)
    rows[1]["text"] = "a long text " * 9
    samples = helpers.prepare_dataset(settings, rows)
    assert len(samples) == 2
    assert len(samples.row_errors) == 1
    assert re.fullmatch(r"r1: 1\d\d positions exceed batch.longest=160", samples.row_errors[0])


def test_empty_dataset_is_rejected(tmp_path):
    settings = helpers.build_settings(tmp_path)
    with pytest.raises(BadInput, match="has no usable training sample"):
        BatchSampler(helpers.prepare_dataset(settings, []), settings.data, settings.batch, 0)


CONFIG = None


@pytest.fixture(autouse=True, scope="module")
def _config(tmp_path_factory):
    global CONFIG  # noqa: PLW0603  (hypothesis rejects function-scoped fixtures)
    CONFIG = ModelSource.from_settings(helpers.build_settings(tmp_path_factory.mktemp("config")).init).config
