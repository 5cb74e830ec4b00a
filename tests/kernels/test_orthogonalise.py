"""What holds for the symmetric products and the orthogonalisation."""

import importlib.util
import os

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import triton_kernels as tk

CUDA = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"

needs_cuda = pytest.mark.skipif(DEVICE != "cuda" or not TRITON, reason="no CUDA device, or no triton")
runs_kernel = pytest.mark.skipif(not (TRITON and (DEVICE == "cuda" or INTERPRETED)), reason="no kernel runs here")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 1e-2}
DTYPES = [F32, F16] if DEVICE == "cpu" else [F32, BF16]
SHAPES = [(1, 1, 1), (3, 1, 5), (2, 48, 80), (1, 33, 100), (2, 70, 32), (7, 37, 20), (1, 64, 64),
          (1, 100, 130)]
BANKS = [(6, 256, 768), (2, 768, 768), (3, 3072, 768), (1, 768, 768), (5, 768, 768), (11, 3072, 768), (8, 256, 768)]


def matrices(shape, dtype=F32, seed=0):
    """Random matrices whose singular values span a few powers of ten, of Frobenius norm about 1 to 30."""
    generator = torch.Generator().manual_seed(seed + hash(shape) % 10_000)
    x = torch.randn(shape, generator=generator)
    x = x * torch.logspace(-1, 0, shape[2]) * torch.rand(shape[0], 1, 1, generator=generator).mul(2).exp()
    return (x / max(shape[1:]) ** 0.5).to(DEVICE, dtype)


def poison(*shapes, dtype):
    """Leave NaN in memory that the next torch.empty of these shapes is likely to be given."""
    blocks = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for shape in shapes for _ in range(3)]
    del blocks


def error(out, expected):
    assert out.isfinite().all()
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(out, expected, tolerance):
    assert error(out, expected) <= tolerance, f"relative error {error(out, expected):.2e} is above {tolerance:.0e}"


def assert_symmetric(x):
    """To the bit on a GPU. In the interpreter NumPy multiplies, and not every BLAS makes a symmetric tile of x x'."""
    if DEVICE == "cuda":
        assert torch.equal(x, x.mT)
    else:
        assert_close(x, x.mT.double(), 1e-6 if x.dtype == F32 else TOLERANCE[x.dtype] / 2)


def assert_products_match(shape, dtype, seed=0):
    x = matrices(shape, dtype, seed)
    square = (shape[0], min(shape[1:]), min(shape[1:]))
    poison(square, dtype=dtype)
    gram = tk.gram.kernel(x)
    assert gram.dtype == dtype and gram.shape == square
    assert_symmetric(gram)
    assert_close(gram, tk.gram_reference(x.double()), TOLERANCE[dtype])
    poison(square, dtype=dtype)
    step = tk.gram.kernel(gram, 0.7, -1.3)
    assert step.dtype == dtype and step.shape == square
    assert_symmetric(step)
    assert_close(step, tk.gram_reference(gram.double(), 0.7, -1.3), TOLERANCE[dtype])


def assert_orthogonalises(g, name="", rounds=0):
    """Relative and largest error against float64 are at most 1.1 and 1.5 times those of plain PyTorch in g's dtype and
    `rounds` roundings: the kernel also rounds a, on the diagonal of a + step, which shows where little else is
    rounded. fp32 may differ by 1e-4, and matrices of a few rows by 64 roundings: the first polynomial alone multiplies
    an error of rank 1 by 16."""
    exact = tk.orthogonalise_reference(g.double())
    plain = tk.orthogonalise_reference(g)
    if CUDA:
        torch.cuda.synchronize()
    poison(g.shape, g.shape, dtype=g.dtype)
    out = tk.orthogonalise.kernel(g)
    assert out.dtype == g.dtype and out.shape == g.shape
    unit = torch.finfo(g.dtype).eps / 2
    few = 1e-4 if g.dtype == F32 else 64 * unit if min(g.shape[1:]) < 16 else 0
    bounds = 1.1 * error(plain, exact) + rounds * unit, 1.5 * float((plain - exact).abs().max()) + rounds * unit
    bounds = max(bounds[0], few), max(bounds[1], few)
    found = error(out, exact), float((out - exact).abs().max())
    if name:
        print(f"{name} {tuple(g.shape)}: relative, largest error {found}, bounds {bounds}")
    assert found[0] <= bounds[0] and found[1] <= bounds[1], f"relative, largest error {found}, bounds {bounds}"
    return out


