"""What holds for the transposes and the quantisation."""

import os

import pytest
import torch

import triton_kernels as tk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
runs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA or TRITON_INTERPRET=1")

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
U8, F16, BF16, F32, F64 = torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 1e-2, E4: 1 / 16, E5: 1 / 8}  # FP8: half of the largest step
if INTERPRETED:
    TOLERANCE[E4] = TOLERANCE[E5] = 0.5  # its rounding to FP8 loses the carry: 1.96 becomes 1.0, not 2.0


def assert_close(out, expected, tolerance):
    assert out.shape == expected.shape and out.isfinite().all()
    error = (out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def poison(*shapes, dtype=F32):
    """Leaves NaN in the memory that the next torch.empty of these sizes is likely to be given."""
    blocks = [torch.full(shape, float("nan"), device=DEVICE).to(dtype) for shape in shapes for _ in range(3)]
    del blocks


########################################################################################################################
#                                                      Transposes                                                      #
########################################################################################################################

SHAPES = [(1, 1), (1, 9), (64, 1), (8, 12), (33, 70), (132, 260), (64, 128)]


def draw(*shape, dtype=F32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 8
    return x.to(DEVICE, dtype)


@runs_kernel
def test_kernel_operators_are_registered_properly():
    x = draw(16, 32)
    torch.library.opcheck(tk.transpose_copy.kernel, (x,))
    torch.library.opcheck(tk.transpose_add_.kernel, (x.t().contiguous(), x))
    torch.library.opcheck(tk.quantize_transpose.kernel, (x, x.new_tensor(0.1), E4))


@runs_kernel
@pytest.mark.parametrize("dtype", [U8, torch.int8, E4, E5, BF16, F32, torch.int32])
def test_kernel_transpose_copy_is_exact(dtype):
    for shape in SHAPES:
        src = draw(*shape).to(dtype)
        poison(shape, dtype=BF16 if dtype in (U8, torch.int8, torch.int32) else dtype)
        out = tk.transpose_copy.kernel(src)
        raw = {1: U8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert out.dtype == dtype and out.is_contiguous()
        assert torch.equal(out.view(raw), src.view(raw).t())


@runs_kernel
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)])
def test_kernel_transpose_add_matches_reference(dtypes):
    for shape in SHAPES:
        dst, src = draw(*shape[::-1], dtype=dtypes[0], seed=1), draw(*shape, dtype=dtypes[1])
        expected = dst.double()
        tk.transpose_add_reference_(expected, src.double())
        tk.transpose_add_.kernel(dst, src)
        assert_close(dst, expected, TOLERANCE[dtypes[0]])


