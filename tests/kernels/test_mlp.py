"""What holds for the MLP's kernels."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import moved

import triton_kernels as tk

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")
E4, E5, F16, BF16, F32, F64 = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 1e-2, E4: 0.04}  # FP8: of an RMS, half a step / sqrt(3)
if not CUDA:
    TOLERANCE |= {E4: 0.12}  # the interpreter loses the carry when it rounds to FP8: 1.96 becomes 1.0
WORKING = [F16, F32] + [BF16] * CUDA  # the interpreter's bfloat16 products are garbage
HALF = BF16 if CUDA else F16
BIG = [(16384, 3072, 768), (1000, 3072, 768)] * CUDA


def random(*shape, dtype=F32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * spread).to(dtype).to(DEVICE)


def number(value):
    return torch.tensor(value, dtype=F32, device=DEVICE)


def double(*tensors):
    return (t.double() for t in tensors)


def poison(*shapes_and_dtypes):
    """Leaves NaNs (0x7f bytes in FP8) in the allocator's free blocks, which torch.empty hands out next."""
    blocks = [torch.empty(s, dtype=d, device=DEVICE) for s, d in shapes_and_dtypes]
    for block in blocks:
        block.view(torch.uint8).fill_(0x7F if block.itemsize == 1 else 0xFF)


