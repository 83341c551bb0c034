"""Loads the model of a synthesizer: network, codec and tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model import demo
from higgs_model.checkpoint import load_tokenizer, resolve_checkpoint
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.engine.settings import EngineSettings
from higgs_model.errors import BadCheckpoint
from higgs_model.model.model import HiggsAudioModel
from higgs_model.script.prompt import Tokenizer

PUBLISHED_CODEC = "bosonai/higgs-audio-v2-tokenizer"
_SILENCE_S = 2.0


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A loaded network with its codec and tokenizer.

    Attributes:
        codec_id: identifies the codec's weights.
    """

    model: HiggsAudioModel
    codec: HiggsAudioCodec
    tokenizer: Tokenizer
    codec_id: str

    def encode(self, waveform: NDArray[np.float32], sample_rate: int) -> NDArray[np.int64]:
        """Encode a recording (N,) to codes (K, T) in host memory."""
        return self.codec.encode(waveform, sample_rate).cpu().numpy()

    @property
    def sample_rate(self) -> int:
        """The codec's sample rate in Hz."""
        return self.codec.sample_rate

    def engine_settings(self, settings: EngineSettings | None) -> EngineSettings:
        """Return engine settings; unless given, the codes that detect silence are this codec's codes of silence."""
        settings = settings or EngineSettings()
        if settings.early_stopping.silent_codes:
            return settings
        silence = torch.zeros(round(_SILENCE_S * self.codec.sample_rate))
        codes = frozenset(self.codec.encode(silence, self.codec.sample_rate)[0].tolist())
        early_stopping: EarlyStoppingLimits = dataclasses.replace(settings.early_stopping, silent_codes=codes)
        return dataclasses.replace(settings, early_stopping=early_stopping)


def load_model(
    model: str | Path, codec: str | Path | None, device: torch.device, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load network, codec and tokenizer.

    Args:
        model: `demo`, a folder, or a Hugging Face Hub repository.
        codec: default: the subfolder `codec` of the model, if it exists, else the published codec.
        dtype: default: bfloat16 on a GPU, else float32.

    Raises:
        BadCheckpoint: one of them does not exist or cannot be read, or codec and network do not match.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = demo.resolve_model(model)
    network = HiggsAudioModel.from_pretrained(model, dtype=dtype, device=device)
    folder = resolve_checkpoint(model).directory
    source = resolve_codec(folder, codec)
    loaded_codec = HiggsAudioCodec.from_pretrained(source, device=device, dtype=dtype)
    if loaded_codec.num_codebooks != network.config.audio_num_codebooks:
        raise BadCheckpoint(
            f"the codec {str(source)!r} has {loaded_codec.num_codebooks} codebooks, but the model {str(model)!r} has "
            f"{network.config.audio_num_codebooks}; use the codec that the model was trained with"
        )
    return LoadedModel(
        network,
        loaded_codec,
        cast(Tokenizer, load_tokenizer(folder)),
        f"{loaded_codec.revision or hash_weights(Path(source))}/{dtype}",
    )


def load_codec(
    model: str | Path, codec: str | Path | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> HiggsAudioCodec:
    """Load the codec that `load_model` would load, without the network.

    A model on the Hub is not downloaded: unless a codec is given, the published one is loaded.

    Raises:
        BadCheckpoint: it does not exist or cannot be read.
    """
    folder = Path(demo.resolve_model(model)).expanduser()
    if codec is None and not folder.is_dir() and str(model).startswith(("/", ".", "~")):
        raise BadCheckpoint(f"{model} is not a folder: expected a folder with config.json and weights")
    return HiggsAudioCodec.from_pretrained(resolve_codec(folder, codec), device=device, dtype=dtype)


def resolve_codec(model: str | Path, codec: str | Path | None) -> str | Path:
    """Return a model's codec: the given one, else the subfolder `codec` of the model, else the published one.

    Args:
        model: a folder or a Hub repository; a repository is not downloaded.
        codec: a folder or a Hub repository; `demo` is the codec of the demo model.
    """
    if codec:
        return demo.CHECKPOINT_DIR / "codec" if str(codec) == demo.NAME else codec
    subfolder = Path(demo.resolve_model(model)).expanduser() / "codec"
    return subfolder if subfolder.is_dir() else PUBLISHED_CODEC


def hash_weights(folder: Path) -> str:
    """Return a hash of the weights in a local folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".pth")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
