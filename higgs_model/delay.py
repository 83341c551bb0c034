"""The delay pattern: codebook k of a clip is shifted right by k frames, so that each codebook is predicted after those
before it.

Source: "Simple and Controllable Music Generation", https://arxiv.org/abs/2306.05284, and the behaviour of Higgs
Audio's reference implementation. The model reads and generates only the delayed form, which its configuration calls a
stream.

    codes (K=3, T=2)      framed with BOS, EOS      delayed, (K, T + 2 + K − 1)
      a b                   B a b E                   B a b E E E
      c d                   B c d E                   B B c d E E
      e f                   B e f E                   B B B e f E

`apply_delay_pattern` and `undo_delay_pattern` are inverse to each other, for whole clips; the engine undoes the pattern
frame by frame in `engine.sequence`. `DelayState` applies the same pattern one
frame at a time, to a batch of clips during generation. Nothing here depends on the network or on how codes are sampled.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NOT_ENDING = -1
"""Value of `DelayState.num_remaining` until a codebook has produced EOS."""


def apply_delay_pattern(codes_KT: Tensor, bos_id: int, eos_id: int) -> Tensor:
    """Shift codebook k right by k.

    Args:
        codes_KT: (K, T) integers, any values.
        bos_id, eos_id: fill the K (K − 1) / 2 positions that open on the left and on the right.

    Returns:
        (K, T + K − 1), same dtype and device.
    """
    num_codebooks, num_frames = codes_KT.shape
    length = num_frames + num_codebooks - 1
    source = torch.arange(length, device=codes_KT.device) - _codebook_indices(codes_KT)
    if num_frames == 0:
        return torch.where(source < 0, bos_id, eos_id).to(codes_KT.dtype)
    delayed = codes_KT.gather(1, source.clamp(0, num_frames - 1))
    delayed = delayed.masked_fill(source < 0, bos_id)
    return delayed.masked_fill(source >= num_frames, eos_id)


def undo_delay_pattern(delayed_KL: Tensor) -> Tensor:
    """Shift codebook k back left by k and keep the frames for which every codebook is present.

    Args:
        delayed_KL: (K, L) integers.

    Returns:
        (K, max(L − K + 1, 0)).
    """
    num_codebooks, length = delayed_KL.shape
    num_frames = max(length - num_codebooks + 1, 0)
    source = torch.arange(num_frames, device=delayed_KL.device) + _codebook_indices(delayed_KL)
    return delayed_KL.gather(1, source)


def to_stream(codes_KT: Tensor, bos_id: int, eos_id: int, delay: bool = True) -> Tensor:
    """Return a clip's codes in the form that the model reads: a BOS frame, the codes, an EOS frame, delayed.

    Returns:
        (K, T + 2 + K − 1), or (K, T + 2) without delay.
    """
    column = codes_KT.new_ones(codes_KT.shape[0], 1)
    framed = torch.cat([column * bos_id, codes_KT, column * eos_id], dim=1)
    return apply_delay_pattern(framed, bos_id, eos_id) if delay else framed


def from_stream(stream_KL: Tensor, codebook_size: int, delay: bool = True) -> Tensor:
    """Return the codes of a generated clip, whether it ended by itself or was truncated.

    A frame is kept if all its codebooks are present and none of them holds a stream token. A truncated clip therefore
    keeps its last complete frame, and no stream token ever reaches the codec.

    Args:
        stream_KL: (K, L) generated frames in delayed form, including the BOS frame.
        codebook_size: number of codes of a codebook; larger ids are stream tokens.

    Returns:
        (K, T) with 0 ≤ code < codebook_size.
    """
    frames = undo_delay_pattern(stream_KL) if delay else stream_KL
    return frames[:, (frames < codebook_size).all(dim=0)]


def _codebook_indices(codes: Tensor) -> Tensor:
    return torch.arange(codes.shape[0], device=codes.device).unsqueeze(1)


@dataclasses.dataclass
class DelayState:
    """Progress of B clips through the delay pattern, kept on the device without host synchronisation.

    Attributes:
        num_started: (B,) int64, codebooks that are past their BOS fill; 0 … K − 1 before the next frame.
        num_remaining: (B,) int64, frames still to come after a codebook produced EOS, or `NOT_ENDING`.
    """

    num_started: Tensor
    num_remaining: Tensor

    @classmethod
    def initial(cls, batch_size: int, device: torch.device | str | None = None) -> DelayState:
        """Return the state in which every clip is about to receive its first frame after the BOS frame."""
        started = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(num_started=started, num_remaining=torch.full_like(started, NOT_ENDING))

    @classmethod
    def resume(cls, last_frame_BK: Tensor, bos_id: int, eos_id: int) -> DelayState:
        """Return the state after `last_frame_BK` (B, K), the last frame of an unfinished clip in a prompt.

        As in the reference, a clip that is already ending is assumed to have had its first EOS in that very frame. At
        worst it gets a few more frames of stream tokens, which are dropped.
        """
        num_codebooks = last_frame_BK.shape[1]
        started = num_codebooks - (last_frame_BK == bos_id).sum(dim=1)
        is_eos = last_frame_BK == eos_id
        frames_after = num_codebooks - 1 - is_eos.int().argmax(dim=1)
        remaining = torch.where(is_eos.any(dim=1), frames_after, NOT_ENDING)
        return cls(num_started=started.clamp(max=num_codebooks - 1), num_remaining=remaining)

    def step(self, sampled_BK: Tensor, active_B: Tensor, bos_id: int, eos_id: int) -> tuple[Tensor, Tensor]:
        """Turn freely sampled codes into the next frame, and advance the clips that are `active_B` (B,) bool.

        Frame j = 1, 2, … has BOS in the codebooks ≥ j. When codebook i is the first to produce EOS, the codebooks
        before it become EOS in that frame, and one more codebook follows in each later frame. The clip ends with the
        frame in which codebook K − 2 is forced, K − i − 1 frames later.

        Returns:
            frame (B, K), and ended (B,) bool: this frame is the last of its clip. The state of an ended clip is reset.
            For a clip that is not active, the frame is meaningless and `ended` is False.
        """
        num_codebooks = sampled_BK.shape[1]
        codebook = torch.arange(num_codebooks, device=sampled_BK.device)
        last = num_codebooks - 1

        frame = torch.where(codebook > self.num_started.unsqueeze(1), bos_id, sampled_BK)
        was_ending = self.num_remaining != NOT_ENDING
        is_eos = frame == eos_id
        first_eos = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), num_codebooks)
        num_forced = torch.where(was_ending, num_codebooks - self.num_remaining, first_eos)
        ending = was_ending | (first_eos < num_codebooks)
        frame = torch.where(ending.unsqueeze(1) & (codebook < num_forced.unsqueeze(1)), eos_id, frame)

        remaining = torch.where(was_ending, self.num_remaining - 1, last - first_eos)
        remaining = torch.where(ending, remaining, NOT_ENDING)
        ended = active_B & ending & (remaining <= 0)
        started = torch.where(ended, 0, (self.num_started + 1).clamp(max=last))
        remaining = torch.where(ended, NOT_ENDING, remaining)
        self.num_started = torch.where(active_B, started, self.num_started)
        self.num_remaining = torch.where(active_B, remaining, self.num_remaining)
        return frame, ended