def assert_close(out, expected, tolerance=None):
    assert out.shape == expected.shape and out.is_contiguous()
    assert out.float().isfinite().all()
    error = (out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= (tolerance or TOLERANCE[out.dtype]), f"relative error {error:.2e}"


def assert_is_largest(amax, post):
    if CUDA or post.dtype != BF16:
        assert amax.max().to(post.dtype) == post.max()
    else:  # the interpreter cuts to bf16
        assert_close(amax.max(), post.max(), 1e-2)


def check_linear(t, f, d, dtype, seed=0):
    x, w = random(t, d, dtype=dtype, seed=seed), random(f, d, dtype=dtype, seed=seed + 1, spread=d**-0.5)
    poison(((t, f), dtype))
    (post,) = tk.relu_square.kernel(x, w)
    assert post.dtype == dtype
    assert_close(post, tk.relu_square_reference(*double(x, w))[0])


def check_linear_fp8(t, f, d, transposed, seed=0):
    x, w = random(t, d, dtype=E4, seed=seed), random(f, d, dtype=E4, seed=seed + 1)
    scale, post_scale = number(0.7 * d**-0.5), number(0.013)
    poison(((t, f), BF16), ((t, f), E4), ((f, t), E4))
    exact, _, exact_amax = tk.relu_square_reference(*double(x, w), None, scale, post_scale)
    if transposed:
        post8, post8_t = tk.relu_square.kernel(x, w, None, scale, post_scale, True)
        assert torch.equal(post8_t.float(), post8.t().float()) and post8_t.is_contiguous()
    else:
        post, post8, amax = tk.relu_square.kernel(x, w, None, scale, post_scale)
        assert post.dtype == BF16
        assert_close(post, exact)
        assert_close(amax.max(), exact_amax.max(), 1e-2)  # FP8 products are summed to 14 bits
        assert_is_largest(amax, post)
    assert post8.dtype == E4
    assert_close(post8, exact.clamp(max=448 * 0.013) / 0.013)
    if CUDA:  # but 1% of all, at the borders between codes; out_scale wrong by 3% moves 17% (34_codes.py)
        assert (post8.float() == (exact / 0.013).clamp(max=448).float().to(E4).float()).double().mean() > 0.95


def check_backward(t, f, d, dtype, seed=0):
    g, w = random(t, d, dtype=dtype, seed=seed), random(f, d, dtype=dtype, seed=seed + 1, spread=d**-0.5)
    post = random(t, f, dtype=dtype, seed=seed + 2).relu().square()
    poison(((t, f), dtype))
    (dpre,) = tk.relu_square.kernel(g, w, post)
    assert dpre.dtype == dtype
    assert_close(dpre, tk.relu_square_reference(*double(g, w, post))[0])


def check_backward_fp8_outputs(t, f, d, dtype, post_dtype, scale, seed=0):
    g, w = random(t, d, dtype=dtype, seed=seed), random(f, d, dtype=dtype, seed=seed + 1)
    post = random(t, f, seed=seed + 2).relu().square().to(post_dtype)
    scale, out_scale = number(scale) if scale else None, number(0.37)
    poison(((t, f), E4), ((f, t), E4))
    dpre8, dpre8_t = tk.relu_square.kernel(g, w, post, scale, out_scale, True)
    (expected,) = tk.relu_square_reference(*double(g, w, post), scale)
    expected = (expected / 0.37).clamp(-448, 448)
    assert dpre8.dtype == dpre8_t.dtype == E4
    assert_close(dpre8, expected)
    if CUDA:  # as forward
        assert (dpre8.float() == expected.float().to(E4).float()).double().mean() > 0.95
    assert torch.equal(dpre8_t.float(), dpre8.t().float()) and dpre8_t.is_contiguous()
    (alone,) = tk.relu_square.kernel(g, w, post, scale, out_scale)
    assert torch.equal(alone.float(), dpre8.float())


def random_shapes(count):
    generator = torch.Generator().manual_seed(0)
    return [[int(torch.randint(1, top, (), generator=generator)) * 16 for top in (30, 40, 12)] for _ in range(count)]


########################################################################################################################
#                                                     The references                                                   #
########################################################################################################################


def test_references_are_the_definition_and_its_derivative():
    x, w, g = random(24, 16, dtype=F64), random(40, 16, dtype=F64), random(24, 16, dtype=F64, seed=5)
    down = random(40, 16, dtype=F64, seed=6)
    pre = (x @ w.t()).requires_grad_()
    post = pre.relu().square()
    assert_close(tk.relu_square_reference(x, w)[0], post.detach())
    (expected,) = torch.autograd.grad((post @ down * g).sum(), pre)
    assert_close(tk.relu_square_reference(g, down, post.detach())[0], expected)
    (_, post8, _), (dpre8,) = (tk.relu_square_reference(*args, None, number(1e-20)) for args in (
        (x, down, None), (g, down, post.detach())))
    assert set(post8.float().unique().tolist()) == {0, 448}  # saturated, not NaN
    assert set(dpre8.float().unique().tolist()) == {-448, 0, 448}
    half = random(24, 16, dtype=BF16), random(40, 16, dtype=BF16)
    _, _, amax = tk.relu_square_reference(*half, None, None, number(1.0))  # not rounded, as post is
    assert_close(amax, tk.relu_square_reference(*double(*half))[0].max()[None], 1e-5)


########################################################################################################################
#                                                      The kernels                                                     #
########################################################################################################################


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize(("t", "f", "d"), [(1, 16, 16), (129, 264, 72), (300, 520, 136), *BIG])
def test_kernel_linear(t, f, d, dtype):
    check_linear(t, f, d, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("t", "f", "d"), [(16, 16, 16), (144, 272, 80), (304, 528, 144), *BIG[:1]])
def test_kernel_linear_fp8(t, f, d, transposed):
    check_linear_fp8(t, f, d, transposed)


def test_kernel_linear_fp8_of_any_row_count():
    check_linear_fp8(131, 272, 80, False)


def test_kernel_linear_quantises_its_output_from_other_dtypes_too():
    x, w = random(40, 32, dtype=F16), random(48, 32, dtype=F16)
    post, post8, amax = tk.relu_square.kernel(x, w, None, None, number(1.0))
    assert post.dtype == F16
    assert_is_largest(amax, post)
    assert_close(post8, tk.relu_square_reference(*double(x, w))[0].clamp(max=448))


@pytest.mark.parametrize("dtype", [E4, HALF])
def test_kernels_scale_outputs_that_are_not_quantised(dtype):
    a, w, scale = random(48, 32, dtype=dtype), random(64, 32, dtype=dtype), number(0.3)
    wide = BF16 if dtype == E4 else dtype
    (post,) = tk.relu_square.kernel(a, w, None, scale)
    assert post.dtype == wide
    assert_close(post, tk.relu_square_reference(*double(a, w), None, scale)[0])
    post = random(48, 64, dtype=wide).relu().square()
    (dpre,) = tk.relu_square.kernel(a, w, post, scale)
    assert dpre.dtype == wide
    assert_close(dpre, tk.relu_square_reference(*double(a, w, post), scale)[0])


def test_matrices_may_begin_and_gradients_lie_anywhere():
    """Descriptors want multiples of 16 bytes: what lies elsewhere is copied."""
    g, w, post = random(48, 32, dtype=HALF), random(64, 32, dtype=HALF), random(48, 64, dtype=HALF).abs()
    assert torch.equal(tk.relu_square.kernel(moved(g), moved(w))[0], tk.relu_square.kernel(g, w)[0])
    (expected,) = tk.relu_square.kernel(g, w, post)
    assert torch.equal(tk.relu_square.kernel(moved(g), moved(w), moved(post))[0], expected)
    row = torch.cat((g[:1], g[:1, :1]), 1)[:, :-1]  # contiguous, of a row 2 bytes longer
    assert torch.equal(tk.relu_square.kernel(row, w)[0], tk.relu_square.kernel(g[:1], w)[0])
    tensors, row = mlp_case(48, 32, 64, BF16 if CUDA else F32), random(32, dtype=BF16 if CUDA else F32)
    expected, *others = (gradients(tk.relu_square_mlp, tensors, g)[1] for g in (
        row.repeat(48, 1), row.expand(48, 32), moved(row.repeat(48, 1))))
    assert all(torch.equal(a, b) for other in others for a, b in zip(expected, other, strict=True))


def small_integers(*shape, low, high):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, F32)


