"""The codec on a CUDA device compared with the CPU. Skipped without a device."""

import asyncio

import numpy as np
import pytest
import torch

from higgs_model import HiggsAudioCodec
from higgs_model.engine.codec_worker import CodecWorker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random_codes(codec, num_frames):
    return np.random.RandomState(num_frames).randint(0, codec.codebook_size, (codec.num_codebooks, num_frames))


def test_compiled_decoder_matches_cpu(load, tmp_path):
    codec = load("rvq_24khz")
    codec.save_pretrained(tmp_path)
    cuda_codec = HiggsAudioCodec.from_pretrained(tmp_path, device="cuda")
    clips = [torch.from_numpy(random_codes(codec, num_frames)) for num_frames in (3, 40, 333)]
    eager = cuda_codec.decode_batch(clips)
    cuda_codec.compile_decoder()
    for codes, eager_wave, compiled_wave in zip(clips, eager, cuda_codec.decode_batch(clips), strict=True):
        torch.testing.assert_close(eager_wave.cpu(), codec.decode(codes), atol=1e-3, rtol=0)
        torch.testing.assert_close(compiled_wave.cpu(), codec.decode(codes), atol=1e-3, rtol=0)


def test_batched_windows_equal_single_clips(load, tmp_path):
    codec = load("rvq_24khz")
    codec.save_pretrained(tmp_path)
    clips = [random_codes(codec, num_frames) for num_frames in (1, 40, 300, 511)]
    expected = [codec.decode(clip).numpy() for clip in clips]
    worker = CodecWorker(HiggsAudioCodec.from_pretrained(tmp_path, device="cuda"))

    async def decode(codes_KT):
        clip = worker.open_clip()
        parts = [await clip.push(codes_KT[:, start : start + 25]) for start in range(0, codes_KT.shape[1], 25)]
        return np.concatenate([*parts, await clip.finish()])

    async def decode_all():
        return await asyncio.gather(*(decode(clip) for clip in clips))

    try:
        for samples, expected_samples in zip(asyncio.run(decode_all()), expected, strict=True):
            np.testing.assert_allclose(samples, expected_samples, atol=1e-3)
    finally:
        worker.close()
