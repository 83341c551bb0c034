"""Loops and silence are detected; a single different code prevents it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.engine.early_stopping import EarlyStoppingLimits, early_stop_reason
from higgs_model.engine.request import FinishReason

LIMITS = EarlyStoppingLimits(loop_frames=60, loop_period=20, silence_frames=30, silent_codes=frozenset({7, 9}))


@given(st.integers(1, 20), st.integers(0, 50), st.integers(0, 99))
def test_loop_of_any_period_is_detected(period, prefix, seed):
    random = np.random.default_rng(seed)
    run = random.integers(10, 1000, (period, 8))
    frames = np.concatenate([random.integers(10, 1000, (prefix, 8)), np.tile(run, (80 // period + 1, 1))])
    assert early_stop_reason(LIMITS, frames) is FinishReason.LOOP
    frames[-25, 3] += 1
    assert early_stop_reason(LIMITS, frames) is None


@pytest.mark.parametrize("length", [29, 30, 200])
def test_silence_is_detected_by_the_first_codebook(length):
    random = np.random.default_rng(0)
    frames = random.integers(0, 1000, (length, 8))
    frames[:, 0] = random.choice([7, 9], length)
    assert early_stop_reason(LIMITS, frames) is (FinishReason.SILENCE if length >= 30 else None)
    frames[-5, 0] = 8
    assert early_stop_reason(LIMITS, frames) is None
