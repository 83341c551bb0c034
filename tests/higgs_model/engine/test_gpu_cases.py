"""The networks, settings, requests and pools of the GPU tests can be built on the CPU."""

import dataclasses

import pytest
import torch

from higgs_model.engine import Engine, FinishReason
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.kernels import GatherKernels
from tests.higgs_model.engine import gpu_cases as cases
from tests.higgs_model.engine import helpers


def test_network_is_valid_and_requests_fit():
    """Greedy requests reach their limit; sampled ones may end before it."""
    requests = [helpers.make_request(n, clip=5 + n, max_frames=6) for n in range(6)]
    _, reasons = helpers.run(Engine(cases.make_network(), dataclasses.replace(cases.SETTINGS, max_slots=4)), requests)
    assert set(reasons.values()) <= {FinishReason.LENGTH, FinishReason.STOP}
    assert reasons["0"] == FinishReason.LENGTH


def test_blocks_of_all_slots_are_in_the_pool():
    blocks = [block for slot, length in enumerate(cases.LENGTHS) for block in cases.slot_blocks(slot, length)]
    assert len(cases.LENGTHS) == cases.SETTINGS.max_slots
    assert max(cases.LENGTHS) <= cases.SETTINGS.max_positions
    assert len(set(blocks)) == len(blocks)
    assert min(blocks) > 0
    last = cases.slot_blocks(cases.SETTINGS.max_slots - 1, max(cases.LENGTHS))[-1]
    assert max(*blocks, last) < cases.SETTINGS.num_blocks


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_pool_is_read_correctly(fp8_cache):
    pytest.importorskip("triton", reason="Triton is available on Linux only")
    from higgs_model.engine.kernels_triton import TritonKernels

    text, settings = cases.TEXT, cases.SETTINGS
    attention = PagedAttention(
        num_layers=1,
        num_blocks=settings.num_blocks,
        block_size=settings.block_size,
        num_kv_heads=text["num_key_value_heads"],
        num_query_heads=text["num_attention_heads"],
        head_dim=text["head_dim"],
        max_slots=settings.max_slots,
        max_blocks_per_slot=settings.max_positions // settings.block_size,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=torch.float32,
        fp8_cache=fp8_cache,
    )
    device = attention._table.device
    lengths, queries = cases.fill_pool(attention, device, torch.float32)
    pool, table = attention._layers[0], attention._table
    expected = GatherKernels().decode(queries, pool, table, lengths)
    actual = TritonKernels(32).decode(queries, pool, table, lengths)
    has_positions = lengths > 0
    assert actual.isfinite().all()
    actual, expected = actual[has_positions], expected[has_positions]
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
