"""The audio tokenizer: waveform ↔ codes, whole, in batches, and as a stream."""

from __future__ import annotations

from higgs_model.codec.codec import HiggsAudioCodec as HiggsAudioCodec
from higgs_model.codec.config import HiggsAudioCodecConfig as HiggsAudioCodecConfig
from higgs_model.codec.streaming import StreamingDecoder as StreamingDecoder