def test_kernel_fp8_outputs_are_exact_where_nothing_is_rounded():
    """One product in each sum, integers of few bits, scales of powers of two; in the interpreter too."""
    a, w = small_integers(48, 16, low=-2, high=2), torch.eye(16, device=DEVICE).repeat(2, 1)
    product, post = a.repeat(1, 2), small_integers(48, 32, low=0, high=3).square()
    post8, post8_t = tk.relu_square.kernel(a.to(E4), w.to(E4), None, number(2.0), number(0.5), True)
    assert torch.equal(post8.float(), 8 * product.relu().square()) and torch.equal(post8_t.float(), post8.t().float())
    for dtype in (BF16, E4):
        dpre8, dpre8_t = tk.relu_square.kernel(a.to(E4), w.to(E4), post.to(dtype), number(0.25), number(0.125), True)
        assert torch.equal(dpre8.float(), 4 * product * post.sqrt()) and torch.equal(dpre8_t.float(), dpre8.t().float())


@pytest.mark.parametrize("row, column", [(0, 0), (0, 47), (20, 31), (39, 0), (39, 47)])
def test_kernel_linear_finds_its_maximum_wherever_it_is(row, column):
    x, w = (torch.ones(n, 32, dtype=F16, device=DEVICE) for n in (40, 48))
    x[row], w[column] = 2, 2
    post, _, amax = tk.relu_square.kernel(x, w, None, None, number(1.0))
    assert amax.max() == post[row, column] == 128**2 and (post == 128**2).sum() == 1


def test_kernel_linear_saturates():
    x, w = torch.full((16, 32), 100.0, device=DEVICE).to(E4), torch.full((32, 32), 100.0, device=DEVICE).to(E4)
    post, post8, amax = tk.relu_square.kernel(x, w, None, number(1e-2), number(1e-6))
    assert (post8.float() == 448).all() and post.isfinite().all()
    assert_is_largest(amax, post)


def test_kernel_linear_of_negative_products_is_zero():
    x, w = torch.full((16, 32), 2.0, device=DEVICE).to(E4), torch.full((32, 32), -2.0, device=DEVICE).to(E4)
    post, post8, amax = tk.relu_square.kernel(x, w, None, number(1.0), number(1.0))
    assert (post == 0).all() and (post8.float() == 0).all() and (amax == 0).all()


