"""The text head and the audio head: hidden states to logits."""

from __future__ import annotations

from torch import Tensor, nn

from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput
from higgs_model.model.freezing import PartiallyFrozenLinear


class HiggsAudioDecoderProjector(nn.Module):
    """The audio head and the text head. An audio-only checkpoint has no text head."""

    def __init__(self, config: HiggsAudioConfig) -> None:
        super().__init__()
        text = config.text_config
        self.config = config
        self.text_lm_head: nn.Linear | PartiallyFrozenLinear | None = (
            nn.Linear(text.hidden_size, text.vocab_size, bias=False) if config.use_text_head else None
        )
        self.audio_lm_head = nn.Linear(
            text.hidden_size, config.audio_num_codebooks * config.num_codebook_rows, bias=False
        )

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V).

        Raises:
            BadInput: there is no text head.
        """
        if self.text_lm_head is None:
            raise BadInput(
                "this checkpoint has no text head and generates audio only: "
                f"end every prompt with {self.config.audio_out_bos_token}"
            )
        logits: Tensor = self.text_lm_head(hidden)
        return logits

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, K, codebook_size + 2) float32."""
        logits: Tensor = self.audio_lm_head(hidden)
        return logits.unflatten(-1, (self.config.audio_num_codebooks, self.config.num_codebook_rows)).float()
