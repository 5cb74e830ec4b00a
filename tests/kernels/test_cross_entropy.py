"""What holds for the loss kernels."""

import os

import pytest
import torch

import triton_kernels as tk

TRITON = tk.triton is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_cuda = pytest.mark.skipif(DEVICE != "cuda" or not TRITON, reason="no CUDA device, or no triton")
runs_kernel = pytest.mark.skipif(not TRITON or not (DEVICE == "cuda" or INTERPRETED), reason="needs TRITON_INTERPRET=1")

F8, F16, BF16, F32, F64 = torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 1e-2, F8: 0.13}  # e5m2: half of its step of 1/4
LOSS_TOLERANCE = {F32: 1e-5, F16: 1e-5, BF16: 1e-3 if DEVICE == "cuda" else 1e-5}  # bf16: tanh.approx
if INTERPRETED:
    TOLERANCE[F8] = 0.5  # the interpreter loses the carry when it rounds to e5m2: 1.96 becomes 1.0, not 2.0


def inputs(tokens, vocab, k, dtype=F32, device="cpu", spread=8.0, index_dtype=torch.int64, seed=0, prefix=False):
    """Random logits; targets of k tokens, which repeat within every row where k > 1 and lack some, and with prefix one
    more; weights."""
    generator = torch.Generator().manual_seed(seed + 1000 * tokens + 10 * vocab + k)
    logits = (torch.randn(tokens, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[1::2] = targets[: 2 * (tokens // 2) : 2]  # each second target is its left neighbour's again
    weights = torch.rand(k + prefix, generator=generator) + 0.1
    prefixes = torch.randint(vocab, (tokens,), generator=generator)
    prefixes[::3] = targets[::3]
    targets[4::5] = prefixes[3::7] = -1
    targets = tk.further_targets(targets, k, prefixes if prefix else None)
    return logits.to(device), targets.to(device, index_dtype), weights.to(device)


def plain(logits, targets, weights, grad_scale):
    """The definition, term by term, differentiated by autograd in float64."""
    logits = logits.double().requires_grad_()
    z = 23 * torch.sigmoid((logits + 5) / 7.5)
    lse = torch.logsumexp(z, 1)
    losses = []
    for i in range(len(targets)):
        terms = zip(weights, targets[i].tolist(), strict=True)
        losses.append(sum([w.double() * (lse[i] - z[i, t]) for w, t in terms if t >= 0], 0 * lse[i]))
    losses = torch.stack(losses)
    (grad,) = torch.autograd.grad(losses.sum() * grad_scale, logits)
    return losses.detach(), grad


def assert_close(out, expected, tolerance):
    assert out.isfinite().all()
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def poison(device, *shapes_and_dtypes):
    """Leaves NaN in the freed blocks that torch.empty hands out next."""
    for shape, dtype in shapes_and_dtypes:
        torch.full(shape, float("nan"), device=device).to(dtype)


def assert_matches_reference(args, grad_scale, grad_dtype, both=True):
    logits, targets, weights = args
    poison(logits.device, (logits.shape, grad_dtype), (logits.shape[::-1], grad_dtype), (logits.shape[:1], F32))
    out = tk.softcapped_cross_entropy.kernel(logits, targets, weights, grad_scale, grad_dtype, both)
    losses, grad, grad_t = out
    wide = logits.double()
    expected = tk.softcapped_cross_entropy_reference(wide, targets, weights, grad_scale, F64, both)
    assert losses.dtype == F32 and losses.shape == logits.shape[:1]
    assert grad.dtype == grad_t.dtype == grad_dtype and grad.shape == logits.shape
    assert_close(losses, expected[0], LOSS_TOLERANCE[logits.dtype])
    tolerance = 1e-2 if (logits.dtype, grad_dtype) == (BF16, F32) else TOLERANCE[grad_dtype]
    assert_close(grad.float(), expected[1], tolerance)
    if both:
        assert grad_t.is_contiguous() and torch.equal(grad_t.float(), grad.float().t())
    else:
        assert grad_t.shape == (0, 0)


########################################################################################################################
#                                                     The reference                                                    #
########################################################################################################################


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 7), (3, 2), (17, 257), (40, 600)])
def test_reference_is_the_definition_and_its_derivative(tokens, vocab, k, prefix):
    args = inputs(tokens, vocab, k, F64, prefix=prefix)
    losses, grad, grad_t = tk.softcapped_cross_entropy_reference(*args, 0.37, F64, True)
    expected_losses, expected_grad = plain(*args, 0.37)
    assert torch.equal(grad_t, grad.t()) and grad_t.is_contiguous()
    if vocab == 1:  # one column: both are 0 up to rounding, so a relative error says nothing
        assert losses.abs().max() <= 1e-12 and grad.abs().max() <= 1e-12
    else:
        assert_close(losses, expected_losses, TOLERANCE[F64])
        assert_close(grad, expected_grad, TOLERANCE[F64])


def test_reference_at_the_real_vocabulary():
    args = inputs(25, 50_304, 2, F64, prefix=True)
    losses, grad, _ = tk.softcapped_cross_entropy_reference(*args, 1.0, F64)
    expected = plain(*args, 1.0)
    assert_close(losses, expected[0], TOLERANCE[F64])
    assert_close(grad, expected[1], TOLERANCE[F64])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("grad_dtype", [F32, F16, BF16, F8])
def test_reference_in_lower_precision(dtype, grad_dtype):
    args = inputs(17, 1000, 3, dtype, index_dtype=torch.int32, prefix=True)
    losses, grad, grad_t = tk.softcapped_cross_entropy_reference(*args, 8.0, grad_dtype, True)
    expected = plain(*args, 8.0)
    assert losses.dtype == F32 and grad.dtype == grad_t.dtype == grad_dtype
    assert torch.equal(grad_t.float(), grad.float().t())
    assert_close(losses, expected[0], TOLERANCE[F32])
    assert_close(grad.float(), expected[1], TOLERANCE[grad_dtype])


def test_further_targets_are_those_of_the_rows_after():
    tokens = torch.tensor([3, 5, 7], dtype=torch.int32)
    assert tk.further_targets(tokens, 1).tolist() == [[3], [5], [7]]
    assert tk.further_targets(tokens, 3).tolist() == [[3, 5, 7], [5, 7, -1], [7, -1, -1]]
    assert tk.further_targets(tokens, 2, tokens - 4).tolist() == [[3, 5, -1], [5, 7, 1], [7, -1, 3]]
    assert tk.further_targets(tokens[:1], 4).tolist() == [[3, -1, -1, -1]]
    assert tk.further_targets(tokens, 2).is_contiguous() and tk.further_targets(tokens, 2).dtype == torch.int32
    with pytest.raises(ValueError, match=r"targets must be \(T,\).*of shape \(1, 3\)"):
        tk.further_targets(tokens[None], 2)
    for other in (tokens[:2], tokens.long()):
        with pytest.raises(ValueError, match=r"other must be \(3,\).*, torch.int32, not"):
            tk.further_targets(tokens, 2, other)
    for candidates in (tokens.float(), tokens[None]):
        with pytest.raises(ValueError, match=r"candidates must be \(N,\).*, torch.int32 or torch.int64, not"):
            tk.candidate_positions(tokens, candidates, 8)
    assert tk.further_targets(torch.arange(6)[::2], 2).tolist() == [[0, 2], [2, 4], [4, -1]]


def test_rows_without_a_target_have_neither_loss_nor_gradient():
    logits, targets, weights = inputs(9, 50, 2, prefix=True)
    targets[:, :2] = -1
    targets[:-1, 2] = -1
    losses, grad, _ = tk.softcapped_cross_entropy_reference(logits, targets, weights, 1.0, F32)
    assert losses[:-1].eq(0).all() and losses[-1] > 0
    assert grad[:-1].eq(0).all() and grad[-1].ne(0).any()


def test_reference_under_torch_compile():
    args = *inputs(600, 1000, 2, prefix=True), 1.0, F32, True
    compiled = torch.compile(tk.softcapped_cross_entropy_reference, fullgraph=True, backend="aot_eager")
    for part, full in zip(compiled(*args), tk.softcapped_cross_entropy_reference(*args), strict=True):
        torch.testing.assert_close(part, full)


########################################################################################################################
#                                                A sample of the vocabulary                                            #
########################################################################################################################


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_candidate_positions(index_dtype):
    candidates = torch.tensor([2, 3, 7, 19], dtype=torch.int32)
    targets = torch.tensor([7, -1, 0, 19, 2, 4, 3], dtype=index_dtype)
    positions = tk.candidate_positions(targets, candidates, 20)
    assert positions.tolist() == [2, -1, -1, 3, 0, -1, 1] and positions.dtype == index_dtype


def test_loss_over_a_sample_is_the_loss_restricted_to_its_columns():
    logits, targets, weights = inputs(30, 200, 3, F64, prefix=True)
    candidates = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:120].sort().values
    index = tk.candidate_positions(targets, candidates, 200)
    out = tk.softcapped_cross_entropy_reference(logits[:, candidates], index, weights, 1.0, F64)
    # The same by the whole vocabulary: other columns at z = -inf, and terms outside of the sample left out.
    wide = logits.clone().requires_grad_()
    z = (23 * torch.sigmoid((wide + 5) / 7.5))[:, candidates]
    lse = z.logsumexp(1)
    total = 0
    for i in range(30):
        for weight, token in zip(weights, targets[i], strict=True):
            column = (candidates == token).nonzero()
            if len(column):
                total = total + weight.double() * (lse[i] - z[i, column.item()])
    total.backward()
    assert_close(out[0].sum(), total.detach(), 1e-12)
    assert_close(out[1], wide.grad[:, candidates], 1e-12)
    assert wide.grad.ne(0).any(0).sum() == 120


