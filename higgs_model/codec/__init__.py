"""Audio tokenizer: waveform ↔ codes, for single clips, batches and streams."""

from __future__ import annotations

from higgs_model.codec.codec import HiggsAudioCodec as HiggsAudioCodec
from higgs_model.codec.config import HiggsAudioCodecConfig as HiggsAudioCodecConfig
from higgs_model.codec.streaming import StreamingDecoder as StreamingDecoder
