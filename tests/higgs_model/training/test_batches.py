"""What is learnt when: every sample once an epoch, within its bounds, and the same again from any number on."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.errors import BadInput
from higgs_model.training.batches import Batches
from higgs_model.training.collator import Collator
from higgs_model.training.loading import Trainee
from higgs_model.training.settings import Batch, Data
from tests.higgs_model.training import making


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    rows = making.rows(folder, 40, speaker=lambda number: None if number % 5 == 0 else f"s{number % 3}")
    return making.prepared(making.settings(folder), rows, size=7)


BOUNDS = st.builds(
    Batch,
    positions=st.integers(200, 900),
    longest=st.integers(100, 200),
    pack=st.booleans(),
)
DATA = st.builds(Data, manifest=st.just("x"), reference=st.sampled_from([0.0, 0.5, 1.0]), turns=st.integers(1, 4))


@settings(max_examples=40)
@given(bounds=BOUNDS, data=DATA, seed=st.integers(0, 99))
def test_an_epoch_has_every_sample_once_within_bounds(samples, bounds, data, seed):
    epoch = Batches(samples, data, bounds, seed).epoch(3)
    drawn = [one for batch in epoch for row in batch for one in row]
    assert sorted(row for one in drawn for row in one.rows) == list(range(len(samples)))
    for one in drawn:
        speakers = {samples[row].speaker for row in one.rows}
        assert len(speakers) == 1
        assert len(one.rows) <= data.turns
        if one.reference >= 0:
            assert speakers == {samples[one.reference].speaker} != {None}
            assert one.reference not in one.rows
            assert data.reference > 0
        elif data.reference == 1.0:
            assert speakers == {None}
        assert one.num_positions <= bounds.longest
    for batch in epoch:
        lengths = [sum(one.num_positions for one in row) for row in batch]
        assert max(lengths) <= bounds.longest
        assert len(batch) * (-(-max(lengths) // 8) * 8) <= bounds.positions
        assert bounds.pack or all(len(row) == 1 for row in batch)


@settings(max_examples=15)
@given(bounds=BOUNDS, data=DATA)
def test_lengths_are_those_of_the_batches(samples, bounds, data):
    collate = Collator(CONFIG)
    for batch in Batches(samples, data, bounds, 1).epoch(0):
        made = collate([[samples.example(one) for one in row] for row in batch])
        assert made.places.num_real == sum(one.num_positions for row in batch for one in row)
        assert made.places.num_positions <= bounds.positions
        assert made.num_labels == sum(2 * len(one.rows) for row in batch for one in row)


@settings(max_examples=15)
@given(bounds=BOUNDS, data=DATA, done=st.integers(0, 60))
def test_it_goes_on_from_any_number(samples, bounds, data, done):
    def some(start, count):
        return list(itertools.islice(Batches(samples, data, bounds, 7).after(start), count))

    assert some(0, done + 5)[done:] == some(done, 5)


def test_packing_wastes_little(samples):
    data, bounds = Data(manifest="x"), Batch(positions=800, longest=400, pack=True)
    packed = Batches(samples, data, bounds, 0).epoch(0)
    rows = [sum(one.num_positions for one in row) for batch in packed for row in batch]
    assert np.mean(sorted(rows)[1:]) > 0.9 * 400


def test_epochs_and_seeds_differ(samples):
    def order(seed, epoch):
        return Batches(samples, Data(manifest="x"), Batch(), seed).epoch(epoch)

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_what_is_too_long_is_a_fault_not_cut(tmp_path):
    settings = making.settings(tmp_path, batch={"positions": 160, "longest": 160})
    rows = making.rows(tmp_path, 3)
    rows[1]["text"] = "a long text " * 9
    samples = making.prepared(settings, rows)
    assert len(samples) == 2
    assert len(samples.faults) == 1
    assert re.fullmatch(r"r1: it takes 1\d\d positions, and batch.longest is 160", samples.faults[0])


def test_nothing_to_learn_from_is_said(tmp_path):
    settings = making.settings(tmp_path)
    with pytest.raises(BadInput, match="has no sample that can be learnt from"):
        Batches(making.prepared(settings, []), settings.data, settings.batch, 0)


CONFIG = None


@pytest.fixture(autouse=True, scope="module")
def _config(tmp_path_factory):
    global CONFIG  # noqa: PLW0603  (hypothesis takes no fixture of a function)
    CONFIG = Trainee.of(making.settings(tmp_path_factory.mktemp("config")).init).config