@runs_kernel
def test_kernel_over_a_sample():
    logits, targets, weights = inputs(40, 900, 2, F16, DEVICE, prefix=True)
    candidates = torch.randperm(900, generator=torch.Generator().manual_seed(1))[:500].sort().values.to(DEVICE)
    index = tk.candidate_positions(targets, candidates, 900)
    assert (index < 0).any() and (index >= 0).any()
    assert_matches_reference((logits[:, candidates], index, weights), 1.0, F32)


########################################################################################################################
#                                                      The kernel                                                      #
########################################################################################################################


@runs_kernel
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 40), (3, 257), (70, 300), (2, 4500)])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_kernel_matches_reference(tokens, vocab, k, dtype):
    args = inputs(tokens, vocab, k, dtype, DEVICE, prefix=k % 2 == 0)
    assert_matches_reference(args, 0.37, F32 if dtype == BF16 else dtype, both=k > 1)


@runs_kernel
def test_kernel_at_random_shapes():
    generator = torch.Generator().manual_seed(0)
    for seed in range(8 if DEVICE == "cpu" else 30):
        limits = ((1, 150), (30, 700 if DEVICE == "cpu" else 6000), (1, tk.MAX_TARGETS), (0, 2), (0, 2))
        draws = (int(torch.randint(low, high, (), generator=generator)) for low, high in limits)
        tokens, vocab, k, prefix, both = draws
        args = inputs(tokens, vocab, k, F32, DEVICE, seed=seed, prefix=bool(prefix))
        assert_matches_reference(args, 2.0, F32, bool(both))


