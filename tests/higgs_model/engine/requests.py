"""Requests for the small network of `builders`, and their codes by `HiggsAudioModel.generate`."""

import numpy as np
import torch

from higgs_model.delay import from_stream, to_stream
from higgs_model.engine import Request
from higgs_model.sampling import SamplingParams
from tests import builders
from tests.builders import BOS, EOS, IN, OUT, OUT_BOS, SIZE, K

PARAMS = (
    SamplingParams(),
    SamplingParams(do_sample=True, ras_win_len=7),
    SamplingParams(do_sample=True, temperature=0.7, top_k=5, top_p=0.8, ras_win_len=3, ras_win_max_num_repeat=1),
    SamplingParams(do_sample=True, top_k=0),
)


def model(seed=3, *, endless=False, **overrides):
    """Return a network whose clips end soon; with `endless`, greedy ones end only at the limit."""
    network = builders.model(seed=seed, **overrides)
    if endless:
        builders.silence_stream_tokens(network.audio_decoder_proj.audio_lm_head.weight, K, SIZE + 2)
    return network


def request(number, *, tokens=20, clip=30, end=OUT_BOS, voice=None, **options):
    """Return a request with a generated clip (the same for all with one `voice`), text, and a recording."""
    random = np.random.default_rng(number)
    same = np.random.default_rng(number if voice is None else 1000 + voice)
    ids = [*same.integers(0, 140, tokens // 2).tolist(), OUT]
    spoken = same.integers(0, SIZE, (K, clip))
    ids += [*random.integers(0, 140, tokens - tokens // 2).tolist(), IN, 5, end]
    options = {"sampling": PARAMS[number % len(PARAMS)], "seed": 7 * number + 1, "max_frames": 40} | options
    return Request(str(number), tuple(ids), (spoken, random.integers(0, SIZE, (K, 7))), **options)


def uneven(count, **options):
    return [request(n, tokens=10 + 3 * n % 40, clip=5 + 11 * n % 70, **options) for n in range(count)]


def plainly(network, asked, steps=None):
    """Return the first clip (K, T) by `generate` in double precision, where rounding cannot change a code."""
    spoken, heard = (to_stream(torch.from_numpy(codes), BOS, EOS) for codes in asked.clips)
    sampling = asked.sampling
    network.double()
    answer = network.generate(
        torch.tensor([asked.input_ids]),
        torch.ones(1, len(asked.input_ids), dtype=torch.int64),
        audio_in_ids=heard,
        audio_in_ids_start=torch.tensor([0]),
        audio_out_ids=spoken,
        audio_out_ids_start=torch.tensor([0]),
        max_new_tokens=steps or asked.max_frames + K,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        ras_win_len=sampling.ras_win_len,
        ras_win_max_num_repeat=sampling.ras_win_max_num_repeat,
        seed=asked.seed,
    )
    network.float()
    return from_stream(answer.audio_sequences[0], SIZE).numpy() if answer.audio_sequences else np.empty((K, 0))


def run(engine, requests, *, between=None):
    """Run requests to the end; return {id: codes (K, T)} and {id: finish reason}."""
    parts, reasons = {}, {}
    for one in requests:
        engine.add(one)
    for turn in range(100_000):
        if not engine.has_work:
            break
        for update in engine.step():
            parts.setdefault(update.request_id, []).append(update.frames)
            if update.finish_reason:
                assert update.request_id not in reasons
                reasons[update.request_id] = update.finish_reason
        if between:
            between(engine, turn)
    assert not engine.has_work, "it never ends"
    return {name: np.concatenate(part, axis=1) for name, part in parts.items()}, reasons
