"""What holds for the attention kernels, forward and gradients, against the reference in float64."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import moved

import triton_kernels as tk

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
KINDS = [{}, {"paired": True}, {"key_offset": True}, {"gated": True}, {"gated": True, "paired": True},
         {"gated": True, "key_offset": True}, {"paired": True, "key_offset": True}]


def attention_inputs(lengths, heads, width, v_width, dtype, rotary=False, gated=False, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    tokens = sum(lengths)
    angles = torch.rand(2 * tokens + 3, width // 4, generator=draw) * 6
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *[tokens] * 3], dtype=torch.int32)
    tensors = {"qk": normal(tokens, 2 * heads * width), "v": normal(tokens, heads * v_width),
               "cos": angles.cos().to(DEVICE, dtype) if rotary else None,
               "sin": angles.sin().to(DEVICE, dtype) if rotary else None,
               "gate": torch.rand(tokens, heads, generator=draw).to(DEVICE, dtype) if gated else None}
    return tensors, tk.documents(cu_seqlens.to(DEVICE), max(lengths), tokens)


def differentiate(function, tensors, where, dout, *args, **options):
    """The output, and the gradient of every input that has one, by name."""
    leaves = {name: x if x is None or name in ("cos", "sin") else x.detach().clone().requires_grad_()
              for name, x in tensors.items()}
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    out = function(leaves.pop("qk"), leaves.pop("v"), where, *args, **leaves, **options)
    grads = torch.autograd.grad(out, wanted.values(), dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def poison(tensors):
    """NaN in the memory that the next allocations of these sizes are likely to be given."""
    blocks = [torch.full_like(x, float("nan")) for x in tensors.values() if x is not None for _ in range(3)]
    del blocks


def assert_is_reference(lengths, heads, width, v_width, dtype, window, scale=0.1, paired=False, key_offset=False,
                        seed=0, function=tk.attention, size=1.0, **kinds):
    tensors, where = attention_inputs(lengths, heads, width, v_width, dtype, seed=seed, **kinds)
    tensors["qk"] *= size
    dout = torch.randn(sum(lengths), heads * v_width, generator=torch.Generator().manual_seed(seed + 1))
    args, options = (heads, window, scale), {"paired": paired, "key_offset": key_offset}
    doubles = {name: x if x is None else x.double() for name, x in tensors.items()}
    expected = differentiate(tk.attention_reference, doubles, where, dout.to(DEVICE), *args, **options)
    poison(tensors)
    found = differentiate(function, tensors, where, dout.to(DEVICE, dtype), *args, **options)
    for name, want in expected.items():
        got = found[name]
        assert got.dtype == dtype and got.shape == want.shape and got.isfinite().all(), name
        alone = name == "qk" and (window == 0 or max(lengths) == 1)  # each row sees itself: no gradient
        beside = expected["v"] if alone else want
        error = (got.double() - want).norm() / beside.norm().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e} is above {TOLERANCE[dtype]:.0e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(128, 128), (64, 64), (64, 128), (128, 64)], ids=str)
def test_every_pair_of_widths(widths, dtype):
    assert_is_reference([1, 60, 1, 1, 87], 2, *widths, dtype, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_norm_rotation_offset_gate_and_pairs(kinds, dtype):
    assert_is_reference([30, 1, 39], 2, 64, 64, dtype, 20, rotary=True, **kinds)


def test_pairs_of_heads_have_documents_longer_than_a_tile():
    assert_is_reference([150, 50], 2, 64, 64, DTYPES[0], 500, rotary=True, paired=True)


@pytest.mark.parametrize("lengths", [[1], [1] * 70, [64, 64], [63, 1, 65], [130]], ids=str)
@pytest.mark.parametrize("window", [0, 1, 64, 500])
def test_borders_of_tiles_documents_and_windows(lengths, window):
    assert_is_reference(lengths, 1, 64, 64, DTYPES[0], window)


@pytest.mark.parametrize("window", [60, 500] if CUDA else [500])
def test_documents_may_begin_at_every_row_of_a_tile(window):
    """Row by row: a key too many or too few in one row of a tile would be lost in a norm over all."""
    tensors, where = attention_inputs([129] * tk.TILE, 1, 64, 64, DTYPES[0])
    dout = torch.randn(len(tensors["v"]), 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    doubles = {name: x if x is None else x.double() for name, x in tensors.items()}
    expected = differentiate(tk.attention_reference, doubles, where, dout.double(), 1, window, 0.1)
    found = differentiate(tk.attention, tensors, where, dout, 1, window, 0.1)
    for name, want in expected.items():
        sizes = want.norm(dim=1)  # the first keys of a document have gradients many times the mean
        error = (found[name].double() - want).norm(dim=1) / sizes.clamp(min=sizes.mean())
        assert error.max() <= 3 * TOLERANCE[DTYPES[0]], f"{name}: row {error.argmax()} is wrong by {error.max():.2e}"


@pytest.mark.parametrize("heads, kinds", [(3, {}), (5, {"gated": True, "key_offset": True}), (6, {"paired": True})])
def test_any_number_of_heads(heads, kinds):
    assert_is_reference([9, 1, 25], heads, 64, 64, DTYPES[0], 12, rotary=True, **kinds)


def test_tensors_may_begin_and_gradients_lie_anywhere():
    """Descriptors want multiples of 16 bytes: what lies elsewhere is copied."""
    tensors, where = attention_inputs([20, 1, 49], 2, 64, 64, DTYPES[0], gated=True)
    dout, args = torch.randn(128).to(DEVICE, DTYPES[0]), (2, 30, 0.1)
    expected = differentiate(tk.attention, tensors, where, dout.repeat(70, 1), *args)
    found = differentiate(tk.attention, tensors, where, moved(dout.repeat(70, 1)), *args)
    spread = differentiate(tk.attention, tensors, where, dout.repeat_interleave(2).repeat(70, 1)[:, ::2], *args)
    assert all(torch.equal(x, found[name]) and torch.equal(x, spread[name]) for name, x in expected.items())
    qk, v, gate = (tensors[name] for name in ("qk", "v", "gate"))
    assert torch.equal(tk.attention(moved(qk), moved(v), where, *args, gate=moved(gate)), expected["out"])
    one = tk.documents(torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), 1, 1)
    row = torch.cat((qk[:1], qk[:1, :1]), 1)[:, :-1]  # contiguous, of a row 2 bytes longer
    assert row.is_contiguous() and torch.equal(tk.attention(row, v[:1], one, *args), v[:1])


@pytest.mark.parametrize("kinds", [{}, {"gated": True, "paired": True}], ids=str)
def test_pairs_and_gates_without_rotation(kinds):
    assert_is_reference([50, 31], 2, 64, 64, DTYPES[0], 25, **kinds)


def test_small_rows_are_normed_with_float32_s_epsilon_in_every_dtype():
    assert_is_reference([40], 1, 64, 64, DTYPES[0], 50, rotary=True, size=1e-3)


def test_large_scores_need_the_running_maximum():
    """Scores up to 64 here: exp of them, and their sum, overflow float16 and rounded keys move them by 64 / 2048."""
    assert_is_reference([90], 1, 64, 64, DTYPES[1], 50, scale=3.0)
    assert_is_reference([90], 1, 64, 64, DTYPES[1], 50, scale=1.0, rotary=True)


@pytest.mark.parametrize("dtype, sign, scale", [(torch.float16, 1, 0.1), (torch.float16, -1, 0.2), (DTYPES[0], 1, 0.7),
                                                (DTYPES[0], 1, 1.0)])
def test_normed_rows_that_are_alike_need_the_running_maximum(dtype, sign, scale):
    """Their scores reach scale * width: exp of 12.8 and -25.6 would leave float16, exp of 89.6 and 128 float32."""
    q, v = torch.randn(2, 60, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    where = tk.documents(torch.arange(61, dtype=torch.int32, device=DEVICE), 1, 60)  # of one token: the output is v
    cos = torch.ones(60, 32, device=DEVICE, dtype=dtype)
    assert torch.equal(tk.attention(torch.cat((q, sign * q), 1), v, where, 1, 5, scale, cos, 0 * cos), v)


def test_the_widest_window_is_all_of_the_documents():
    tensors, where = attention_inputs([60, 75], 2, 64, 64, DTYPES[0], rotary=True)
    dout = torch.randn(135, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wide, all_of_it = (differentiate(tk.attention, tensors, where, dout, 2, window, 0.1)
                       for window in (2**30, 2 * tk.SMALL_WINDOW))
    assert all(torch.equal(x, all_of_it[name]) for name, x in wide.items())


def test_a_gate_of_zero_gives_zeros():
    tensors, where = attention_inputs([40], 2, 64, 64, DTYPES[0], rotary=True, gated=True)
    tensors["gate"][3:20] = 0
    found = differentiate(tk.attention, tensors, where, torch.ones(40, 128, device=DEVICE), 2, 30, 0.1)
    assert all((found[name][3:20] == 0).all() for name in ("out", "gate"))
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("seed", range(12) if CUDA else range(46, 50))  # four of which each kind is there
def test_random_shapes(seed):
    draw = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    longest = pick(1, 7, 300, 2048) if CUDA else pick(1, 30, 90)
    total = int(torch.randint(1, 6000 if CUDA else 120, (), generator=draw))
    lengths = []
    while sum(lengths) < total:
        lengths.append(min(int(torch.randint(1, longest + 1, (), generator=draw)), total - sum(lengths)))
    rotary = pick(False, True)
    assert_is_reference(lengths, pick(2, 6) if CUDA else 2, pick(64, 128), pick(64, 128), DTYPES[0],
                        pick(1, 20, 128, 384, 1408) if CUDA else pick(1, 3, 20, 384), rotary=rotary,
                        gated=pick(False, True), paired=pick(False, True), key_offset=rotary and pick(False, True),
                        seed=seed)


@needs_cuda
def test_long_batches_of_real_shape():
    lengths = [896, 1, 40, 500, 2048, 2048, 300, 1200] * 3
    assert_is_reference(lengths, 6, 128, 128, torch.bfloat16, 384, rotary=True, gated=True)


@needs_cuda
def test_the_library_is_the_reference():
    for kinds in KINDS:
        assert_is_reference([300, 1, 39, 700], 2, 64, 64, torch.bfloat16, 100, rotary=True,
                            function=tk.attention_library, **kinds)


@needs_cuda
def test_compiled_and_eager_are_one():
    tensors, where = attention_inputs([300, 1, 39, 700], 2, 64, 64, torch.bfloat16, True, True)
    dout, args = torch.randn(1040, 128, device=DEVICE), (2, 100, 0.1)
    compiled = torch.compile(tk.attention, fullgraph=True)
    eager = differentiate(tk.attention, tensors, where, dout, *args, key_offset=True)
    for name, x in differentiate(compiled, tensors, where, dout, *args, key_offset=True).items():
        assert (x.double() - eager[name].double()).norm() <= 1e-2 * eager[name].double().norm(), name


@pytest.mark.parametrize("window, paired, lengths", [(40, True, (1, 2, 2)), (500, False, (1, 2, 2)),
                                                      (500, True, (1, 2, 2)), (40, True, (5,))])
def test_tiles_outside_document_and_window_are_never_loaded(window, paired, lengths):
    """NaN there, which a probability of 0 would not stop, reaches nothing of the third tile, in whose document the
    window bounds what comes before and after. The tile after it is spared: one that holds the last rows may jut out."""
    tile = tk.TILE
    tensors, where = attention_inputs([n * tile for n in lengths], 1 + paired, 64, 64, DTYPES[0], rotary=True)
    near, last = slice(max(2 * tile - window, tile), 4 * tile), slice(2 * tile, 3 * tile)
    for name in ("qk", "v"):
        kept = tensors[name][near].clone()
        tensors[name].fill_(float("nan"))[near] = kept
    dout = torch.ones(5 * tile, 64 * (1 + paired), device=DEVICE)
    found = differentiate(tk.attention, tensors, where, dout, 1 + paired, window, 0.1, paired=paired)
    assert all(found[name][last].isfinite().all() for name in ("out", "qk", "v"))


def test_attention_is_registered_properly():  # of whole tiles: what lies after the last row is left as it was
    tensors, where = attention_inputs([20, 12], 2, 64, 64, DTYPES[0], rotary=True, gated=True)
    qk, v, gate = (tensors[name].detach().requires_grad_() for name in ("qk", "v", "gate"))
    args = qk, v, where.first, where.last, 2, 20, 0.1, tensors["cos"], tensors["sin"], gate, True, True
    torch.library.opcheck(tk._attention, args)


def test_attention_is_an_operator_of_symbolic_sizes():
    compiled = torch.compile(tk.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for heads, options in ((2, {}), (4, {"paired": True, "key_offset": True})):
        tensors, where = attention_inputs([10, 9], heads, 64, 64, DTYPES[0], rotary=True, gated=True)
        args = tensors.pop("qk"), tensors.pop("v"), where, heads, 20, 0.1
        assert torch.equal(compiled(*args, **tensors, **options), tk.attention(*args, **tensors, **options))


def test_two_runs_are_bitwise_one():
    tensors, where = attention_inputs([100, 60], 2, 64, 64, DTYPES[0], rotary=True, gated=True)
    first, second = (differentiate(tk.attention, tensors, where, torch.ones(160, 128, device=DEVICE), 2, 50, 0.1)
                     for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def many_documents(copies, rows, heads, dtype):
    """`copies` of one document give each the same, and what the reference gives one."""
    one, where = attention_inputs([rows], heads, 128, 128, dtype, rotary=True, gated=True)
    one, dout = {name: x[:rows] for name, x in one.items()}, torch.randn(rows, heads * 128, device=DEVICE, dtype=dtype)
    expected = differentiate(tk.attention_reference, {name: x.double() for name, x in one.items()}, where,
                             dout.double(), heads, 384, 0.1)
    starts = torch.arange(0, copies * rows + 1, rows, dtype=torch.int32, device=DEVICE)
    found = differentiate(tk.attention, {name: x.repeat(copies, 1) for name, x in one.items()},
                          tk.documents(starts, rows, copies * rows), dout.repeat(copies, 1), heads, 384, 0.1)
    for name, want in expected.items():
        first, last = found[name][:rows], found[name][-rows:]
        assert torch.equal(first, last), name
        assert (last.double() - want).norm() <= TOLERANCE[dtype] * want.norm(), name


def test_attention_of_copies_of_a_document():
    many_documents(3, 2 * tk.TILE, 1, DTYPES[0])


@pytest.mark.skipif(not CUDA or torch.cuda.get_device_properties(0).total_memory < 60e9, reason="needs a GPU of 60 GB")
def test_attention_beyond_int32_elements():
    many_documents(1366, 1024, 6, torch.bfloat16)  # * 2 * 128 > 2^31


@needs_cuda
def test_a_kernel_may_be_the_first_work_of_a_thread():
    tensors, where = attention_inputs([100, 60], 2, 64, 64, torch.bfloat16)
    args = tensors["qk"], tensors["v"], where, 2, 50, 0.1
    expected = tk.attention(*args)
    with ThreadPoolExecutor(1) as thread:  # it has no CUDA context yet, like autograd's
        assert torch.equal(thread.submit(tk.attention, *args).result(), expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"qk": torch.zeros(5, 128)}, r"qk must be .*widths of heads of it and v 64 or 128.*of shape \(5, 128\)"),
    ({"v": torch.zeros(5, 64)}, r"qk must be .*widths of heads of it and v 64 or 128"),
    ({"qk": torch.zeros(5, 255)}, r"qk must be \(T, 2 \* 2 \* W\).*of shape \(5, 255\)"),
    ({"v": torch.zeros(4, 128)}, r"v must be \(5, 2 \* V\).*of shape \(4, 128\)"),
    ({"v": torch.zeros(5, 127)}, r"v must be \(5, 2 \* V\).*of shape \(5, 127\)"),
    ({"heads": 1, "paired": True}, "there are 1 heads: take 1 or more, and an even number to pair them"),
    ({"heads": 0}, "there are 0 heads"),
    ({"heads": -2}, "there are -2 heads"),
    ({"qk": torch.zeros(0, 256), "v": torch.zeros(0, 128)}, r"qk must be .*not 0.*of shape \(0, 256\)"),
    ({"scale": float("inf")}, "the scale inf: take"),
    ({"key_offset": True}, "key_offset needs them"),
    ({"cos": torch.zeros(5, 16)}, "cos and sin are a pair"),
    ({"gate": torch.zeros(5, 3)}, r"gate must be \(5, 2\).*of shape \(5, 3\)"),
    ({"window": -1}, r"the window is -1 and the scale 0.1: take 0 to 2\*\*30, and 1e-9 to 1e9"),
    ({"window": 2**31 - 1}, "the window is 2147483647"),
    ({"scale": 0.0}, "the window is 3 and the scale 0.0"),
    ({"scale": 1e30}, r"the scale 1e\+30: take"),
    ({"scale": 1e-12}, r"the scale 1e-12: take"),
    ({"v": None}, r"v must be \(5, 2 \* V\).*, not None"),
    ({"documents": tk.documents(torch.tensor([0, 3], dtype=torch.int32, device=DEVICE), 3, 3)},
     r"what documents made must be \(5,\).*of shape \(3,\)"),
    ({"documents": tk.documents(torch.tensor([0, 5], device=DEVICE), 5, 5)}, "torch.int32, not torch.int64"),
    ({"cos": torch.zeros(3, 16), "sin": torch.zeros(5, 16)}, r"start of cos must be \(5, 16\).*of shape \(3, 16\)"),
    ({"cos": torch.zeros(()), "sin": torch.zeros(())}, r"start of cos must be \(5, 16\).*of shape \(\)"),
    ({"cos": torch.zeros(5, 16), "sin": torch.zeros(5, 16), "paired": True}, r"start of cos must be \(10, 16\)"),
    ({"qk": torch.zeros(5, 24), "cos": torch.zeros(5, 1), "sin": torch.zeros(5, 1)}, "W with cos a multiple of 4"),
])
def test_wrong_arguments_are_named(change, message):
    where = tk.documents(torch.tensor([0, 5], dtype=torch.int32, device=DEVICE), 5, 5)
    good = {"qk": torch.zeros(5, 256), "v": torch.zeros(5, 128), "documents": where, "heads": 2, "window": 3,
            "scale": 0.1}
    arguments = {name: value.to(DEVICE, DTYPES[0]) if isinstance(value, torch.Tensor) else value
                 for name, value in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        tk.attention(**arguments)
    if "widths" not in message:  # the reference takes any
        with pytest.raises(ValueError, match=message):
            tk.attention_reference(**arguments)


def test_the_kernels_refuse_float64():
    where = tk.documents(torch.tensor([0, 5], dtype=torch.int32, device=DEVICE), 5, 5)
    qk, v = (torch.zeros(5, columns, dtype=torch.float64, device=DEVICE) for columns in (128, 64))
    with pytest.raises(ValueError, match="qk must be .*bfloat16 or torch.float16.*, not torch.float64"):
        tk.attention(qk, v, where, 1, 3, 0.1)
