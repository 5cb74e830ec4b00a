"""What holds for triton_kernels.py.

With CUDA the kernels run on the GPU, at real sizes too. Without it they run in Triton's interpreter, which must be
switched on before triton is imported and then holds for the whole process: so this file starts itself once more, in a
process of its own, for the kernel cases alone, and no other test sees the switch.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_kernels as tk

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"

needs_cuda = pytest.mark.skipif(DEVICE != "cuda" or not TRITON, reason="no CUDA device, or no triton")
runs_kernel = pytest.mark.skipif(
    not (TRITON and (DEVICE == "cuda" or INTERPRETED)),
    reason="run by test_kernels_in_the_interpreter, in its own process" if TRITON else "triton cannot be imported",
)

F8, F16, BF16, F32, F64 = torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 1e-2, F8: 0.13}  # e5m2: half of its step of 1/4
if INTERPRETED:
    TOLERANCE[F8] = 0.5  # the interpreter loses the carry when it rounds to e5m2: 1.96 becomes 1.0, not 2.0


def inputs(tokens, vocab, k, dtype=F32, device="cpu", spread=8.0, index_dtype=torch.int64, seed=0):
    """Random logits, targets that repeat within every window of K where K > 1, and weights."""
    generator = torch.Generator().manual_seed(seed + 1000 * tokens + 10 * vocab + k)
    logits = (torch.randn(tokens, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[1::2] = targets[: 2 * (tokens // 2) : 2]  # each second target is its left neighbour's again
    weights = torch.rand(k, generator=generator) + 0.1
    return logits.to(device), targets.to(device, index_dtype), weights.to(device)


def plain(logits, targets, weights, grad_scale):
    """The definition, term by term, differentiated by autograd in float64."""
    logits = logits.double().requires_grad_()
    z = 23 * torch.sigmoid((logits + 5) / 7.5)
    lse = torch.logsumexp(z, 1)
    losses = []
    for i in range(len(targets)):
        terms = [w.double() * (lse[i] - z[i, t]) for w, t in zip(weights, targets[i:].tolist(), strict=False)]
        losses.append(torch.stack(terms).sum())
    losses = torch.stack(losses)
    (grad,) = torch.autograd.grad(losses.sum() * grad_scale, logits)
    return losses.detach(), grad


def assert_close(out, expected, tolerance):
    assert out.isfinite().all()
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def assert_matches_reference(args, grad_scale, grad_dtype):
    logits, targets, weights = args
    losses, grad = tk.softcapped_cross_entropy_kernel(logits, targets, weights, grad_scale, grad_dtype)
    expected = tk.softcapped_cross_entropy_reference(logits.double(), targets, weights, grad_scale, F64)
    assert losses.dtype == F32 and losses.shape == targets.shape
    assert grad.dtype == grad_dtype and grad.shape == logits.shape
    assert_close(losses, expected[0], TOLERANCE[F32])
    assert_close(grad.float(), expected[1], TOLERANCE[grad_dtype])


########################################################################################################################
#                                                     The reference                                                    #
########################################################################################################################


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 7), (3, 2), (17, 257), (40, 600)])
def test_reference_is_the_definition_and_its_derivative(tokens, vocab, k):
    logits, targets, weights = inputs(tokens, vocab, k, F64)
    losses, grad = tk.softcapped_cross_entropy_reference(logits, targets, weights, 0.37, F64)
    expected_losses, expected_grad = plain(logits, targets, weights, 0.37)
    if vocab == 1:  # one column: both are 0 up to rounding, so a relative error says nothing
        assert losses.abs().max() <= 1e-12 and grad.abs().max() <= 1e-12
    else:
        assert_close(losses, expected_losses, TOLERANCE[F64])
        assert_close(grad, expected_grad, TOLERANCE[F64])


def test_reference_works_through_rows_in_parts():
    args = inputs(25, 50_304, 2, F64)  # 10 rows a part
    losses, grad = tk.softcapped_cross_entropy_reference(*args, 1.0, F64)
    expected = plain(*args, 1.0)
    assert_close(losses, expected[0], TOLERANCE[F64])
    assert_close(grad, expected[1], TOLERANCE[F64])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("grad_dtype", [F32, F16, BF16, F8])
def test_reference_in_lower_precision(dtype, grad_dtype):
    args = inputs(17, 1000, 3, dtype, index_dtype=torch.int32)
    losses, grad = tk.softcapped_cross_entropy_reference(*args, 8.0, grad_dtype)
    expected = plain(*args, 8.0)
    assert losses.dtype == F32 and grad.dtype == grad_dtype
    assert_close(losses, expected[0], TOLERANCE[F32])
    assert_close(grad.float(), expected[1], TOLERANCE[grad_dtype])


def test_last_rows_leave_out_the_targets_past_the_end():
    logits, targets, weights = inputs(6, 50, 4)
    whole = tk.softcapped_cross_entropy_reference(logits, targets, weights, 1.0, F32)
    for cut in (1, 2, 3):  # the last row sees one target, the one before it two, ...
        tail = tk.softcapped_cross_entropy_reference(logits[-cut:], targets[-cut:], weights[:cut], 1.0, F32)
        for part, full in zip(tail, whole, strict=True):
            torch.testing.assert_close(part, full[-cut:])


def test_reference_under_torch_compile():
    args = inputs(600, 1000, 2)  # two parts when run eagerly, one when compiled
    compiled = torch.compile(tk.softcapped_cross_entropy_reference, fullgraph=True, backend="aot_eager")
    expected = tk.softcapped_cross_entropy_reference(*args, 1.0, F32)
    for part, full in zip(compiled(*args, 1.0, F32), expected, strict=True):
        torch.testing.assert_close(part, full)


########################################################################################################################
#                                                      The kernel                                                      #
########################################################################################################################


@pytest.mark.skipif(not TRITON or CUDA or INTERPRETED, reason="needs triton, and is of use only without CUDA")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-k", "kernel_"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, f"\n{done.stdout}\n{done.stderr}"


@runs_kernel
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 40), (3, 257), (17, 1000), (2, 9001)])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_kernel_matches_reference(tokens, vocab, k, dtype):
    assert_matches_reference(inputs(tokens, vocab, k, dtype, DEVICE), 0.37, dtype)


@runs_kernel
def test_kernel_at_random_shapes():
    generator = torch.Generator().manual_seed(0)
    for seed in range(10):
        limits = ((1, 9), (30, 6000), (1, tk.MAX_TARGETS + 1))
        tokens, vocab, k = (int(torch.randint(low, high, (), generator=generator)) for low, high in limits)
        assert_matches_reference(inputs(tokens, vocab, k, F32, DEVICE, seed=seed), 2.0, F32)


@runs_kernel
@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_kernel_of_few_columns(vocab):
    args = inputs(3, vocab, 2, F32, DEVICE)
    out = tk.softcapped_cross_entropy_kernel(*args, 1.0, F32)
    for part, expected in zip(out, plain(*args, 1.0), strict=True):
        # Probabilities near 1 cancel against their weight, so only the absolute error is small.
        torch.testing.assert_close(part.double(), expected, atol=1e-5, rtol=0)


@runs_kernel
@pytest.mark.parametrize("grad_dtype", [F32, F16, F8])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_kernel_takes_every_target_and_grad_dtype(index_dtype, grad_dtype):
    assert_matches_reference(inputs(5, 300, 2, F16, DEVICE, index_dtype=index_dtype), 8.0, grad_dtype)


@runs_kernel
def test_kernel_clamps_e5m2():
    logits, targets, weights = inputs(5, 300, 2, F32, DEVICE)
    _, grad = tk.softcapped_cross_entropy_kernel(logits, targets, weights, 1e8, F8)
    assert grad.float().isfinite().all()
    assert grad.float().abs().max() == tk.E5M2_MAX


@runs_kernel
def test_kernel_at_extreme_logits():
    logits, targets, weights = inputs(8, 300, 3, F16, DEVICE)
    logits[0], logits[1], logits[2] = 65504, -65504, 0
    logits[3:, ::2], logits[3:, 1::2] = -300, 60
    assert_matches_reference((logits, targets, weights), 1.0, F32)


@runs_kernel
def test_kernel_shows_a_nan():
    logits, targets, weights = inputs(3, 300, 1, F32, DEVICE)
    logits[1, 7] = float("nan")
    for function in (tk.softcapped_cross_entropy_kernel, tk.softcapped_cross_entropy_reference):
        losses, grad = function(logits, targets, weights, 1.0, F8)
        assert losses.isnan().tolist() == [False, True, False]
        assert grad.float().isnan().any(1).tolist() == [False, True, False]


@needs_cuda
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("grad_dtype", [BF16, F8])
def test_kernel_at_real_width(k, grad_dtype):
    assert_matches_reference(inputs(1024, 50_304, k, BF16, DEVICE), 16.0, grad_dtype)


@needs_cuda
def test_kernel_beyond_int32_elements():
    rows = 43_000  # * 50,304 > 2^31; bf16 in, e5m2 out: 6.5 GB
    logits = torch.randn(rows, 50_304, dtype=BF16, device=DEVICE)
    targets = torch.randint(50_304, (rows,), device=DEVICE)
    weights = torch.tensor([1.0, 0.5], device=DEVICE)
    losses, grad = tk.softcapped_cross_entropy(logits, targets, weights, 1e4, F8)
    expected = tk.softcapped_cross_entropy_reference(logits[-64:].double(), targets[-64:], weights, 1e4, F64)
    assert_close(losses[-64:], expected[0], TOLERANCE[F32])
    assert_close(grad[-64:].float(), expected[1], TOLERANCE[F8])


@needs_cuda
def test_kernel_under_torch_compile():
    args = inputs(64, 1000, 2, BF16, DEVICE)

    def doubled(logits, targets, weights):
        losses, grad = tk.softcapped_cross_entropy(logits * 2, targets, weights, 16.0, F8)
        return losses.mean(), grad

    loss, grad = torch.compile(doubled, fullgraph=True)(*args)
    expected_loss, expected_grad = doubled(*args)
    torch.testing.assert_close(loss, expected_loss)
    assert torch.equal(grad.float(), expected_grad.float())


########################################################################################################################
#                                            Dispatch, errors, no Triton                                               #
########################################################################################################################


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
def test_operator_gives_shapes_without_running():
    args = (torch.empty(5, 7, dtype=BF16), torch.empty(5, dtype=torch.int64), torch.empty(2))
    losses, grad = tk.softcapped_cross_entropy_kernel(*(x.to("meta") for x in args), 1.0, F8)
    assert (losses.shape, losses.dtype) == ((5,), F32)
    assert (grad.shape, grad.dtype) == ((5, 7), F8)


def test_cpu_takes_the_reference():
    assert not tk.kernels_available("cpu")
    args = inputs(3, 20, 2)
    out = tk.softcapped_cross_entropy(*args, 1.0, F32)
    for a, b in zip(out, tk.softcapped_cross_entropy_reference(*args, 1.0, F32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 4, 5)}, r"shape \(2, 4, 5\): flatten"),
        ({"logits": torch.zeros(5, 4).T}, r"strides \(1, 4\).*contiguous"),
        ({"logits": torch.zeros(0, 5), "targets": torch.zeros(0, dtype=torch.int64)}, r"shape \(0, 5\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets have shape \(3,\).*shape \(4,\)"),
        ({"targets": torch.zeros(4)}, r"targets are torch.float32: convert"),
        ({"weights": torch.zeros(0)}, r"weights have shape \(0,\).*K <= 4"),
        ({"weights": torch.zeros(5)}, r"weights have shape \(5,\).*K <= 4"),
        ({"weights": torch.zeros(2, dtype=F64)}, r"weights are torch.float64: convert"),
        ({"weights": torch.zeros(2, device="meta")}, r"on cpu, cpu, meta: move"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"logits": torch.zeros(4, 5), "targets": torch.zeros(4, dtype=torch.int64), "weights": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        tk.softcapped_cross_entropy(**(good | change), grad_scale=1.0, grad_dtype=F32)


@runs_kernel
def test_kernel_names_wrong_dtypes():
    logits, targets, weights = inputs(3, 20, 2, F64, DEVICE)
    with pytest.raises(ValueError, match="logits are torch.float64: convert"):
        tk.softcapped_cross_entropy_kernel(logits, targets, weights, 1.0, F32)
    with pytest.raises(ValueError, match="grad_dtype is torch.float64: pass one of"):
        tk.softcapped_cross_entropy_kernel(logits.float(), targets, weights, 1.0, F64)


def test_file_works_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # makes "import triton" raise ImportError
import torch, triton_kernels as tk
assert tk.triton is None and not tk.kernels_available("cuda")
args = torch.zeros(3, 5), torch.tensor([0, 1, 2]), torch.ones(2)
losses, grad = tk.softcapped_cross_entropy(*args, 1.0, torch.float32)
assert losses.isfinite().all() and grad.shape == (3, 5)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