@runs_kernel
@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_kernel_of_few_columns(vocab):
    args = inputs(3, vocab, 2, F32, DEVICE, prefix=True)
    out = tk.softcapped_cross_entropy.kernel(*args, 1.0, F32)
    for part, expected in zip(out[:2], plain(*args, 1.0), strict=True):
        # Probabilities near 1 cancel against their weight, so only the absolute error is small.
        torch.testing.assert_close(part.double(), expected, atol=1e-5, rtol=0)


@runs_kernel
@pytest.mark.parametrize("grad_dtype", [F32, F16, F8])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_kernel_takes_every_target_and_grad_dtype(index_dtype, grad_dtype):
    args = inputs(5, 300, 2, F16, DEVICE, index_dtype=index_dtype, prefix=True)
    assert_matches_reference(args, 8.0, grad_dtype)


@runs_kernel
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernel_s_e5m2_gradient_is_its_float32_gradient_rounded(dtype):
    """To the bit; in the interpreter where rounding carries nothing into the exponent, which it loses."""
    args = inputs(40, 300, 2, dtype, DEVICE, prefix=True)
    (_, wide, _), (_, grad, _) = (tk.softcapped_cross_entropy.kernel(*args, 1e4, out) for out in (F32, F8))
    right = torch.full_like(wide, True, dtype=torch.bool)
    if DEVICE == "cpu":
        right = (torch.frexp(wide).mantissa.abs() < 15 / 16) & (wide.abs() > 2**-13)
        assert right.sum() > len(wide) * 200
    assert right.gather(1, args[1].clamp(min=0)).any()  # some are targets
    assert torch.equal(grad.float()[right], wide.to(F8).float()[right])