########################################################################################################################
#                                                     The references                                                   #
########################################################################################################################


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3), (1, 4, 4)])
def test_symmetric_references_are_the_definitions(shape):
    x = torch.randn(shape, dtype=F64)
    side = "nij,nkj->nik" if shape[1] <= shape[2] else "nji,njk->nik"
    gram = torch.einsum(side, x, x)
    torch.testing.assert_close(tk.gram_reference(x), gram)
    expected = 0.3 * gram - 2.0 * torch.einsum("nij,nkj->nik", gram, gram)
    torch.testing.assert_close(tk.gram_reference(gram, 0.3, -2.0), expected)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_orthogonalise_reference_takes_singular_values_through_the_polynomials(shape):
    g = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / (1.02 * g.norm(dim=(1, 2))[:, None] + 1e-6)
    for a, b, c in tk.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.85 and s.max() < 1.15
    torch.testing.assert_close(tk.orthogonalise_reference(g), (u * s[:, None, :]) @ vh)


########################################################################################################################
#                                                      The kernels                                                     #
########################################################################################################################


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_symmetric_products(shape, dtype):
    assert_products_match(shape, dtype)


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_orthogonalises(shape, dtype):
    assert_orthogonalises(matrices(shape, dtype))


@runs_kernel
def test_kernels_at_random_shapes():
    generator = torch.Generator().manual_seed(0)
    top = 60 if DEVICE == "cpu" else 700
    for seed in range(4):
        shape = tuple(int(torch.randint(1, high, (), generator=generator)) for high in (4, top, top))
        assert_products_match(shape, DTYPES[seed % 2], seed)
        assert_orthogonalises(matrices(shape, DTYPES[seed % 2], seed))


@runs_kernel
@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1e-3, 1e3, 1e7])
def test_kernel_orthogonalises_at_every_scale(factor):
    g = matrices((2, 20, 40), DTYPES[1] if CUDA else F32) * factor
    assert_orthogonalises(g, rounds=5)


@runs_kernel
def test_float32_is_the_reference_s():
    g = matrices((2, 20, 40))
    assert torch.equal(tk.orthogonalise(g), tk.orthogonalise_reference(g))
    assert not torch.equal(tk.orthogonalise.kernel(g), tk.orthogonalise_reference(g))


@runs_kernel
@pytest.mark.parametrize("function", [tk.gram, tk.orthogonalise])
def test_only_bfloat16_takes_the_kernels(function):
    for dtype in (F16, BF16, F32, F64):
        code = make_fx(lambda x: function(x))(matrices((2, 20, 40), dtype)).code
        assert ("speedrun" in code) == (dtype == BF16), dtype


@runs_kernel
def test_kernel_keeps_matrices_apart():
    g = matrices((4, 20, 17), DTYPES[0])
    g[1] = 0
    whole = tk.orthogonalise.kernel(g)
    assert (whole[1] == 0).all()
    g[2, 3, 4] = float("nan")
    broken = tk.orthogonalise.kernel(g)
    assert torch.equal(broken[[0, 1, 3]], whole[[0, 1, 3]]) and broken[2].isnan().any()


@runs_kernel
def test_kernel_takes_many_matrices():
    shape = (9, 3, 4) if DEVICE == "cpu" else (400, 75, 45)
    g = matrices(shape, DTYPES[1])
    assert_orthogonalises(g)


