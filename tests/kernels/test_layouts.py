"""What holds for the transposes and the quantisation."""

import os

import pytest
import torch
from conftest import moved

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
    for add in (False, True):
        torch.library.opcheck(tk.transpose_.kernel, (x.t().contiguous(), x, add))
    torch.library.opcheck(tk.quantize_transpose.kernel, (x, x.new_tensor(0.1)))


@runs_kernel
@pytest.mark.parametrize("dtype", [U8, torch.int8, E4, E5, BF16, F32, torch.int32])
def test_kernel_transpose_copy_is_exact(dtype):
    for shape in SHAPES:
        src = draw(*shape).to(dtype)
        out = draw(*shape[::-1], seed=1).to(dtype)
        tk.transpose_.kernel(out, src)
        raw = {1: U8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert torch.equal(out.view(raw), src.view(raw).t())
        elsewhere = moved(draw(*shape[::-1], seed=2).to(dtype))  # not where words of 4 bytes begin
        tk.transpose_.kernel(elsewhere, src)
        assert torch.equal(elsewhere.view(raw), out.view(raw))


@runs_kernel
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F32)])
def test_kernel_transpose_add_matches_reference(dtypes):
    for shape in SHAPES:
        dst, src = draw(*shape[::-1], dtype=dtypes[0], seed=1), draw(*shape, dtype=dtypes[1])
        expected = dst.double()
        tk.transpose_reference_(expected, src.double(), add=True)
        tk.transpose_.kernel(dst, src, add=True)
        assert_close(dst, expected, TOLERANCE[dtypes[0]])


def assert_quantized(x, scale):
    poison(x.shape, dtype=E4)
    outputs, expected = (f(x, scale) for f in (tk.quantize_transpose.kernel, tk.quantize_transpose_reference))
    exact = (x.double() / scale.double()).clamp(-448, 448)
    for out, same, double in zip(outputs, expected, (exact, exact.t()), strict=True):
        assert out.dtype == E4 and out.is_contiguous()
        assert_close(out.float(), double, TOLERANCE[E4])
        assert INTERPRETED or torch.equal(out.view(U8), same.view(U8))  # whose rounding to FP8 is wrong


@runs_kernel
@pytest.mark.parametrize("source", [F32, BF16])
def test_kernel_quantize_transpose_matches_reference(source):
    for shape in [(16, 16), (16, 144), (144, 16), (272, 80)]:
        assert_quantized(draw(*shape, dtype=source), draw().abs() / 100)


@runs_kernel
def test_kernel_quantize_transpose_is_exact_where_nothing_is_rounded():
    """Every finite value of the dtype, times a power of two; in the interpreter too."""
    values = torch.arange(256, device=DEVICE).to(U8).view(E4).float().nan_to_num(0).view(16, 16)
    q, q_t = tk.quantize_transpose.kernel(values / 8, values.new_tensor(1 / 8))
    assert torch.equal(q.float(), values) and torch.equal(q_t.float(), values.t())


@runs_kernel
def test_kernel_quantize_transpose_saturates_and_shows_a_nan():
    x = draw(16, 32)
    x[1, 2], x[3, 4], x[5, 6] = 1e30, float("-inf"), float("nan")
    for function in (tk.quantize_transpose.kernel, tk.quantize_transpose_reference):
        q, q_t = function(x, torch.ones((), device=DEVICE))
        for out in (q.float(), q_t.float().t()):
            assert out[1, 2] == 448 and out[3, 4] == -448
            if not INTERPRETED:  # it has no NaN in e4m3
                assert out.isnan().nonzero().tolist() == [[5, 6]]


@runs_kernel
def test_kernel_transposes_under_torch_compile():
    def function(x, scale):
        q, q_t = tk.quantize_transpose.kernel(x * 2, scale)
        total = torch.zeros_like(x.t(), memory_format=torch.contiguous_format)
        tk.transpose_.kernel(total, x, add=True)
        tk.transpose_.kernel(turned := torch.empty_like(q_t), q)
        return turned, q_t, total + 1

    x, scale = draw(32, 48), draw().abs() / 10
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for a, b in zip(compiled(x, scale), function(x, scale), strict=True):
        assert torch.equal(a.float(), b.float())


@needs_cuda
def test_kernel_transposes_beyond_int32_elements():
    src = torch.randint(0, 255, (43_008, 50_304), dtype=U8, device=DEVICE)
    for part in (src, src[1:]):  # the latter an odd number of rows: no words
        tk.transpose_(out := part.new_empty(part.shape[::-1]), part)
        assert torch.equal(out, part.t())
        del out
    q, q_t = tk.quantize_transpose(src.to(BF16), src.new_tensor(1.0, dtype=F32))
    assert torch.equal(q_t.view(U8), q.view(U8).t()) and q.float().max() == 256  # 254 to e4m3's next