@runs_kernel
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernel_and_reference_clamp_e5m2(dtype):
    logits, targets, weights = inputs(5, 300, 2, dtype, DEVICE)
    for function in (tk.softcapped_cross_entropy.kernel, tk.softcapped_cross_entropy_reference):
        for scale in (1e8, 1e13):  # of the second the probabilities' part alone is too large
            _, grad, grad_t = function(logits, targets, weights, scale, F8, True)
            for values in (grad.float(), grad_t.float()):
                assert values.isfinite().all()
                assert values.abs().max() == tk.E5M2_MAX


@runs_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_kernel_at_extreme_logits(dtype):
    logits, targets, weights = inputs(8, 300, 3, dtype, DEVICE, prefix=True)
    logits[0], logits[1], logits[2] = 65504, -65504, 0
    logits[3:, ::2], logits[3:, 1::2] = -300, 60
    assert_matches_reference((logits, targets, weights), 1.0, F32)


@runs_kernel
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernel_shows_a_nan(dtype):
    logits, targets, weights = inputs(4, 300, 1, dtype, DEVICE)
    for column in (4, 5, 6, 7):
        logits[1] = 0
        logits[1, column] = float("nan")
        for function in (tk.softcapped_cross_entropy.kernel, tk.softcapped_cross_entropy_reference):
            losses, grad, grad_t = function(logits, targets, weights, 1.0, F8, True)
            assert losses.isnan().tolist() == [False, True, False, False]
            assert grad.float().isnan().any(1).tolist() == [False, True, False, False]
            assert grad_t.float().isnan().any(0).tolist() == [False, True, False, False]


@needs_cuda
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("grad_dtype", [BF16, F8, F32])
def test_kernel_at_real_width(k, grad_dtype):
    for spread in (1.0, 8.0):
        args = inputs(1024, 50_304, k, BF16, DEVICE, spread=spread, prefix=k == 2)
        assert_matches_reference(args, 16.0, grad_dtype, both=k < 4)


@needs_cuda
def test_kernel_gives_the_same_bits_each_time():
    args = inputs(4096, 50_304, 3, BF16, DEVICE, prefix=True)
    first, *others = (tk.softcapped_cross_entropy.kernel(*args, 16.0, F8, True) for _ in range(5))
    for other in others:
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, other, strict=True))


@needs_cuda
def test_kernel_beyond_int32_elements():
    rows = 43_008  # * 50,304 > 2^31; bf16 in, e5m2 out twice: 8.7 GB
    logits = torch.randn(rows, 50_304, dtype=BF16, device=DEVICE)
    targets = tk.further_targets(torch.randint(50_304, (rows,), device=DEVICE), 2)
    weights = torch.tensor([1.0, 0.5], device=DEVICE)
    losses, grad, grad_t = tk.softcapped_cross_entropy(logits, targets, weights, 1e4, F8, True)
    expected = tk.softcapped_cross_entropy_reference(logits[-64:].double(), targets[-64:], weights, 1e4, F64)
    assert_close(losses[-64:], expected[0], LOSS_TOLERANCE[BF16])
    assert_close(grad[-64:].float(), expected[1], TOLERANCE[F8])
    assert torch.equal(grad_t.view(torch.uint8), grad.view(torch.uint8).t())


