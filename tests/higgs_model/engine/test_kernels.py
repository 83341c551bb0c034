"""Every attention kernel against torch's attention to each row's contiguous keys."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.engine import fp8
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.kernels import GatherKernels, LayerPool, PrefillMetadata, VarlenKernels, select_fastest
from higgs_model.engine.prefill_span import PrefillSpan

triton = pytest.importorskip("triton", reason="Triton is available on Linux only")
has_gpu = torch.cuda.is_available()
DEVICE = torch.device("cuda" if has_gpu else "cpu")
KERNELS = ["gather", "triton"]


def kernels(name, tile=32):
    if name == "gather":
        return GatherKernels()
    from higgs_model.engine.kernels_triton import TritonKernels

    return TritonKernels(tile)


class Case:
    """A pool in which everything but the positions of its rows is NaN."""

    def __init__(self, lengths, *, size, kv_heads, group, width, dtype, seed, fp8_cache=False):
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-length // size) for length in lengths]
        order = (torch.randperm(sum(blocks), generator=generator) + 1).tolist()
        pool = torch.full((2, sum(blocks) + 1, size, kv_heads, width), float("nan"))
        self.table = torch.zeros(len(lengths), max(*blocks, 1), dtype=torch.int32)
        self.rows, self.lengths = [], torch.tensor(lengths)
        for row, length in enumerate(lengths):
            own = torch.tensor([order.pop() for _ in range(blocks[row])], dtype=torch.int64)
            self.table[row, : len(own)] = own
            # Scores of some rows are far larger than others': sums must not overflow.
            keys_values = torch.randn(2, length, kv_heads, width, generator=generator) * (1 + 20 * (row % 2))
            positions = torch.arange(length)
            pool[:, own[positions // size], positions % size] = keys_values
            self.rows.append(keys_values)
        self.queries = torch.randn(len(lengths), kv_heads * group, width, generator=generator)
        self.generator, self.dtype, self.group = generator, dtype, group
        if fp8_cache:
            codes, scales = fp8.quantize(pool)
            self.rows = [(lambda c, s: c.float() * s)(*fp8.quantize(keys_values)) for keys_values in self.rows]
            self.pool = LayerPool(*codes.to(DEVICE), *scales.squeeze(-1).contiguous().to(DEVICE))
        else:
            self.pool = LayerPool(*pool.to(DEVICE, dtype))
            self.rows = [keys_values.to(dtype).float() for keys_values in self.rows]

    def reference(self, queries_QHD, row, upto):
        """Return attention in double precision; query q sees the first `upto[q]` positions."""
        keys, values = self.rows[row].double().transpose(1, 2)
        mask = torch.arange(keys.shape[1]) < upto.unsqueeze(1)
        queries = queries_QHD.to(self.dtype).double().transpose(0, 1).unsqueeze(0)
        output = F.scaled_dot_product_attention(queries, keys[None], values[None], attn_mask=mask, enable_gqa=True)
        return output[0].transpose(0, 1)

    def assert_close(self, actual, expected):
        # Weights are rounded to the pool's dtype, which matters more than the sums when scores are large.
        scale = max(float(expected.abs().max()), 1.0)
        atol = scale * {torch.float32: 2e-5, torch.float16: 1.5e-2, torch.bfloat16: 6e-2}[self.dtype]
        torch.testing.assert_close(actual.cpu().double(), expected, atol=atol, rtol=0)


shapes = {
    "size": st.sampled_from([16, 64]),
    "kv_heads": st.integers(1, 2),
    "group": st.sampled_from([1, 2, 3]),
    "width": st.sampled_from([8, 40]),
    "seed": st.integers(0, 99),
    "fp8_cache": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16 if has_gpu else torch.float16]),
}


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3), splits=st.sampled_from([1, 2, 4]), **shapes)
def test_decode_attends_to_each_rows_positions(name, lengths, splits, **shape):
    case = Case(lengths, **shape)
    with pytest.MonkeyPatch.context() as patched:
        if name == "triton":
            patched.setattr("higgs_model.engine.kernels_triton._num_splits", lambda *_: splits)
        queries = case.queries.to(DEVICE, case.dtype)
        actual = kernels(name).decode(queries, case.pool, case.table.to(DEVICE), case.lengths.to(DEVICE))
    assert actual.isfinite().all()
    for row, length in enumerate(lengths):
        if length:
            case.assert_close(
                actual[row : row + 1], case.reference(case.queries[row : row + 1], row, torch.tensor([length]))
            )


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3), cut=st.floats(0, 0.99), stop=st.booleans(), **shapes
)
def test_prefill_spans_attend_causally(name, lengths, cut, stop, **shape):
    case = Case(lengths, **shape)
    spans = [PrefillSpan(row, int(cut * length), length) for row, length in enumerate(lengths)][::-1]
    if stop:
        # In the middle of the slot's positions: later ones must not be attended to.
        spans = [PrefillSpan(span.slot, span.start, max(span.start + 1, span.stop - 3)) for span in spans]
    queries = torch.randn(sum(span.length for span in spans), *case.queries.shape[1:], generator=case.generator)
    metadata = PrefillMetadata.from_spans(spans, DEVICE)
    actual = kernels(name).prefill(queries.to(DEVICE, case.dtype), case.pool, case.table.to(DEVICE), metadata)
    first = 0
    for span in spans:
        rows = slice(first, first + span.length)
        expected = case.reference(queries[rows], span.slot, torch.arange(span.start, span.stop) + 1)
        case.assert_close(actual[rows], expected)
        first += span.length


def test_number_of_splits_fills_the_device_and_bounds_their_length(monkeypatch):
    from higgs_model.engine import kernels_triton

    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    cuda = torch.device("cuda")
    assert kernels_triton._num_splits(8, 8192, cuda) == 64
    assert kernels_triton._num_splits(16 * 8, 8192, cuda) == 8
    assert kernels_triton._num_splits(256 * 8, 8192, cuda) == 4
    assert kernels_triton._num_splits(256 * 8, 1024, cuda) == 1


class FakeKernel:
    """A kernel with a given result and duration."""

    def __init__(self, name, result, seconds):
        self.name, self.result, self.seconds = name, result, seconds

    def decode(self, *_):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_fastest_correct_kernel_is_selected(monkeypatch):
    correct, called = torch.ones(3), []
    monkeypatch.setattr(GatherKernels, "decode", lambda *_: correct)

    def work(kernel):
        called.append(kernel)
        return kernel.decode()

    def seconds(call):
        call()
        return called[-1].seconds

    slow, fast = FakeKernel("slow", correct + 0.01, 3.0), FakeKernel("fast", correct - 0.01, 2.0)
    wrong = [
        FakeKernel("wrong", correct + 0.5, 1.0),
        FakeKernel("nan", correct * float("nan"), 0.5),
        FakeKernel("broken", RuntimeError("page size must be a multiple of 256"), 0.1),
    ]
    assert select_fastest([slow, *wrong, fast], work, seconds, 0.03) is fast
    assert isinstance(select_fastest(wrong, work, seconds, 0.03), GatherKernels)
    assert isinstance(select_fastest([], work, seconds, 0.03), GatherKernels)


class LeakyKernels(GatherKernels):
    """Reads one position of unwritten memory."""

    name = "leaky"

    def decode(self, queries_SHD, pool, table_SB, lengths_S):
        return super().decode(queries_SHD, pool, table_SB, lengths_S + 1)


class NamedKernels(GatherKernels):
    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_kernels_are_selected_with_the_actual_pool(monkeypatch, fp8_cache):
    monkeypatch.setattr("higgs_model.engine.attention_paged._TYPICAL_POSITIONS", 40)
    shape = {"num_layers": 2, "num_blocks": 20, "block_size": 16, "num_kv_heads": 2, "head_dim": 8}
    shape |= {"num_query_heads": 6, "max_slots": 4, "max_blocks_per_slot": 5, "device": DEVICE}
    attention = PagedAttention(**shape, dtype=torch.float32, fp8_cache=fp8_cache)
    assert attention.decode_kernels.name == attention.prefill_kernels.name == "gather"
    leaky, slow, fast = LeakyKernels(), NamedKernels("slow"), kernels("triton")
    times = iter([0.1, 3.0, 2.0, 2.0, 3.0, 4.0])

    def seconds(call):
        assert call().isfinite().all() or call.args[0] is leaky
        return next(times)

    chosen = attention.select_kernels(6, torch.float32, [leaky, slow, fast], seconds)
    # The leaky one would be fastest for decoding; its prefill is correct.
    assert chosen == (fast, leaky)
    assert not attention._table.any()


def test_varlen_attention_gets_valid_arguments():
    """With a fake of the same signature; the GPU tests check the results of the real one."""
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        calls.append((cu_seq_q.tolist(), max_q, max_k, options))
        return query

    case = Case([37, 0, 70], size=16, kv_heads=2, group=3, width=8, dtype=torch.float32, seed=0)
    varlen = VarlenKernels(varlen_attn)
    varlen.decode(case.queries, LayerPool(case.pool.keys, case.pool.values), case.table, case.lengths)
    starts, longest, max_positions, options = calls.pop()
    assert (starts, longest, max_positions) == ([0, 1, 2, 3], 1, 80)
    # A softmax over nothing is NaN, so an empty row attends to one position of the null block.
    assert options["seqused_k"].tolist() == [37, 1, 70]
    assert options["seqused_k"].dtype == options["block_table"].dtype == torch.int32
    assert options["window_size"] == (-1, -1)
    metadata = PrefillMetadata.from_spans([PrefillSpan(2, 10, 70), PrefillSpan(0, 0, 37)], torch.device("cpu"))
    varlen.prefill(torch.zeros(97, 6, 8), LayerPool(case.pool.keys, case.pool.values), case.table, metadata)
    starts, longest, max_positions, options = calls.pop()
    assert (starts, longest, max_positions) == ([0, 60, 97], 60, 80)
    assert options["seqused_k"].tolist() == [70, 37]
    assert torch.equal(options["block_table"], case.table[[2, 0]])
    assert options["window_size"] == (-1, 0)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from higgs_model.engine import kernels_triton as kernels

tensors = {"queries": "bf16", "out": "bf16", "table": "i32", "lengths": "i64", "tiles": "i32",
           "partial": "fp32", "stats": "fp32"}
own = {"ROWS": 16, "SINGLE_SPLIT": False, "QUERIES": 64, "SPLITS": 8}
for capability, stored, kernel in (
    (90, "fp8e4nv", kernels._decode_split), (80, "bf16", kernels._prefill_tile), (80, "bf16", kernels._combine_splits),
):
    pool = {name: stored for name in ("keys", "values")}
    pool |= {f"{name}_scales": "fp32" if stored != "bf16" else stored for name in ("key", "value")}
    constants = {"BLOCK_SIZE": 64, "GROUP": 3, "WIDTH": 128, "TILE": 64, "SCALED": stored != "bf16", "IEEE": False}
    constants = {name: value for name, value in (constants | own).items() if name in kernel.arg_names}
    kinds = {name: f"*{kind}" for name, kind in (tensors | pool).items()} | {"scale": "fp32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    compiled = compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32),
                   options={"num_warps": 4, "num_stages": 2})
    # Shared memory per block of the smallest of these GPUs.
    assert compiled.metadata.shared <= 99 * 1024, (capability, kernel)
    print(capability, kernel.__name__, len(compiled.asm["cubin"]))
"""


def test_kernels_compile_for_ampere_and_hopper(tmp_path, monkeypatch):
    """Types, shapes and shared memory are valid for Ampere in 16 bits, and for Hopper with an fp8 cache."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert len(completed.stdout.splitlines()) == 3