@pytest.mark.parametrize("fp8", [False] + [True] * CUDA)  # the interpreter reads and writes NaNs in e4m3 as 480 and 384
def test_kernel_linear_shows_a_nan(fp8):
    x, w = random(40, 32), random(48, 32)
    x[7, 3] = float("nan")
    if fp8:
        post, post8, amax = tk.relu_square.kernel(x.to(E4), w.to(E4), None, number(1.0), number(1.0))
        assert post8.float().isnan().any(1).nonzero().tolist() == [[7]]
    else:
        (post,) = tk.relu_square.kernel(x, w)
    assert post.isnan().any(1).nonzero().tolist() == [[7]]


@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize(("t", "f", "d"), [(1, 16, 16), (129, 264, 72), (300, 520, 136), *BIG])
def test_kernel_backward(t, f, d, dtype):
    check_backward(t, f, d, dtype)


@pytest.mark.parametrize(("dtype", "post_dtype", "scale"), [(HALF, HALF, None), (E4, BF16, 0.01), (E4, E4, 0.01)])
@pytest.mark.parametrize(("t", "f", "d"), [(16, 16, 16), (144, 272, 80), *BIG[:1]])
def test_kernel_backward_with_fp8_outputs(t, f, d, dtype, post_dtype, scale):
    check_backward_fp8_outputs(t, f, d, dtype, post_dtype, scale)


def test_kernel_backward_saturates():
    g, w, post = (torch.full(s, v).to(DEVICE, F16) for s, v in (((16, 32), 30.0), ((32, 32), 30.0), ((16, 32), 9.0)))
    g[::2] *= -1
    dpre8, dpre8_t = tk.relu_square.kernel(g, w, post, None, number(1e-2), True)
    assert (dpre8.float().abs() == 448).all()
    assert (dpre8[0].float() < 0).all() and (dpre8_t[:, 1].float() > 0).all()


@pytest.mark.parametrize("shape", random_shapes(4 if not CUDA else 40), ids=str)
def test_kernels_at_random_shapes(shape):
    check_linear(*shape, HALF, seed=1)
    check_linear_fp8(*shape, True, seed=2)
    check_backward(*shape, HALF, seed=3)
    check_backward_fp8_outputs(*shape, E4, E4, 0.01, seed=4)


@needs_cuda
def test_kernel_beyond_int32_elements():
    t, f, d = 720_000, 3072, 64  # T * F > 2^31: 4.4 GB of bf16
    x, w = random(64, d, dtype=BF16).repeat(t // 64, 1), random(f, d, dtype=BF16)
    (post,) = tk.relu_square.kernel(x, w)
    assert torch.equal(post[-64:], post[:64])
    (dpre,) = tk.relu_square.kernel(x, w, post)
    assert torch.equal(dpre[-64:], dpre[:64])
    assert_close(dpre[-64:], tk.relu_square_reference(*double(x[-64:], w, post[-64:]))[0])


########################################################################################################################
#                                                   The differentiable MLP                                             #
########################################################################################################################


def mlp_case(t, d, f, dtype):
    w_up, w_down = random(f, d, dtype=dtype, spread=d**-0.5), random(f, d, dtype=dtype, spread=f**-0.5)
    return random(t, d, dtype=dtype), w_up, w_down


def gradients(function, tensors, g):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, g)


@pytest.mark.usefixtures("on_a_cpu")
def test_mlp_gradient_is_that_of_autograd():
    x, w_up, w_down = (t.cpu() for t in mlp_case(10, 8, 12, F64))
    assert torch.autograd.gradcheck(tk.relu_square_mlp, [t.requires_grad_() for t in (x, w_up, w_down)])