@needs_cuda
@pytest.mark.parametrize("shape", [(50_304, 768), (16_384, 768), (16_384, 3072)])
def test_kernel_quantize_transpose_at_real_size(shape):
    assert_quantized(draw(*shape, dtype=BF16), draw().abs() / 100 + 0.01)


########################################################################################################################
#                                            Dispatch, errors, no Triton                                               #
########################################################################################################################


@pytest.mark.usefixtures("on_a_cpu")
def test_cpu_takes_the_reference():
    src, dst = torch.randn(3, 8), torch.ones(8, 3)
    tk.transpose_(dst, src, add=True)
    assert torch.equal(dst, src.t() + 1)
    tk.transpose_(dst, src)
    assert torch.equal(dst, src.t())
    q, q_t = tk.quantize_transpose(x := torch.randn(16, 32), torch.tensor(0.5))
    assert torch.equal(q.float(), (x * 2).to(E4).float())
    assert torch.equal(q_t.float(), q.float().t())


S, W, C = torch.ones(4, 6), torch.ones(16, 32), torch.ones(())


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tk.transpose_(S, S[0]), r"src must be \(M, N\).*not torch.float32 of shape \(6,\)"),
        (lambda: tk.transpose_(S, S.t()), r"src must be .*contiguous.*shape \(6, 4\) with strides \(1, 6\)"),
        (lambda: tk.transpose_(S, S[:0]), r"src must be .*not 0.*shape \(0, 6\)"),
        (lambda: tk.transpose_(S.clone(), S), r"dst must be \(6, 4\).*of shape \(4, 6\)"),
        (lambda: tk.transpose_(S.view(6, 4).to("meta"), S), r"dst must be .*on cpu.* on meta"),
        (lambda: tk.transpose_(S.view(6, 4).half(), S), r"dst must be .*torch.float32, not torch.float16"),
        (lambda: tk.transpose_(S.view(6, 4), S.int(), add=True), r"src must be .*bfloat16 or .*, not torch.int32"),
        (lambda: tk.quantize_transpose(S, C), r"x must be .*multiples of 16.*of shape \(4, 6\)"),
        (lambda: tk.quantize_transpose(torch.ones(16, 24), C), r"x must be .*multiples of 16.*of shape \(16, 24\)"),
        (lambda: tk.quantize_transpose(W, 0.5), r"scale must be \(\), contiguous, on cpu, torch.float32, not 0.5\."),
        (lambda: tk.quantize_transpose(W, None), r"scale must be \(\).*, not None"),
        (lambda: tk.quantize_transpose(W, torch.ones(4)), r"scale must be \(\).*of shape \(4,\)"),
        (lambda: tk.quantize_transpose(W, C.double()), "scale must be .*torch.float32, not torch.float64"),
        (lambda: tk.quantize_transpose(S.t(), C), r"x must be .*of shape \(6, 4\) with strides \(1, 6\)"),
    ],
)
def test_wrong_transposes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@runs_kernel
def test_a_matrix_is_not_transposed_into_itself():
    x = draw(8, 8)
    for function in (tk.transpose_.kernel, tk.transpose_reference_):
        for add in (False, True):
            with pytest.raises(ValueError, match=r"dst must be \(8, 8\), not src itself"):
                function(x, x, add)


def test_an_operation_is_not_differentiated():
    x = draw(16, 32).requires_grad_()
    assert not any(q.requires_grad for q in tk.quantize_transpose(x, torch.ones((), device=DEVICE)))


@runs_kernel
def test_arguments_may_be_named_in_any_order():
    x, scale = draw(16, 32), torch.full((), 0.5, device=DEVICE)
    for mine, theirs in zip(tk.quantize_transpose(scale=scale, x=x), tk.quantize_transpose(x, scale), strict=True):
        assert torch.equal(mine.float(), theirs.float())
    square = x[:, :16].contiguous()
    assert torch.equal(tk.gram(b=0.5, c=2.0, x=square[None]), tk.gram(square[None], 0.5, 2.0))


@runs_kernel
def test_kernel_names_wrong_dtypes():
    x = draw(4, 6, dtype=F64)
    for add, wanted in (False, r", of \(1, 2, 4\) bytes"), (True, "torch.bfloat16 or torch.float16 or torch.float32"):
        with pytest.raises(ValueError, match=f"src must be .*{wanted}.*not torch.float64"):
            tk.transpose_.kernel(x.t().contiguous(), x, add)
    with pytest.raises(ValueError, match="x must be .*torch.bfloat16 or .*, not torch.float64"):
        tk.quantize_transpose.kernel(draw(16, 16, dtype=F64), C.to(DEVICE))