@needs_cuda
@pytest.mark.parametrize("shape", BANKS)
def test_kernels_at_real_shapes(shape):
    assert_products_match(shape, BF16)
    g = matrices(shape, BF16)
    out = assert_orthogonalises(g, "bf16")
    flat = torch.randn(shape, dtype=BF16, device=DEVICE)
    whitened = tk.gram_reference(assert_orthogonalises(flat, "bf16, normal")[:1].double())
    values = torch.linalg.eigvalsh(whitened).sqrt()  # the singular values; those of a normal square reach down to 0
    assert values.max() < 1.15 and (values.min() > 0.85 or shape[1] == shape[2])
    for _ in range(100):  # a moving result would be a race
        assert torch.equal(tk.orthogonalise.kernel(g), out)


@needs_cuda
def test_kernel_on_two_streams_at_once():
    g = matrices((3, 3072, 768), BF16)
    expected, outs = tk.orthogonalise(g), []
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outs.append(tk.orthogonalise(g))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@needs_cuda
def test_kernels_under_torch_compile_and_in_a_graph():
    def update(g):
        x = tk.orthogonalise(g * 2)
        return x + 1, tk.gram(tk.gram(x), 0.5, 0.25)

    g = matrices((2, 256, 768), BF16)
    expected = update(g)
    for mode in (None, "reduce-overhead"):
        out = [x.clone() for _ in range(3) for x in torch.compile(update, fullgraph=True, mode=mode)(g)]
        assert torch.equal(out[-2], expected[0]) and torch.equal(out[-1], expected[1])


########################################################################################################################
#                                                   Dispatch and errors                                                #
########################################################################################################################


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
def test_operators_give_shapes_without_running():
    for shape, short in [((2, 5, 7), 5), ((2, 7, 5), 5)]:
        x = torch.empty(shape, dtype=BF16, device="meta")
        assert tk.gram.kernel(x).shape == (2, short, short)
        assert tk.gram.kernel(tk.gram.kernel(x), 1.0, 2.0).shape == (2, short, short)
        assert tk.orthogonalise.kernel(x).shape == shape and tk.orthogonalise.kernel(x).dtype == BF16


@pytest.mark.usefixtures("on_a_cpu")
def test_cpu_takes_the_reference():
    x = torch.randn(2, 5, 7)
    assert torch.equal(tk.gram(x), tk.gram_reference(x))
    assert torch.equal(tk.orthogonalise(x), tk.orthogonalise_reference(x))
    a = x @ x.mT
    assert torch.equal(tk.gram(a, 0.5, 2.0), tk.gram_reference(a, 0.5, 2.0))


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 5), r"must be \(N, .* shape \(4, 5\)"),
        (torch.zeros(2, 0, 5), r"not 0.* shape \(2, 0, 5\)"),
        (torch.zeros(2, 4, 4, dtype=torch.int32), r"must be .*torch.float64, not torch.int32"),
        (torch.zeros(2, 5, 5).mT, r"must be .*contiguous.* strides \(25, 1, 5\)"),
    ],
)
def test_wrong_matrices_are_named(x, message):
    for call in (tk.gram, tk.orthogonalise, lambda x: tk.gram(x, 1.0, 1.0)):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_polynomial_of_a_rectangle_is_named():
    with pytest.raises(ValueError, match=r"x must be \(N, S, S\).* shape \(2, 4, 5\)"):
        tk.gram(torch.zeros(2, 4, 5), 1.0, 1.0)


@runs_kernel
def test_kernels_name_float64():
    x = torch.zeros(2, 4, 4, dtype=F64, device=DEVICE)
    for call in (tk.gram.kernel, tk.orthogonalise.kernel, lambda x: tk.gram.kernel(x, 1.0, 1.0)):
        with pytest.raises(ValueError, match="must be .*torch.float32, not torch.float64"):
            call(x)