def test_a_second_derivative_is_refused():
    x, w_up, w_down = (random(16, 16, dtype=F32, seed=seed).requires_grad_() for seed in range(3))
    (grad,) = torch.autograd.grad(tk.relu_square_mlp(x, w_up, w_down).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(("t", "d", "f"), [(48, 32, 64), *[(16384, 768, 3072)] * CUDA])
def test_mlp_matches_its_reference(t, d, f):
    tensors = mlp_case(t, d, f, BF16 if CUDA else F32)
    g = random(t, d, dtype=tensors[0].dtype, seed=9)
    y, grads = gradients(tk.relu_square_mlp, tensors, g)
    expected, expected_grads = gradients(tk.relu_square_mlp_reference, [x.double() for x in tensors], g.double())
    for out, exact in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert_close(out, exact)


def test_the_mlp_in_fp8_is_exact_where_nothing_is_rounded():
    """Integers of few bits; in the interpreter too."""
    x, up = small_integers(48, 16, low=-2, high=2), torch.eye(16, device=DEVICE).repeat(2, 1)
    g, dtype = small_integers(48, 16, low=-1, high=2), BF16 if CUDA else F32
    y, grads = gradients(lambda *t: tk.relu_square_mlp(*t, (0.5, 0.25, 4.0, 1.0, 0.125)), [
        t.to(dtype) for t in (x, up, up)], g.to(dtype))
    expected, expected_grads = gradients(tk.relu_square_mlp_reference, (x, up, up), g)
    for out, exact in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert out.dtype == dtype and torch.equal(out.to(BF16), exact.to(BF16)) and exact.any()


@needs_cuda
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_kernels_may_be_the_first_work_of_a_thread(dtype):
    g, w, post = random(64, 32, dtype=dtype), random(48, 32, dtype=dtype), random(64, 48, dtype=dtype).abs()
    expected = tk.relu_square(g, w, post)
    with ThreadPoolExecutor(1) as thread:  # it has no CUDA context yet, like autograd's
        assert torch.equal(thread.submit(tk.relu_square, g, w, post).result()[0], expected[0])


def test_mlp_under_torch_compile():
    tensors, g = mlp_case(64, 32, 64, HALF), random(64, 32, dtype=HALF, seed=9)
    compiled = torch.compile(tk.relu_square_mlp, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    y, grads = gradients(compiled, tensors, g)
    expected, expected_grads = gradients(tk.relu_square_mlp, tensors, g)
    for out, exact in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert_close(out, exact)


########################################################################################################################
#                                                     Shapes and errors                                                #
########################################################################################################################


def test_operators_give_shapes_without_running():
    x, w, post = (torch.empty(s, dtype=BF16, device="meta") for s in ((32, 16), (48, 16), (32, 48)))
    s = torch.empty((), device="meta")
    out = tk.relu_square.kernel(x, w, None, None, s, True)
    assert [(tuple(o.shape), o.dtype) for o in out] == [((32, 48), E4), ((48, 32), E4)]
    out = tk.relu_square.kernel(x, w, None, None, s)
    assert [(tuple(o.shape), o.dtype) for o in out] == [((32, 48), BF16), ((32, 48), E4), (out[2].shape, F32)]
    assert [(tuple(o.shape), o.dtype) for o in tk.relu_square.kernel(x, w, post)] == [((32, 48), BF16)]
    assert [(tuple(o.shape), o.dtype) for o in tk.relu_square.kernel(x, w, post, None, s)] == [((32, 48), E4)]
    out = tk.relu_square.kernel(x, w, post, None, s, True)
    assert [(tuple(o.shape), o.dtype) for o in out] == [((32, 48), E4), ((48, 32), E4)]


@pytest.mark.usefixtures("on_a_cpu")
def test_cpu_takes_the_reference():
    x, w, post = torch.randn(5, 3), torch.randn(7, 3), torch.rand(5, 7)  # no kernel takes rows of 12 bytes
    assert torch.equal(tk.relu_square(x, w)[0], tk.relu_square_reference(x, w)[0])
    assert torch.equal(tk.relu_square(x, w, post)[0], tk.relu_square_reference(x, w, post)[0])


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 4, 5)}, r"first operand must be \(T, D\).*of shape \(2, 4, 5\)"),
        ({"w": torch.zeros(8, 6).T}, r"w must be .*contiguous.*of shape \(6, 8\) with strides \(1, 6\)"),
        ({"a": torch.zeros(0, 8)}, r"first operand must be .*not 0.*of shape \(0, 8\)"),
        ({"a": torch.zeros(4, 8, dtype=torch.int32)}, r"first operand must be .*bfloat16.*not torch.int32"),
        ({"w": torch.zeros(6, 9)}, r"w must be \(F, 8\).*of shape \(6, 9\)"),
        ({"w": None}, r"w must be \(F, 8\).*, not None"),
        ({"post": torch.zeros(4, 7)}, r"post must be \(4, 6\).*of shape \(4, 7\)"),
        ({"w": torch.zeros(6, 8, dtype=F16)}, r"w must be .*torch.float32, not torch.float16"),
        ({"post": torch.zeros(4, 6, dtype=F16)}, r"post must be .*torch.float32, not torch.float16"),
        ({"scale": torch.zeros(2)}, r"a scale must be \(\), one number.*of shape \(2,\)"),
        ({"scale": torch.zeros(1, 1)}, r"a scale must be \(\), one number.*of shape \(1, 1\)"),
        ({"a": torch.zeros(4, 8).to(E5)}, r"first operand must be .*e4m3fn, not torch.float8_e5m2"),
        ({"a": torch.zeros(4, 8).to(E4), "w": torch.zeros(6, 8).to(E4), "post": torch.zeros(4, 6).to(E5)},
         r"post must be .*bfloat16 or torch.float8_e4m3fn, not torch.float8_e5m2"),
        ({"out_scale": torch.zeros((), dtype=F64)}, r"a scale must be .*torch.float32, not torch.float64"),
        ({"w": torch.zeros(6, 8, device="meta")}, r"w must be .*on cpu.*on meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"a": torch.zeros(4, 8), "w": torch.zeros(6, 8), "post": torch.zeros(4, 6)}
    with pytest.raises(ValueError, match=message):
        tk.relu_square(**(good | change))


@pytest.mark.parametrize("function", [tk.relu_square_mlp, tk.relu_square_mlp_reference])
def test_the_mlp_names_wrong_matrices_wherever_it_runs(function):
    x, w = torch.zeros(4, 8, device=DEVICE), torch.zeros(16, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"first operand must be \(T, D\).*of shape \(1, 4, 8\)"):
        function(x[None], w, w)
    with pytest.raises(ValueError, match=r"w_down must be \(16, 8\).*of shape \(12, 8\)"):
        function(x, w, w[:12])
    with pytest.raises(ValueError, match=r"w_down must be \(16, 8\).*, not None"):
        function(x, w, None)
    with pytest.raises(ValueError, match=r"x must be \(T, D\).*not torch.float8_e4m3fn"):
        function(*(t.to(E4) for t in (x, w, w)))
    x, w = torch.zeros(32, 16, device=DEVICE), torch.zeros(48, 16, device=DEVICE)
    for sizes, scales in (((32, 48), (1.0, 2.0)), ((32, 48), (1.0, 1.0, 0.0, 1.0, 1.0)), ((31, 48), (1.0,) * 5),
                          ((32, 40), (1.0,) * 5), ((32, 48), (1.0, float("nan"), 1.0, 1.0, 1.0)),
                          ((32, 48), (1.0, 1e-50, 1.0, 1.0, 1.0)), ((32, 48), (1.0, 1.0, 1.0, 1.0, 1e40))):
        with pytest.raises(ValueError, match=r"scales are \(1.0, .*\): pass five of 1e-30 .* that 16 divides, or no"):
            function(x[:sizes[0]], w[:sizes[1]], w[:sizes[1]], scales)


def test_kernels_name_rows_they_cannot_take():
    with pytest.raises(ValueError, match=r"a matrix must be \(4, 6\) padded in T, D and F to multiples of 4"):
        tk.relu_square.kernel(random(4, 6), random(8, 6))
    with pytest.raises(ValueError, match=r"a matrix must be \(16, 12\) padded in T, D and F to multiples of 16"):
        tk.relu_square.kernel(*(random(n, 16, dtype=HALF) for n in (12, 16)), None, None, number(1.0), True)
    with pytest.raises(ValueError, match="first operand must be .*float16 or torch.float8_e4m3fn, not torch.float32"):
        tk.relu_square.kernel(random(16, 16), random(16, 16), None, None, number(1.0))
    with pytest.raises(ValueError, match="first operand must be .*, not torch.float64"):
        tk.relu_square.kernel(random(16, 16, dtype=F64), random(16, 16, dtype=F64))