def assert_quantized(x, scale, dtype):
    poison(x.shape, dtype=dtype)
    outputs, expected = (f(x, scale, dtype) for f in (tk.quantize_transpose.kernel, tk.quantize_transpose_reference))
    exact = (x.double() / scale.double()).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    for out, same, double in zip(outputs, expected, (exact, exact.t()), strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        assert_close(out.float(), double, TOLERANCE[dtype])
        assert INTERPRETED or torch.equal(out.view(U8), same.view(U8))  # whose rounding to FP8 is wrong


@runs_kernel
@pytest.mark.parametrize("dtype", [E4, E5])
@pytest.mark.parametrize("source", [F32, BF16])
def test_kernel_quantize_transpose_matches_reference(source, dtype):
    for shape in [(16, 16), (16, 144), (144, 16), (272, 80)]:
        assert_quantized(draw(*shape, dtype=source), draw().abs() / 100, dtype)


@runs_kernel
@pytest.mark.parametrize("dtype", [E4, E5])
def test_kernel_quantize_transpose_is_exact_where_nothing_is_rounded(dtype):
    """Every finite value of the dtype, times a power of two; in the interpreter too."""
    values = torch.arange(256, device=DEVICE).to(U8).view(dtype).float().nan_to_num(0, 0, 0).view(16, 16)
    q, q_t = tk.quantize_transpose.kernel(values / 8, values.new_tensor(1 / 8), dtype)
    assert torch.equal(q.float(), values) and torch.equal(q_t.float(), values.t())


@runs_kernel
@pytest.mark.parametrize("dtype", [E4, E5])
def test_kernel_quantize_transpose_saturates_and_shows_a_nan(dtype):
    x, limit = draw(16, 32), torch.finfo(dtype).max
    x[1, 2], x[3, 4], x[5, 6] = 1e30, float("-inf"), float("nan")
    for function in (tk.quantize_transpose.kernel, tk.quantize_transpose_reference):
        q, q_t = function(x, torch.ones((), device=DEVICE), dtype)
        for out in (q.float(), q_t.float().t()):
            assert out[1, 2] == limit and out[3, 4] == -limit
            if dtype == E5 or not INTERPRETED:  # it has no NaN in e4m3
                assert out.isnan().nonzero().tolist() == [[5, 6]]


@runs_kernel
def test_kernel_transposes_under_torch_compile():
    def function(x, scale):
        q, q_t = tk.quantize_transpose.kernel(x * 2, scale, E4)
        total = torch.zeros_like(x.t(), memory_format=torch.contiguous_format)
        tk.transpose_add_.kernel(total, x)
        return tk.transpose_copy.kernel(q), q_t, total + 1

    x, scale = draw(32, 48), draw().abs() / 10
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for a, b in zip(compiled(x, scale), function(x, scale), strict=True):
        assert torch.equal(a.float(), b.float())


@needs_cuda
def test_kernel_transposes_beyond_int32_elements():
    src = torch.randint(0, 255, (43_008, 50_304), dtype=U8, device=DEVICE)
    assert torch.equal(tk.transpose_copy(src), src.t())
    assert torch.equal(tk.transpose_copy(src[1:]), src[1:].t())  # an odd number of rows: no words
    q, q_t = tk.quantize_transpose(src.to(BF16), src.new_tensor(1.0, dtype=F32), E5)
    assert torch.equal(q_t.view(U8), q.view(U8).t()) and q.float().max() == 256  # 254 to e5m2's next


@needs_cuda
@pytest.mark.parametrize(("shape", "dtype"), [((50_304, 768), E4), ((16_384, 768), E4), ((16_384, 3072), E5)])
def test_kernel_quantize_transpose_at_real_size(shape, dtype):
    assert_quantized(draw(*shape, dtype=BF16), draw().abs() / 100 + 0.01, dtype)


########################################################################################################################
#                                            Dispatch, errors, no Triton                                               #
########################################################################################################################


@pytest.mark.usefixtures("on_a_cpu")
def test_cpu_takes_the_reference():
    streams = [torch.randn(3, 8) for _ in range(2)]
    assert torch.equal(tk.transpose_copy(streams[0]), streams[0].t())
    tk.transpose_add_(total := torch.ones(8, 3), streams[0])
    assert torch.equal(total, streams[0].t() + 1)
    q, q_t = tk.quantize_transpose(x := torch.randn(16, 32), torch.tensor(0.5), E4)
    assert torch.equal(q.float(), (x * 2).to(E4).float())
    assert torch.equal(q_t.float(), q.float().t())


S, W, C = torch.ones(4, 6), torch.ones(16, 32), torch.ones(())


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tk.transpose_copy(S[0]), r"src must be \(M, N\).*not torch.float32 of shape \(6,\)"),
        (lambda: tk.transpose_copy(S.t()), r"src must be .*contiguous.*shape \(6, 4\) with strides \(1, 6\)"),
        (lambda: tk.transpose_copy(S[:0]), r"src must be .*neither of them 0.*shape \(0, 6\)"),
        (lambda: tk.transpose_add_(S.clone(), S), r"dst must be \(6, 4\).*of shape \(4, 6\)"),
        (lambda: tk.quantize_transpose(S, C, E4), r"x must be .*multiples of 16.*of shape \(4, 6\)"),
        (lambda: tk.quantize_transpose(W, torch.ones(4), E4), r"scale must be \(\).*of shape \(4,\)"),
        (lambda: tk.quantize_transpose(W, C.double(), E4), "scale must be .*torch.float32, not torch.float64"),
        (lambda: tk.quantize_transpose(W, C, F16), "dtype is torch.float16: pass"),
        (lambda: tk.quantize_transpose(S.t(), C, E4), r"x must be .*of shape \(6, 4\) with strides \(1, 6\)"),
    ],
)
def test_wrong_transposes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@runs_kernel
def test_arguments_may_be_named_in_any_order():
    x, scale = draw(16, 32), torch.full((), 0.5, device=DEVICE)
    for mine, theirs in zip(tk.quantize_transpose(dtype=E4, scale=scale, x=x), tk.quantize_transpose(x, scale, E4),
                            strict=True):
        assert torch.equal(mine.float(), theirs.float())
    square = x[:, :16].contiguous()
    assert torch.equal(tk.gram(b=0.5, c=2.0, x=square[None]), tk.gram(square[None], 0.5, 2.0))


@runs_kernel
def test_kernel_names_wrong_dtypes():
    x = draw(4, 6, dtype=F64)
    with pytest.raises(ValueError, match="src is torch.float64: its elements"):
        tk.transpose_copy.kernel(x)
    with pytest.raises(ValueError, match="src must be .*torch.bfloat16 or torch.float32, not torch.float64"):
        tk.transpose_add_.kernel(x.t().contiguous(), x)
    with pytest.raises(ValueError, match="x must be .*torch.bfloat16 or .*, not torch.float64"):
        tk.quantize_transpose.kernel(draw(16, 16, dtype=F64), C.to(DEVICE), E4)