@needs_cuda
def test_kernel_under_torch_compile():
    args = inputs(64, 1000, 2, BF16, DEVICE, prefix=True)

    def doubled(logits, targets, weights):
        losses, grad, grad_t = tk.softcapped_cross_entropy(logits * 2, targets, weights, 16.0, F8, True)
        return losses.mean(), grad, grad_t

    expected = doubled(*args)
    out = torch.compile(doubled, fullgraph=True)(*args)
    for part, full in zip(out, expected, strict=True):
        torch.testing.assert_close(part.float(), full.float())


########################################################################################################################
#                                            Dispatch, errors, no Triton                                               #
########################################################################################################################


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
@pytest.mark.parametrize(("both", "shape"), [(False, (0, 0)), (True, (7, 5))])
def test_operator_gives_shapes_without_running(both, shape):
    args = torch.empty(5, 7, dtype=BF16), torch.empty(5, 2, dtype=torch.int64), torch.empty(2)
    args = (x.to("meta") for x in args)
    losses, grad, grad_t = tk.softcapped_cross_entropy.kernel(*args, 1.0, F8, both)
    assert (losses.shape, losses.dtype) == ((5,), F32)
    assert (grad.shape, grad.dtype) == ((5, 7), F8)
    assert (grad_t.shape, grad_t.dtype) == (shape, F8)


@pytest.mark.usefixtures("on_a_cpu")
def test_cpu_takes_the_reference():
    args = *inputs(3, 20, 2, prefix=True), 1.0, F32, True
    for a, b in zip(tk.softcapped_cross_entropy(*args), tk.softcapped_cross_entropy_reference(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 5, dtype=torch.int32)}, r"logits must be .*torch.float64, not torch.int32"),
        ({"logits": torch.zeros(2, 4, 5)}, r"logits must be \(T, V\).* shape \(2, 4, 5\)"),
        ({"logits": torch.zeros(5, 4).T}, r"logits must be .*contiguous.* strides \(1, 4\)"),
        ({"logits": torch.zeros(0, 5), "targets": torch.zeros(0, 2, dtype=torch.int64)}, r"not 0.*\(0, 5"),
        ({"targets": torch.zeros(3, 2, dtype=torch.int64)}, r"targets must be \(4, 2\).* shape \(3, 2\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets must be \(4, 2\).* shape \(4,\)"),
        ({"targets": None}, r"targets must be \(4, 2\).*, not None"),
        ({"targets": torch.zeros(4, 2)}, r"targets must be .*int32 or torch.int64, not torch.float32"),
        ({"targets": torch.zeros(2, 4, dtype=torch.int64).T}, r"targets must be .*contiguous.* strides \(1, 4\)"),
        ({"weights": torch.zeros(0)}, r"weights must be .*K <= 5.* shape \(0,\)"),
        ({"weights": torch.zeros(6)}, r"weights must be .*K <= 5.* shape \(6,\)"),
        ({"weights": torch.zeros(1)}, r"targets must be \(4, 1\).* shape \(4, 2\)"),
        ({"weights": torch.zeros(2, dtype=F64)}, r"weights must be .*torch.float32, not torch.float64"),
        ({"weights": torch.zeros(2, device="meta")}, r"weights must be .*on cpu.* on meta"),
        ({"weights": [1.0, 0.5]}, r"weights must be \(K,\).*torch.float32, not \[1.0, 0.5\]"),
        ({"targets": torch.zeros(4, 2, dtype=torch.int64, device="meta")}, r"targets must be .*on cpu.* on meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"logits": torch.zeros(4, 5), "targets": torch.zeros(4, 2, dtype=torch.int64), "weights": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        tk.softcapped_cross_entropy(**(good | change), grad_scale=1.0, grad_dtype=F32)


@runs_kernel
def test_kernel_names_wrong_dtypes():
    logits, targets, weights = inputs(3, 20, 2, F64, DEVICE)
    with pytest.raises(ValueError, match="logits must be .*torch.float32, not torch.float64"):
        tk.softcapped_cross_entropy.kernel(logits, targets, weights, 1.0, F32)
    with pytest.raises(ValueError, match="grad_dtype is torch.float64: pass one of"):
        tk.softcapped_cross_entropy.kernel(logits.float(), targets, weights, 1.0, F64)
