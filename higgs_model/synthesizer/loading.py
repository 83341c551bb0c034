"""Everything that a synthesizer is made of, from a name: network, codec, tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model import demo
from higgs_model.checkpoint import load_tokenizer, locate
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.engine.settings import EngineSettings
from higgs_model.engine.watch import WatchLimits
from higgs_model.errors import BadCheckpoint
from higgs_model.model.model import HiggsAudioModel
from higgs_model.script.prompt import Tokenizer

PUBLISHED_CODEC = "bosonai/higgs-audio-v2-tokenizer"
_SILENCE_S = 2.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """What speaks, loaded.

    Attributes:
        codec_id: changes when the codec's weights do.
    """

    model: HiggsAudioModel
    codec: HiggsAudioCodec
    tokenizer: Tokenizer
    codec_id: str

    def encode(self, waveform: NDArray[np.float32], sample_rate: int) -> NDArray[np.int64]:
        """Codes (K, T) of a recording (N,), on the host."""
        return self.codec.encode(waveform, sample_rate).cpu().numpy()

    @property
    def sample_rate(self) -> int:
        """Hz, of the codec."""
        return self.codec.sample_rate

    def engine_settings(self, chosen: EngineSettings | None) -> EngineSettings:
        """The settings, with this codec's codes of silence to watch for where none are named."""
        settings = chosen or EngineSettings()
        if settings.watch.silent_codes:
            return settings
        silence = torch.zeros(round(_SILENCE_S * self.codec.sample_rate))
        codes = frozenset(self.codec.encode(silence, self.codec.sample_rate)[0].tolist())
        watch: WatchLimits = dataclasses.replace(settings.watch, silent_codes=codes)
        return dataclasses.replace(settings, watch=watch)


def load(model: str | Path, codec: str | Path | None, device: torch.device, dtype: torch.dtype | None = None) -> Parts:
    """Load the parts.

    Args:
        codec: by default the folder `codec` inside the model's, if there is one, else the published one.
        dtype: by default bfloat16 on a GPU, else float32.

    Raises:
        BadCheckpoint: one of them is not there or cannot be read.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = demo.located(model)
    network = HiggsAudioModel.from_pretrained(model, dtype=dtype, device=device)
    folder = locate(model).directory
    source = codec_of(folder, codec)
    coder = HiggsAudioCodec.from_pretrained(source, device=device, dtype=dtype)
    if coder.num_codebooks != network.config.audio_num_codebooks:
        raise BadCheckpoint(
            f"the codec {str(source)!r} has {coder.num_codebooks} codebooks, the model {str(model)!r} speaks "
            f"{network.config.audio_num_codebooks}: they do not belong together"
        )
    return Parts(
        network, coder, cast(Tokenizer, load_tokenizer(folder)), f"{coder.revision or content_id(Path(source))}/{dtype}"
    )


def load_codec(
    model: str | Path, codec: str | Path | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> HiggsAudioCodec:
    """The codec that `load` would load, without the model.

    Of a model on the hub nothing is fetched: its codec is the published one, if no other is named.

    Raises:
        BadCheckpoint: it is not there or cannot be read.
    """
    folder = Path(demo.located(model)).expanduser()
    if codec is None and not folder.is_dir() and str(model).startswith(("/", ".", "~")):
        raise BadCheckpoint(f"{model} is not a folder: a checkpoint is a folder with config.json and its weights")
    return HiggsAudioCodec.from_pretrained(codec_of(folder, codec), device=device, dtype=dtype)


def codec_of(model: str | Path, codec: str | Path | None) -> str | Path:
    """Where the codec of a model is: the one that is named; else the folder `codec` in the model's; else the published.

    Args:
        model: a name of the hub, of which nothing is fetched, has no folder.
        codec: `demo` is that of the model of this name.
    """
    if codec:
        return demo.FOLDER / "codec" if str(codec) == demo.NAME else codec
    inside = Path(demo.located(model)).expanduser() / "codec"
    return inside if inside.is_dir() else PUBLISHED_CODEC


def content_id(folder: Path) -> str:
    """Identity of a folder of the user's, by the content of its weights."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".pth")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
