"""A byte-level BPE tokenizer with the special tokens of Higgs Audio's prompts, under their published names.

In: texts to learn merges from, or none. Out: a tokenizer that can encode any text; its ids start with the 256 bytes and
end with the special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from higgs_model import tokens
from higgs_model.script.prompt import BEGIN, END_OF_MESSAGE, END_OF_TURN, SCENE_END, SCENE_START

PAD = "<|end_of_text|>"
SPECIAL = (
    BEGIN,
    "<|start_header_id|>",
    "<|end_header_id|>",
    END_OF_TURN,
    END_OF_MESSAGE,
    PAD,
    tokens.AUDIO_BOS,
    tokens.AUDIO_EOS,
    tokens.AUDIO_OUT_BOS,
    tokens.AUDIO_IN,
    tokens.AUDIO_OUT,
    SCENE_START,
    SCENE_END,
    "<|speaker_id_start|>",
    "<|speaker_id_end|>",
)
NUM_BYTES = 256


def build_tokenizer(texts: Iterable[str] = (), merges: int = 0) -> PreTrainedTokenizerFast:
    """Build a tokenizer of the bytes, the `merges` most frequent pairs of the texts, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if merges:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=NUM_BYTES + merges, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    else:
        tokenizer = Tokenizer(
            models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
