"""Networks, settings and pools of the GPU tests. `test_gpu_cases.py` builds them on the CPU as well, so that an invalid
shape fails without a GPU.
"""

import torch

from higgs_model.engine import EngineSettings
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from tests.higgs_model.engine import helpers

SETTINGS = EngineSettings(
    max_slots=16,
    max_positions=512,
    block_size=16,
    num_blocks=1 + 16 * 25,
    early_stopping=EarlyStoppingLimits(loop_frames=None),
)
TEXT = {
    # Heads are wide enough for every kernel; transformers requires hidden_size to be a multiple of the number of heads.
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": 155,
}
LENGTHS = (0, 1, 15, 16, 17, 200, 390, 400) * 2
"""Positions of each slot: none, around a block boundary, and as many as a pool of `SETTINGS` allows for 16 slots."""
SLOT_BLOCKS = -(-max(LENGTHS) // SETTINGS.block_size)


def make_network(device="cpu", dtype=torch.float32):
    return helpers.make_network(endless=True, text_config=TEXT).to(device, dtype)


def slot_blocks(slot, length):
    """Return the blocks of a slot with `length` positions; no two slots share one, and none is block 0."""
    first = 1 + SLOT_BLOCKS * slot
    return list(range(first, first + -(-length // SETTINGS.block_size)))


def fill_pool(attention, device, dtype):
    """Write `LENGTHS` positions of random keys and values into layer 0, and NaN everywhere else.

    Returns:
        The lengths (slots,) and queries (slots, heads, head_dim).
    """
    pool = attention._layers[0]
    for stored, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        (stored if scales is None else scales).fill_(float("nan"))
    heads, width = TEXT["num_attention_heads"], TEXT["head_dim"]
    generator = torch.Generator().manual_seed(0)
    for slot, length in enumerate(LENGTHS):
        attention.set_blocks(slot, slot_blocks(slot, length))
        if length:
            positions = torch.arange(length, device=device)
            keys_values = torch.randn(2, length, TEXT["num_key_value_heads"], width, generator=generator)
            indices = attention.write_indices(torch.full_like(positions, slot), positions)
            attention.write(0, *keys_values.to(device, dtype), indices)
    queries = torch.randn(len(LENGTHS), heads, width, generator=generator)
    return torch.tensor(LENGTHS, device=device), queries.to(device, dtype)
