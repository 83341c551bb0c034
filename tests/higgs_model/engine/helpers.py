"""Requests for the small network of `builders`, and the codes that `HiggsAudioModel.generate` returns for them."""

import numpy as np
import torch

from higgs_model.delay import from_stream, to_stream
from higgs_model.engine import Request
from higgs_model.sampling import SamplingParams
from tests import builders
from tests.builders import BOS, EOS, IN, OUT, OUT_BOS, SIZE, K

SAMPLING = (
    SamplingParams(),
    SamplingParams(do_sample=True, ras_win_len=7),
    SamplingParams(do_sample=True, temperature=0.7, top_k=5, top_p=0.8, ras_win_len=3, ras_win_max_num_repeat=1),
    SamplingParams(do_sample=True, top_k=0),
)


def make_network(seed=3, *, endless=False, **overrides):
    """Return a network whose clips end soon; with `endless`, greedy ones end only at the limit."""
    network = builders.model(seed=seed, **overrides)
    if endless:
        builders.suppress_stream_tokens(network.audio_decoder_proj.audio_lm_head.weight, K, SIZE + 2)
    return network


def make_request(number, *, tokens=20, clip=30, end=OUT_BOS, voice=None, **options):
    """Return a request whose prompt has a generated clip, text, and a recording.

    Args:
        number: determines the prompt, the seed and the kind of sampling.
        tokens: number of text tokens.
        clip: frames of the generated clip.
        end: last token of the prompt.
        voice: requests with the same voice have the first half of the text and the generated clip in common.
        options: of `Request`.
    """
    random = np.random.default_rng(number)
    prefix_random = np.random.default_rng(number if voice is None else 1000 + voice)
    ids = [*prefix_random.integers(0, 140, tokens // 2).tolist(), OUT]
    generated = prefix_random.integers(0, SIZE, (K, clip))
    ids += [*random.integers(0, 140, tokens - tokens // 2).tolist(), IN, 5, end]
    options = {"sampling": SAMPLING[number % len(SAMPLING)], "seed": 7 * number + 1, "max_frames": 40} | options
    return Request(str(number), tuple(ids), (generated, random.integers(0, SIZE, (K, 7))), **options)


def mixed_requests(count, **options):
    """Return requests with prompts of different lengths."""
    return [make_request(n, tokens=10 + 3 * n % 40, clip=5 + 11 * n % 70, **options) for n in range(count)]


def generate(network, request, steps=None):
    """Return the first clip (K, T) from `HiggsAudioModel.generate` in double precision, where rounding is harmless."""
    generated, recording = (to_stream(torch.from_numpy(codes), BOS, EOS) for codes in request.clips)
    sampling = request.sampling
    network.double()
    output = network.generate(
        torch.tensor([request.input_ids]),
        torch.ones(1, len(request.input_ids), dtype=torch.int64),
        audio_in_ids=recording,
        audio_in_ids_start=torch.tensor([0]),
        audio_out_ids=generated,
        audio_out_ids_start=torch.tensor([0]),
        max_new_tokens=steps or request.max_frames + K,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        ras_win_len=sampling.ras_win_len,
        ras_win_max_num_repeat=sampling.ras_win_max_num_repeat,
        seed=request.seed,
    )
    network.float()
    return from_stream(output.audio_sequences[0], SIZE).numpy() if output.audio_sequences else np.empty((K, 0))


def run(engine, requests, *, after_step=None):
    """Run requests to the end; return {id: codes (K, T)} and {id: finish reason}."""
    parts, reasons = {}, {}
    for request in requests:
        engine.add(request)
    for step in range(100_000):
        if not engine.has_work:
            break
        for update in engine.step():
            parts.setdefault(update.request_id, []).append(update.frames)
            if update.finish_reason:
                assert update.request_id not in reasons
                reasons[update.request_id] = update.finish_reason
        if after_step:
            after_step(engine, step)
    assert not engine.has_work, "it never ends"
    return {name: np.concatenate(part, axis=1) for name, part in parts.items()}, reasons
