"""The trainer's GPU kernels, written in Triton (one in Gluon), each beside the plain PyTorch reference that defines it.

A section has its equation, shapes, dtypes and sources; NAME_reference, of the same arguments; the kernels; and NAME,
its public function. A shape, layout, device or dtype that a section does not list raises ValueError. `choose`, the last
section, picks a run's functions for its GPU (NAME alone launches on any, the current one). Measured: records/NOTES.md
(9: norms and residual mixing by hand took 3% more to 7% less; torch.compile has them). It imports without Triton. Under
TRITON_INTERPRET=1, set before triton is imported, operators take CPU tensors, but no bf16, and round to FP8 wrongly.
"""
import functools
import os
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = SimpleNamespace(constexpr=lambda value: value, jit=lambda function: function)
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
except ImportError:  # no wheel for this platform: the references carry on alone
    triton, tl, jit = None, PLAIN, PLAIN.jit
try:  # experimental: where a Triton has it not, the kernels in Triton itself carry on alone
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
except ImportError:
    gluon, gl = PLAIN, PLAIN

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_available(device: torch.device | str) -> bool:
    """Whether this file's operators run on `device`; each public function takes its reference where they do not."""
    return triton is not None and (INTERPRETED or torch.device(device).type == "cuda")


def operation(reference: Callable, outputs: Callable, dtypes: Sequence[torch.dtype] = (), changes: Sequence[str] = ()):
    """Decorates the function NAME that launches an operation's kernels. NAME.kernel becomes an operator, which
    torch.compile takes whole, with results like those of `outputs`, writing to its arguments `changes`. NAME is it
    where it runs and the first tensor has one of `dtypes`, if any, else `reference`; it is not differentiable."""
    def decorate(launch: Callable) -> Callable:
        operator = torch.library.custom_op(f"speedrun::{launch.__name__}", launch, mutates_args=changes)
        operator.register_fake(outputs)

        @torch.no_grad()
        @functools.wraps(launch)
        def function(*args, **options):
            first = [x for x in (*args, *options.values()) if isinstance(x, Tensor)][0]
            runs = kernels_available(first.device) and (not dtypes or first.dtype in dtypes)
            return (operator if runs else reference)(*args, **options)
        function.kernel = operator
        return function
    return decorate


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E4M3_MAX, E5M2_MAX = 448.0, 57344.0  # the largest finite values, above which a cast alone gives NaN or inf
# PTX from four floats to a word of FP8, saturated: Triton 3.6 writes wrong bytes when it packs converted ones anew.
E4M3_WORD, E5M2_WORD = (tl.constexpr(
    f"{{ .reg .b16 low, high; cvt.rn.satfinite.{name}x2.f32 low, $2, $1; "
    f"cvt.rn.satfinite.{name}x2.f32 high, $4, $3; mov.b32 $0, {{low, high}}; }}") for name in ("e4m3", "e5m2"))


def _expect(name: str, x: Tensor | None, shape: tuple[int | str, ...], dtypes: Sequence[torch.dtype],
            device: torch.device | None = None, fits: bool = True, rule: str = "", optional: bool = False) -> None:
    """ValueError, with all that x should be and is, unless it is None where it is optional, or contiguous, of `shape`
    (a letter is any size but 0), one of dtypes, on device, and fits the rule."""
    if x is None and optional:
        return
    whole = isinstance(x, Tensor) and x.ndim == len(shape) and all(
        n > 0 if isinstance(size, str) else n == size for n, size in zip(x.shape, shape, strict=True))
    if not (whole and fits and x.is_contiguous() and x.dtype in dtypes and x.device == (device or x.device)):
        wanted = str(tuple(shape)).replace("'", "") + ", not 0" * any(isinstance(size, str) for size in shape) + rule
        found = repr(x) if not isinstance(x, Tensor) else (
            f"{x.dtype} of shape {tuple(x.shape)} with strides {x.stride()} on {x.device}")
        raise ValueError(f"{name} must be {wanted}, contiguous{f', on {device}' if device else ''}, "
                         f"{' or '.join(map(str, dtypes))}, not {found}.")


def _aligned(x: Tensor) -> Tensor:
    """x, or where it or a row does not start at a multiple of 16 bytes, as descriptors want, a copy. Triton 3.6 makes
    them without a CUDA context in a new thread, such as autograd's: any call binds one."""
    fits = x.data_ptr() % 16 == x.stride(0) * x.itemsize % 16 == 0
    if x.is_cuda:
        torch.cuda.is_current_stream_capturing()
    return x if fits else x.new_empty(x.shape).copy_(x)


def _multiprocessors(x: Tensor) -> int:  # the interpreter gets a few programs, so that each has several tiles
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


# --- Causal attention over packed documents with a left window --------------------------------------------------------
#     out_i = gate_i * sum_j softmax_j(scale * q_i . k_j) v_j   over j <= i <= j + window in i's document
# qk          (T, 2 H W)        rows of H query heads, then H key heads of width W, 64 or 128
# v           (T, H V)          H value heads of width V, 64 or 128
# documents   Documents         made once a batch of T tokens by `documents`; window 0 to 2^30, scale 1e-9 to 1e9
# cos, sin    (>= rows, W / 4)  or None: of angles. With them q and k are RMS-normed (eps 2^-23), then channel j turns
#                               with channel j + W / 4, and the second half of the channels stands still
# gate        (T, H)            above 0, in fp16 1e-4 (its logarithm joins the log-sum-exp; at 0 no gradient); None: 1
# paired                        token t becomes rows 2t and 2t + 1 of a sequence with half of the heads each
# key_offset                    the still half of a key is that of the row before; the first row keeps its own
# out         (T, H V)
# All contiguous, of one dtype, bf16 or fp16 (interpreter: fp16, fp32; reference: any, any widths of 4n); sums are fp32.
# Differentiable by qk, v and gate; deterministic. Sources: FlashAttention-2 (arXiv 2307.08691); QK-norm (2302.05442);
# rotary embedding (2104.09864), half-truncated in modded-nanogpt's record #20; gates #28; key offset #49; pairs #58.


class Documents(NamedTuple):
    """Where the documents of a packed batch lie; `documents` makes it."""
    cu_seqlens: Tensor  # (N + 1,) int32 starts of the documents and T, padded with T
    max_doc: int        # the longest document or a bound on it
    first: Tensor       # (T,) int32, start of each token's document
    last: Tensor        # (T,) int32, its end (exclusive)


def documents(cu_seqlens: Tensor, max_doc: int, tokens: int) -> Documents:
    """From starts that ascend from 0 to `tokens`, int32; not checked, which would wait for the GPU."""
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    index = torch.searchsorted(cu_seqlens, position, right=True)
    return Documents(cu_seqlens, max_doc, cu_seqlens[index - 1], cu_seqlens[index])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, H, W), cos and sin (rows, W / 4)."""
    a, b, still = x.split((x.size(-1) // 4, x.size(-1) // 4, x.size(-1) // 2), dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, still), dim=-1)


def softmax_by_blocks(q, k, v, documents, parts, window, scale, block) -> Tensor:
    """Memory grows with block * (block + window), not with T * T."""
    out, position = [], torch.arange(len(q), device=q.device)
    lowest = torch.maximum(documents.first.repeat_interleave(parts) * parts, position - window)
    for start in range(0, len(q), block):
        queries, keys = slice(start, start + block), slice(max(0, start - window), start + block)
        seen = (position[None, keys] <= position[queries, None]) & (position[None, keys] >= lowest[queries, None])
        part = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        out.append(F.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(out)


def attention_reference(qk: Tensor, v: Tensor, documents: Documents, heads: int, window: int, scale: float,
                        cos: Tensor | None = None, sin: Tensor | None = None, gate: Tensor | None = None,
                        paired: bool = False, key_offset: bool = False, block: int = 512,
                        softmax: Callable = softmax_by_blocks) -> Tensor:
    """The definition. softmax gets q, k (rows, H', W) and v (rows, H', V) and returns (rows, H', V)."""
    _check_attention(qk, v, documents.first, documents.last, heads, window, scale, cos, sin, gate, paired, key_offset)
    parts = 1 + paired
    q, k, v = (x.reshape(len(x) * parts, heads // parts, -1) for x in (*qk.chunk(2, dim=1), v))
    if cos is not None:
        q, k = (rotate(F.rms_norm(x, x.shape[2:], eps=2**-23), cos[:len(x)], sin[:len(x)]) for x in (q, k))
    if key_offset:
        turning, still = k.chunk(2, dim=-1)
        k = torch.cat((turning, torch.cat((still[:1], still[:-1]))), dim=-1)
    out = softmax(q, k, v, documents, parts, window, scale, block).reshape(len(qk), heads, -1)
    return (out if gate is None else out * gate[:, :, None]).flatten(1)


def attention_library(*args, **options) -> Tensor:
    """The same through PyTorch's FlashAttention: bf16 or fp16, W = V, compute capability 8.0 and up."""
    from torch.nn.attention.varlen import varlen_attn
    def softmax(q, k, v, documents, parts, window, scale, _):
        starts, longest = documents.cu_seqlens * parts, documents.max_doc * parts
        return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(window, 0))
    return attention_reference(*args, **options, softmax=softmax)


def _check_attention(qk, v, first, last, heads, window, scale, cos, sin, gate, paired, key_offset) -> None:
    if heads < 1 or paired and heads % 2:
        raise ValueError(f"there are {heads} heads: take 1 or more, and an even number to pair them.")
    if not (0 <= window <= 2**30 and 1e-9 <= scale <= 1e9):
        raise ValueError(f"the window is {window} and the scale {scale}: take 0 to 2**30, and 1e-9 to 1e9.")
    if (cos is None) != (sin is None) or key_offset and cos is None:
        raise ValueError("cos and sin are a pair, and key_offset needs them: pass both.")
    whole = qk.shape[-1] % (2 * heads * (1 if cos is None else 4)) == 0 if qk.ndim else False
    _expect("qk", qk, ("T", f"2 * {heads} * W"), (qk.dtype,), None, whole, ", W with cos a multiple of 4")
    tokens, rows, width, same = len(qk), len(qk) * (1 + paired), qk.size(1) // (2 * heads), ((qk.dtype,), qk.device)
    _expect("v", v, (tokens, f"{heads} * V"), *same, isinstance(v, Tensor) and v.shape[-1:].numel() % heads == 0)
    _expect("gate", gate, (tokens, heads), *same, optional=True)
    for x in (first, last):
        _expect("what documents made", x, (tokens,), (torch.int32,), qk.device)
    for name, x in (("start of cos", cos), ("start of sin", sin)):  # they may be longer
        _expect(name, x if x is None or x.ndim == 0 else x[:rows], (rows, width // 4), *same, optional=True)


# Measured on an H200 at widths of 128: wider tiles, 8 warps and loops split at the masked part were all slower.
TILE, SMALL_WINDOW = 64, 128
TO_LOG2, NORM_EPS = tl.constexpr(1.4426950408889634), tl.constexpr(1.1920928955078125e-07)  # the latter 2^-23


@jit
def _within(distance, limit):
    """0 <= distance <= limit, in one comparison."""
    return distance.to(tl.uint32, bitcast=True) <= limit.to(tl.uint32, bitcast=True)


@jit
def _rstd(x, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, 1) / WIDTH + NORM_EPS)[:, None]


@jit
def _turn_rows(x, cos_ptr, sin_ptr, rows, inside, SIGN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`rotate`, or where SIGN is -1 its reverse."""
    cols = tl.arange(0, WIDTH)[None, :]
    at, turning = rows[:, None] * (WIDTH // 4) + cols % (WIDTH // 4), inside & (cols < WIDTH // 2)
    cos = tl.load(cos_ptr + at, mask=turning, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=turning, other=0.0).to(tl.float32)
    partner = tl.reshape(tl.flip(tl.reshape(x, (ROWS, 2, 2, WIDTH // 4)), 2), (ROWS, WIDTH))  # quarters exchanged
    return x * cos + partner * tl.where(cols < WIDTH // 4, SIGN * sin, -SIGN * sin)


@jit
def _store_gradient(grad, raw_ptr, grad_ptr, cos_ptr, sin_ptr, rows, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """With cos, from the gradient of the normed and turned rows back to that of the raw ones."""
    cols = tl.arange(0, WIDTH)[None, :]
    if cos_ptr is not None:
        grad = _turn_rows(grad, cos_ptr, sin_ptr, rows, inside, -1, ROWS, WIDTH)
        x = tl.load(raw_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = _rstd(x, WIDTH)
        x *= rstd
        grad = rstd * (grad - x * (tl.sum(grad * x, 1) / WIDTH)[:, None])
    tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@jit
def _attention_prepare(qk_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, grad_ptr, T, HEADS: tl.constexpr, PARTS: tl.constexpr,
                       WIDTH: tl.constexpr, OFFSET: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr = 16):
    """One program: BLOCK tokens of one head of Q or K, from the packed rows to a tensor of its own; with grad_ptr the
    way back, of K: the gradient of that tensor is in k_ptr, and that of the packed rows goes to grad_ptr."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    section, head = FIRST + tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    HELD: tl.constexpr = HEADS // PARTS  # heads of a row
    rows, cols = tokens * PARTS + head // HELD, tl.arange(0, WIDTH)[None, :]
    inside, token = tokens[:, None] < T, tokens[:, None].to(tl.int64)
    moved = (q_ptr if section == 0 else k_ptr) + (token * HEADS + head) * WIDTH + cols
    at = ((2 * token + section) * HEADS + head) * WIDTH
    later = (cols >= WIDTH // 2) & (section == 1) & OFFSET  # the still half of a key, which goes to the row after
    first, ahead = later & (rows[:, None] == 0), tl.where(later, HELD * WIDTH, 0)  # the first row keeps its own too
    found = inside & (rows[:, None] + later.to(tl.int32) < T * PARTS)
    if grad_ptr is None:
        x = tl.load(qk_ptr + at + cols, mask=inside, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            x = _rstd(x, WIDTH) * _turn_rows(x, cos_ptr, sin_ptr, rows, inside, 1, BLOCK, WIDTH)
        if OFFSET:
            tl.store(moved, x.to(q_ptr.dtype.element_ty), mask=first)
        tl.store(moved + ahead, x.to(q_ptr.dtype.element_ty), mask=found)
    else:
        dk = tl.load(moved + ahead, mask=found, other=0.0).to(tl.float32)
        dk += tl.load(moved, mask=first, other=0.0).to(tl.float32)
        _store_gradient(dk, qk_ptr + at, grad_ptr + at, cos_ptr, sin_ptr, rows, inside, BLOCK, WIDTH)


@jit
def _attention_forward(q_desc, k_desc, v_desc, out_desc, gate_ptr, lse_ptr, first_ptr, T, padded, window, scale,
                       HEADS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
                       BOUNDED: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr = TILE):
    """One program: ROWS queries of one head. BOUNDED: normed q and k, whose small scores need no running maximum."""
    head, row0 = tl.program_id(0), tl.program_id(1) * ROWS
    rows = row0 + tl.arange(0, ROWS)
    inside = rows < T
    lowest = tl.maximum(tl.load(first_ptr + rows // PARTS, mask=inside, other=0) * PARTS, rows - window)
    start = tl.maximum(tl.load(first_ptr + row0 // PARTS) * PARTS, row0 - window)
    end = tl.minimum(row0 + ROWS, T)
    full_from = tl.maximum(tl.load(first_ptr + (end - 1) // PARTS) * PARTS, end - 1 - window)
    slope = scale * TO_LOG2
    q = q_desc.load([row0, head * WIDTH])
    total, top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], 0.0 if BOUNDED else -1e30, tl.float32)
    acc = tl.zeros([ROWS, V_WIDTH], tl.float32)
    for key0 in tl.range(start, end, KEYS):
        k = k_desc.load([key0, head * WIDTH])
        scores = tl.dot(q, k.T, input_precision="ieee")
        if (key0 < full_from) | (key0 + KEYS > row0 + 1):
            keys = key0 + tl.arange(0, KEYS)
            scores = tl.where(_within(keys[None, :] - lowest[:, None], (rows - lowest)[:, None]), scores, float("-inf"))
        if BOUNDED:
            p = tl.exp2(scores * slope)
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * slope)
            p = tl.exp2(scores * slope - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total, acc, top = total * shrink, acc * shrink[:, None], new_top
        total += tl.sum(p, 1)
        v = v_desc.load([key0, head * V_WIDTH])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    lse, factor = tl.log2(total) + top, 1 / total
    if gate_ptr is not None:  # exp2(score - lse) is then the gated probability: the backward pass needs no more
        gate = tl.load(gate_ptr + rows * (HEADS // PARTS) + head, mask=inside, other=1.0).to(tl.float32)
        factor *= gate
        lse -= tl.log2(gate)
    out_desc.store([row0, head * V_WIDTH], (acc * factor[:, None]).to(out_desc.dtype))
    tl.store(lse_ptr + head * padded + rows, lse, mask=inside)


@jit
def _attention_dq(q_desc, k_desc, v_desc, out_desc, dout_desc, gate_ptr, lse_ptr, delta_ptr, first_ptr, qk_ptr,
                  grad_ptr, cos_ptr, sin_ptr, T, padded, window, scale, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
                  HEADS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr = TILE, KEYS: tl.constexpr = TILE // 2):
    """One program: the gradients of ROWS queries of one head and of their gates, delta = sum of dout * out / gate."""
    head, row0 = tl.program_id(0), tl.program_id(1) * ROWS
    rows = row0 + tl.arange(0, ROWS)
    inside = rows < T
    lowest = tl.maximum(tl.load(first_ptr + rows // PARTS, mask=inside, other=0) * PARTS, rows - window)
    start = tl.maximum(tl.load(first_ptr + row0 // PARTS) * PARTS, row0 - window)
    slope = scale * TO_LOG2
    q = q_desc.load([row0, head * WIDTH])
    dout, out = dout_desc.load([row0, head * V_WIDTH]), out_desc.load([row0, head * V_WIDTH])
    lse = tl.load(lse_ptr + head * padded + rows, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + rows * (HEADS // PARTS) + head, mask=inside, other=1.0).to(tl.float32)
        delta = tl.where(gate == 0.0, 0.0, delta / gate)
    tl.store(delta_ptr + head * padded + rows, delta, mask=inside)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for key0 in tl.range(start, tl.minimum(row0 + ROWS, T), KEYS):
        k, v = k_desc.load([key0, head * WIDTH]), v_desc.load([key0, head * V_WIDTH])
        scores = tl.dot(q, k.T, input_precision="ieee")
        dp = tl.dot(dout, v.T, input_precision="ieee")
        keys = key0 + tl.arange(0, KEYS)
        seen = _within(keys[None, :] - lowest[:, None], (rows - lowest)[:, None])
        p = tl.where(seen, tl.exp2(scores * slope - lse[:, None]), 0.0)
        acc = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, acc, input_precision="ieee")
    acc *= scale
    at = (rows // PARTS)[:, None].to(tl.int64) * (2 * HEADS * WIDTH)
    at += (rows % PARTS * (HEADS // PARTS) + head)[:, None] * WIDTH
    _store_gradient(acc, qk_ptr + at, grad_ptr + at, cos_ptr, sin_ptr, rows, inside[:, None], ROWS, WIDTH)


@jit
def _attention_dkdv(q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, last_ptr, qk_ptr, grad_ptr, dv_ptr,
                    dk_ptr, cos_ptr, sin_ptr, T, window, scale, HEADS: tl.constexpr, PARTS: tl.constexpr,
                    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, ROWS: tl.constexpr = TILE, KEYS: tl.constexpr = TILE):
    """One program: the gradients of KEYS keys and values of one head, from all rows that see them."""
    head, key0 = tl.program_id(0), tl.program_id(1) * KEYS
    keys = key0 + tl.arange(0, KEYS)
    inside = keys < T
    highest = tl.minimum(tl.load(last_ptr + keys // PARTS, mask=inside, other=0) * PARTS - 1, keys + window)
    final = tl.minimum(key0 + KEYS, T) - 1
    end = tl.minimum(tl.load(last_ptr + final // PARTS) * PARTS, final + window + 1)
    slope = scale * TO_LOG2
    k, v = k_desc.load([key0, head * WIDTH]), v_desc.load([key0, head * V_WIDTH])
    dk, dv = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, V_WIDTH], tl.float32)
    for row0 in tl.range(key0, end, ROWS):
        q, dout = q_desc.load([row0, head * WIDTH]), dout_desc.load([row0, head * V_WIDTH])
        lse, delta = lse_desc.load([head, row0]), delta_desc.load([head, row0])  # 0 past the end, like q and dout
        rows = row0 + tl.arange(0, ROWS)
        scores = tl.dot(k, q.T, input_precision="ieee")
        seen = _within(rows[None, :] - keys[:, None], (highest - keys)[:, None])
        p = tl.where(seen, tl.exp2(scores * slope - lse), 0.0)
        dp = tl.dot(v, dout.T, input_precision="ieee")
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dk = tl.dot((p * (dp - delta)).to(q.dtype), q, dk, input_precision="ieee")
    row, at = keys[:, None].to(tl.int64) * (HEADS // PARTS), tl.arange(0, V_WIDTH)[None, :]
    tl.store(dv_ptr + (row + head) * V_WIDTH + at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])
    dk *= scale
    if dk_ptr is not None:  # a row's halves belong to two tokens here: _attention_prepare goes on
        at = tl.arange(0, WIDTH)[None, :]
        tl.store(dk_ptr + (row + head) * WIDTH + at, dk.to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        at = (keys // PARTS)[:, None].to(tl.int64) * (2 * HEADS * WIDTH)
        at += (HEADS + keys % PARTS * (HEADS // PARTS) + head)[:, None] * WIDTH
        _store_gradient(dk, qk_ptr + at, grad_ptr + at, cos_ptr, sin_ptr, keys, inside[:, None], KEYS, WIDTH)


def _attention_plan(qk, v, prepared, heads, paired):
    """Rows, a grid over heads and tiles of rows, the kernels' constants, and a function from rows a tile to descriptors
    of q, k and v: q and k as prepared, or where that is empty of the packed rows' columns."""
    parts, widths = 1 + paired, (qk.size(1) // (2 * heads), qk.size(1) // (2 * heads), v.size(1) // heads)
    rows = len(qk) * parts
    whole = [x.view(rows, -1) if x.numel() else y for x, y in zip(prepared, qk.chunk(2, dim=1), strict=True)]
    whole = [_aligned(x) for x in (*whole, v.view(rows, -1))]
    dims = dict(HEADS=heads, PARTS=parts, WIDTH=widths[0])
    return rows, (heads // parts, triton.cdiv(rows, TILE)), dims, lambda *sizes: [
        TensorDescriptor.from_tensor(x, [n, w]) for x, n, w in zip(whole, sizes, widths, strict=True)]


@torch.library.custom_op("speedrun::attention", mutates_args=())
def _attention(qk: Tensor, v: Tensor, first: Tensor, last: Tensor, heads: int, window: int, scale: float,
               cos: Tensor | None = None, sin: Tensor | None = None, gate: Tensor | None = None, paired: bool = False,
               key_offset: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, log2 of the softmax's sums, and q, k as prepared (empty where the packed rows serve as they are)."""
    out, lse, *prepared = _attention_outputs(qk, v, first, last, heads, window, scale, cos, sin, gate, paired,
                                             key_offset)
    rows, grid, dims, tiles = _attention_plan(qk, v, prepared, heads, paired)
    if prepared[0].numel():
        _attention_prepare[triton.cdiv(len(qk), 16), 2 * heads](
            qk, *prepared, cos, sin, None, len(qk), OFFSET=key_offset, FIRST=0, num_warps=8, **dims)
    keys, v_width = TILE // 2 if window <= SMALL_WINDOW else TILE, v.size(1) // heads
    _attention_forward[grid](
        *tiles(TILE, keys, keys), TensorDescriptor.from_tensor(out.view(rows, -1), [TILE, v_width]), gate, lse, first,
        rows, lse.size(1), window, scale, KEYS=keys, V_WIDTH=v_width, num_stages=3, **dims,  # fp16 has not exp2's range
        BOUNDED=cos is not None and scale * dims["WIDTH"] < 40 and qk.dtype != torch.float16)
    return out, lse, *prepared


@_attention.register_fake
def _attention_outputs(qk, v, first, last, heads, window, scale, cos=None, sin=None, gate=None, paired=False,
                       key_offset=False):
    _check_attention(qk, v, first, last, heads, window, scale, cos, sin, gate, paired, key_offset)
    widths, tokens, parts = (qk.size(1) // (2 * heads), v.size(1) // heads), len(qk), 1 + paired
    fits = all(width == 64 or width == 128 for width in widths)
    _expect("qk", qk, qk.shape, FLOATS[:2 if qk.is_cuda else 3], None, fits, ", widths of heads of it and v 64 or 128")
    lse = qk.new_empty(heads // parts, -(-tokens * parts // TILE) * TILE, dtype=torch.float32)
    q, k = (qk.new_empty(tokens if paired or cos is not None else 0, heads * widths[0]) for _ in range(2))
    return torch.empty_like(v), lse, q, k


@torch.library.custom_op("speedrun::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, qk: Tensor, v: Tensor, gate: Tensor | None, first: Tensor, last: Tensor,
                        cos: Tensor | None, sin: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor,
                        heads: int, window: int, scale: float, paired: bool,
                        key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qk, of v and of the gate (empty without one)."""
    rows, grid, dims, tiles = _attention_plan(qk, v, (q, k), heads, paired)
    (dqk, dv, delta), dk = (torch.empty_like(x) for x in (qk, v, lse)), torch.empty_like(k) if key_offset else None
    v_width = v.size(1) // heads
    out, dout = (TensorDescriptor.from_tensor(_aligned(x.contiguous().view(rows, -1)), [TILE, v_width])
                 for x in (out, dout))
    _attention_dq[grid](
        *tiles(TILE, TILE // 2, TILE // 2), out, dout, gate, lse, delta, first, qk, dqk, cos, sin, rows, lse.size(1),
        window, scale, V_WIDTH=v_width, num_stages=2 if window <= SMALL_WINDOW else 4, **dims)
    sums = (TensorDescriptor.from_tensor(x[:, :rows], [1, TILE]) for x in (lse, delta))
    _attention_dkdv[grid](*tiles(TILE, TILE, TILE), dout, *sums, last, qk, dqk, dv, dk, cos, sin, rows, window, scale,
                          V_WIDTH=v_width, num_stages=2, **dims)
    if key_offset:
        _attention_prepare[triton.cdiv(len(qk), 16), heads](
            qk, dk, dk, cos, sin, dqk, len(qk), OFFSET=True, FIRST=1, **dims)
    dgate = qk.new_empty(0) if gate is None else delta[:, :rows].t().reshape(gate.shape).to(gate.dtype).contiguous()
    return dqk, dv, dgate


_attention_backward.register_fake(lambda dout, qk, v, gate, *_: (
    torch.empty_like(qk), torch.empty_like(v), qk.new_empty(0) if gate is None else torch.empty_like(gate)))


def _attention_save(ctx, inputs, output):
    qk, v, first, last, *sizes, cos, sin, gate, paired, key_offset = inputs
    ctx.options = *sizes, paired, key_offset
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qk, v, gate, first, last, cos, sin, *output)


def _attention_gradients(ctx, dout, *_):
    dqk, dv, dgate = _attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dqk, dv, *[None] * 7, None if ctx.saved_tensors[2] is None else dgate, None, None


_attention.register_autograd(_attention_gradients, setup_context=_attention_save)


def attention(qk: Tensor, v: Tensor, documents: Documents, *args, **options) -> Tensor:
    """attention_reference, with its arguments but the last two, by the kernels on a GPU and by itself elsewhere."""
    return (_attention(qk, v, documents.first, documents.last, *args, **options)[0] if kernels_available(qk.device)
            else attention_reference(qk, v, documents, *args, **options))


# --- The MLP's matrix products with ReLU^2 ----------------------------------------------------------------------------
#     forward   post = relu(scale * x W')^2        amax = max post
#     backward  dpre = 2 * scale * (g W') * sqrt(post), the gradient before the ReLU^2
# a     (T, D)   bf16, fp16, fp32 (not with out_scale) or e4m3 (reference: any)  input x, or the output's gradient g
# w     (F, D)   a's dtype, row-major                                                up matrix; down matrix, post @ w
# post, dpre (T, F)  a's dtype, bf16 for e4m3, backward post also e4m3               post None: forward
# scale ()       fp32, 0 or 1e-9 to 1e9, or None: 1  (squared after x W': below 9e18)  product of FP8 operands' scales
# out8  (T, F)   post or dpre over out_scale in e4m3, saturated, and, transposed, out8_t (F, T): in the place of post or
#                dpre, but beside a post that is not transposed                      with out_scale (), fp32 from 1e-30
# amax  (n,)     fp32, a maximum a program, not rounded, where no NaN is             with such a post
# Arithmetic is fp32, each output rounded once; FP8 products accumulate at the tensor cores' own precision, on Hopper
# about 14 bits (max_num_imprecise_acc is left at its default). Rows must be multiples of 16 bytes, as descriptors want.
# Sources: ReLU^2 is that of Primer (arXiv 2109.08668); FP8 is that of modded-nanogpt's records #84, #89 and #92.


def _check_relu_square(a, w, post, *scales) -> torch.dtype:
    """The dtype of post, where the operands a (x or g), w and, backward, post fit together."""
    wide = torch.bfloat16 if a.dtype == E4M3 else a.dtype
    _expect("the first operand", a, ("T", "D"), (*FLOATS, torch.float64, E4M3))
    _expect("w", w, ("F", a.shape[1]), (a.dtype,), a.device)
    _expect("post", post, (len(a), len(w)), dict.fromkeys((wide, a.dtype)), a.device, optional=True)
    for scale in scales:
        _expect("a scale", scale, (), (torch.float32,), a.device, rule=", one number", optional=True)
    return wide


@torch.no_grad()
def relu_square_reference(a, w, post=None, scale=None, out_scale=None, transposed=False) -> list[Tensor]:
    dtype, forward = _check_relu_square(a, w, post, scale, out_scale), post is None
    a, w = (t if t.dtype == torch.float64 else t.float() for t in (a, w))
    product = a @ w.t() * (1 if scale is None else scale)
    out = product.relu().square() if forward else 2 * product * post.to(a.dtype).sqrt()
    if out_scale is None:
        return [out.to(dtype)]
    out8 = (out / out_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    if transposed:
        return [out8, out8.t().contiguous()]
    return [out.to(dtype), out8, out.max().float().reshape(1)] if forward else [out8]


@jit
def _relu_square_tiles(a, w, post, out, out8, scale_ptr, out_scale_ptr, amax_ptr, M, N, K, SATURATE: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """Each program takes every num_programs-th tile (BM, BN). a, w and out are descriptors, which read zeros and write
    nothing outside their matrix; the rest are pointers. None: the mode has no such tensor."""
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr)
    factor = 0.25 * scale * scale if post is None else 2.0 * scale
    factor8 = 1.0 if out8 is None else 1.0 / tl.load(out_scale_ptr)
    across = tl.cdiv(N, BN) * GROUP  # tiles in GROUP rows of tiles, which are taken column by column
    largest = tl.zeros([BM], tl.float32)
    # flatten makes one loop of the two, so that the loads of the next tile run during the outputs of this one.
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM * GROUP) * across, tl.num_programs(0), flatten=True):
        row = (tile // across * GROUP + tile % GROUP) * BM
        col = tile % across // GROUP * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, K, BK):
            acc = tl.dot(a.load([row, k]), w.load([col, k]).T, acc, input_precision="ieee")
        if amax_ptr is not None:
            largest = tl.maximum(largest, tl.max(acc, 1))
        # The outputs a quarter at a time, which leaves the shared memory to the loads.
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        parts = (left.reshape(BM, 2, BN // 4).permute(0, 2, 1).split()
                 + right.reshape(BM, 2, BN // 4).permute(0, 2, 1).split())
        for i in tl.static_range(4):
            rows, cols = row + tl.arange(0, BM), col + i * (BN // 4) + tl.arange(0, BN // 4)
            offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            if post is None:
                value = parts[i] + tl.abs(parts[i])  # 2 * relu: an addition has twice the rate of a maximum
                value = value * value * factor
            else:
                root = tl.sqrt(tl.load(post + offsets, mask=inside, other=0.0).to(tl.float32))
                value = parts[i] * root * factor
            if out is not None:
                out.store([row, col + i * (BN // 4)], value.to(out.dtype))
            if out8 is not None:
                value *= factor8
                if SATURATE:  # the GPU's conversions do it anyway
                    value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
                tl.store(out8 + offsets, value.to(out8.dtype.element_ty), mask=inside)
    if amax_ptr is not None:
        top = 2.0 * tl.max(largest)
        tl.store(amax_ptr + tl.program_id(0), top * top * factor)


# The same backward product on Hopper in Gluon, Triton's lower level, for bf16 (fp8=off): a warp loads, of two groups of
# four warps one makes its outputs while the other multiplies. 10% faster than the kernel above on an H100 (NOTES, 13).
HOPPER_BM, HOPPER_BN, HOPPER_BK = tl.constexpr(128), tl.constexpr(128), tl.constexpr(64)
HOPPER_STAGES, HOPPER_ROWS, HOPPER_PART = tl.constexpr(5), tl.constexpr(4), tl.constexpr(64)
HOPPER_BLOCK = [128, 64]  # of every descriptor: (BM, BK) of g, (BN, BK) of w, (BM, PART) of post and dpre
HOPPER_LAYOUT = None if gluon is PLAIN else gl.NVMMASharedLayout.get_default_for(HOPPER_BLOCK, gl.bfloat16)


@gluon.jit
def _hopper_corner(tile, w):
    """First row and column of a tile; tiles go column by column through HOPPER_ROWS rows of tiles."""
    across = gl.cdiv(w.shape[0], HOPPER_BN) * HOPPER_ROWS
    return (tile // across * HOPPER_ROWS + tile % HOPPER_ROWS) * HOPPER_BM, tile % across // HOPPER_ROWS * HOPPER_BN


@gluon.jit
def _hopper_barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        hopper.mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _hopper_load(g, w, ring, tiles):
    """The loading warp, which fills the ring of operands for tile after tile."""
    g_ring, w_ring, full, empty = ring
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, col = _hopper_corner(tile, w)
        for k in range(0, w.shape[1], HOPPER_BK):
            stage = step % HOPPER_STAGES
            arrived = full.index(stage)
            hopper.mbarrier.wait(empty.index(stage), step // HOPPER_STAGES & 1 ^ 1)  # at once in the first round
            hopper.mbarrier.expect(arrived, g.block_type.nbytes + w.block_type.nbytes)  # what lies outside counts too
            hopper.tma.async_copy_global_to_shared(g, [row, k], arrived, g_ring.index(stage))
            hopper.tma.async_copy_global_to_shared(w, [col, k], arrived, w_ring.index(stage))
            step += 1


@gluon.jit
def _hopper_multiply(GROUP: gl.constexpr, ring, turns, w, post, dpre, tiles):
    """A group of four warps, which takes every other tile. `parts` has first post, then, in its place, the outputs."""
    g_ring, w_ring, full, empty = ring
    PARTS: gl.constexpr = HOPPER_BN // HOPPER_PART
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HOPPER_BN, 16])
    NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HOPPER_PART, 16])
    parts = gl.allocate_shared_memory(gl.bfloat16, [PARTS, HOPPER_BM, HOPPER_PART], dpre.layout)
    loaded = _hopper_barriers(1).index(0)
    hopper.fence_async_shared()
    steps = gl.cdiv(w.shape[1], HOPPER_BK)
    step, turn = GROUP * steps, 0
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        row, col = _hopper_corner(tile, w)
        hopper.tma.store_wait(0)  # the outputs of the tile before have left
        hopper.mbarrier.expect(loaded, PARTS * post.block_type.nbytes)
        for i in gl.static_range(PARTS):
            hopper.tma.async_copy_global_to_shared(post, [row, col + i * HOPPER_PART], loaded, parts.index(i))
        hopper.mbarrier.wait(turns.index(GROUP), turn & 1 ^ (1 - GROUP))  # group 0 begins
        acc = gl.zeros([HOPPER_BM, HOPPER_BN], gl.float32, WIDE)
        for k in range(steps):
            stage = (step + k) % HOPPER_STAGES
            hopper.mbarrier.wait(full.index(stage), (step + k) // HOPPER_STAGES & 1)
            hopper.mbarrier.arrive(turns.index(1 - GROUP), pred=k == steps - 1)  # the last product: the other's turn
            acc = hopper.warpgroup_mma(g_ring.index(stage), w_ring.index(stage).permute([1, 0]), acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(1, [acc])
            hopper.mbarrier.arrive(empty.index((step + k - 1) % HOPPER_STAGES), pred=k > 0)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        hopper.mbarrier.arrive(empty.index((step + steps - 1) % HOPPER_STAGES))
        hopper.mbarrier.wait(loaded, turn & 1)
        pieces = acc.reshape(HOPPER_BM, PARTS, HOPPER_PART).permute(0, 2, 1).split()
        for i in gl.static_range(PARTS):
            value = gl.convert_layout(pieces[i], NARROW, assert_trivial=True)
            value *= 2 * gl.sqrt(parts.index(i).load(NARROW).to(gl.float32))
            parts.index(i).store(value.to(gl.bfloat16))
            hopper.fence_async_shared()
            hopper.tma.async_copy_shared_to_global(dpre, [row, col + i * HOPPER_PART], parts.index(i))
        step += 2 * steps
        turn += 1
    hopper.tma.store_wait(0)


@gluon.jit
def _hopper_relu_square_backward(g, w, post, dpre):
    """The ring's barriers: full and empty, of each stage; turns, by which the groups' products keep its order."""
    g_ring = gl.allocate_shared_memory(gl.bfloat16, [HOPPER_STAGES, HOPPER_BM, HOPPER_BK], g.layout)
    w_ring = gl.allocate_shared_memory(gl.bfloat16, [HOPPER_STAGES, HOPPER_BN, HOPPER_BK], w.layout)
    ring = (g_ring, w_ring, _hopper_barriers(HOPPER_STAGES), _hopper_barriers(HOPPER_STAGES))
    turns = _hopper_barriers(2)
    hopper.fence_async_shared()
    tiles = gl.cdiv(g.shape[0], HOPPER_BM * HOPPER_ROWS) * gl.cdiv(w.shape[0], HOPPER_BN) * HOPPER_ROWS
    gl.warp_specialize([
        (_hopper_multiply, (0, ring, turns, w, post, dpre, tiles)),
        (_hopper_multiply, (1, ring, turns, w, post, dpre, tiles)), (_hopper_load, (g, w, ring, tiles)),
    ], [4, 1], [240, 24])  # warps and registers of the second and third; the first gets 240 of maxnreg's 3 * 168


def _relu_square_outputs(a, w, post=None, scale=None, out_scale=None, transposed=False) -> list[Tensor | None]:
    """[post or dpre, its FP8 copy, amax, the copy transposed]: None for what the mode has not."""
    wide, shape, scaled = _check_relu_square(a, w, post, scale, out_scale), (len(a), len(w)), out_scale is not None
    both = scaled and post is None and not transposed
    return [a.new_empty(shape, dtype=wide) if both or not scaled else None,
            a.new_empty(shape, dtype=E4M3) if scaled else None,
            a.new_empty(_multiprocessors(a), dtype=torch.float32) if both else None,
            a.new_empty(shape[::-1], dtype=E4M3) if scaled and transposed else None]


@operation(relu_square_reference, outputs=lambda *args: [t for t in _relu_square_outputs(*args) if t is not None])
def relu_square(a: Tensor, w: Tensor, post: Tensor | None = None, scale: Tensor | None = None,
                out_scale: Tensor | None = None, transposed: bool = False) -> list[Tensor]:
    """Forward, without post: [post], with out_scale [post, out8, amax]; backward, with post: [dpre], with out_scale
    [out8]. Both, with out_scale and transposed, without which that says nothing: [out8, out8_t]."""
    outputs = out, out8, amax, out8_t = _relu_square_outputs(a, w, post, scale, out_scale, transposed)
    _expect("the first operand", a, a.shape, (*FLOATS[:2 if out8 is not None else 3], E4M3))
    for t in (t for t in (a, w, post, out, out8, out8_t) if t is not None):
        _expect("a matrix", t, t.shape, (t.dtype,), None, t.shape[1] * t.itemsize % 16 == 0,
                f" padded in T, D and F to multiples of {16 // t.itemsize}")
    a, w, post = (t if t is None else _aligned(t) for t in (a, w, post))
    if (out8 is None and post is not None and scale is None and a.dtype == torch.bfloat16 and a.is_cuda
            and gluon is not PLAIN and torch.cuda.get_device_capability(a.device)[0] == 9):
        descriptors = (HopperDescriptor.from_tensor(t, HOPPER_BLOCK, HOPPER_LAYOUT) for t in (a, w, post, out))
        _hopper_relu_square_backward[(_multiprocessors(a),)](*descriptors, num_warps=4, maxnreg=168)
        return [out]
    bm, bn, bk, group, stages, warps = {  # large tiles for the fewest loads
        1: (128, 256, 128, 8, 4, 8), 2: (128, 256, 64, 1, 4, 8), 4: (64, 64, 32, 1, 2, 4)}[a.itemsize]
    stages -= post is not None  # post needs the shared memory of one on its way to the products' layout
    tiled = TensorDescriptor.from_tensor
    _relu_square_tiles[(_multiprocessors(a),)](
        tiled(a, [bm, bk]), tiled(w, [bn, bk]), post, None if out is None else tiled(out, [bm, bn // 4]), out8,
        scale, out_scale, amax, len(a), *w.shape, not a.is_cuda, bm, bn, bk, group, num_stages=stages, num_warps=warps)
    if out8_t is not None:  # Triton 3.6 stores wrong bytes when FP8 values are written both straight and turned
        _turn(out8.view(torch.uint8), out8_t.view(torch.uint32), 4, False)
    return [t for t in outputs if t is not None]


def number(like: Tensor, value: Tensor | float) -> Tensor:
    """value as () fp32 on like's device."""
    return value if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float32)


def fp8_matmul(a: Tensor, b: Tensor, scale_a, scale_b, fast: bool = False, dtype=torch.bfloat16) -> Tensor:
    """(M, K) row-major @ (K, N) column-major, both FP8, to dtype. The gradients that leave a layer are not `fast`."""
    _expect("a", a, ("M", "K"), (E4M3, E5M2))
    _expect("b'", b.t(), ("N", a.size(1)), (E4M3, E5M2), a.device)
    return torch._scaled_mm(a, b, number(a, scale_a), number(a, scale_b), out_dtype=dtype, use_fast_accum=fast)


class ReluSquareMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_up, w_down, scales):
        ctx.scales = scales
        if not scales:
            (post,) = relu_square(x, w_up)
            ctx.save_for_backward(x, w_up, w_down, post)
            return post @ w_down
        by_x, by_w, by_post, *_ = scales
        (x8, x_t), (up, up_t), (down, down_t) = map(quantize_transpose, (x, w_up, w_down), (by_x, by_w, by_w))
        post, post_t = relu_square(x8, up, None, by_x * by_w, by_post, True)
        ctx.save_for_backward(x_t, up_t, down, post, post_t)
        return fp8_matmul(post, down_t.t(), by_post, by_w, True, x.dtype)  # a .to here loses torch 2.11 the gradients

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, up, down, post, *post_t), g = ctx.saved_tensors, g.contiguous()
        if not post_t:
            (dpre,) = relu_square(g, down, post)
            return dpre @ up, dpre.t() @ x, post.t() @ g, None
        by_x, by_w, by_post, by_g, by_dpre = ctx.scales
        g, g_t = quantize_transpose(g, by_g)
        dpre, dpre_t = relu_square(g, down, post, by_g * by_w * by_post.sqrt(), by_dpre, True)
        return (fp8_matmul(dpre, up.t(), by_dpre, by_w), fp8_matmul(dpre_t, x.t(), by_dpre, by_x),
                fp8_matmul(post_t[0], g_t.t(), by_post, by_g), None)


def _check_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, scales: Sequence[float]) -> None:
    _check_relu_square(x, w_up, None)
    _expect("x", x, ("T", "D"), (*FLOATS, torch.float64))
    _expect("w_down", w_down, w_up.shape, (x.dtype,), x.device)
    if scales and not (len(scales) == 5 and all(1e-30 < scale < 1e30 for scale in scales)
                       and all(n % 16 == 0 for n in (*x.shape, len(w_up)))):
        raise ValueError(f"scales are {scales}, x {tuple(x.shape)}, w_up {tuple(w_up.shape)}: pass five of 1e-30 to "
                         "1e30, of x, the matrices, post, g and dpre, and T, D and F that 16 divides, or no scales.")


def relu_square_mlp_reference(x: Tensor, w_up: Tensor, w_down: Tensor, scales: Sequence[float] = ()) -> Tensor:
    """relu(x w_up')^2 w_down for x (T, D), w_up and w_down, two tensors of (F, D): (T, D), differentiable (once).
    scales: those by which FP8 divides x, the matrices, post, the output's gradient g and dpre; here nothing is FP8."""
    _check_mlp(x, w_up, w_down, scales)
    return (x @ w_up.t()).relu().square() @ w_down


def relu_square_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, scales: Sequence[float] = ()) -> Tensor:
    """As relu_square_mlp_reference, by the two kernels on a GPU; of the hidden layer only post is kept for backward.
    With scales all six products are in FP8, on a CPU too, and post is kept in it, in both layouts."""
    _check_mlp(x, w_up, w_down, scales)
    return ReluSquareMLP.apply(x, w_up, w_down, tuple(number(x, scale) for scale in scales))


# --- Softcapped, multi-token cross-entropy with its gradient ----------------------------------------------------------
#     z = 23 * sigmoid((logit + 5) / 7.5)        losses_i = sum_k weights_k * (logsumexp_j z_ij - z_i[targets_ik])
# logits  (T, V)  bf16, fp16 or fp32 (the reference also float64), contiguous    the model's raw output
# targets (T, K)  int32 or int64, each in [-1, V), which is not checked; K <= 5  of several tokens by `further_targets`
# weights (K,)    fp32                                                           weights_k: of the targets in column k
# losses  (T,)    fp32 (float64 for float64 logits)
# grad    (T, V)  bf16, fp16, fp32 or float8_e5m2 (clamped; GPUs from 8.9 on)    grad_scale * d losses_i / d logit_ij
# grad_t  (V, T)  grad transposed, contiguous; (0, 0) unless both_layouts        FP8 products want the inner axis so
# Terms with a target of -1 are left out: so the loss over a sample of the vocabulary is this one, of the sample's
# columns and candidate_positions(targets, ...). grad goes into the backward pass of what made the logits.
# bf16 logits go through the GPU's tanh, off by 2^-11, less than their own 2^-9; others keep fp32's: losses to 1e-6.
# Sources: the softcap of Gemma 2 (arXiv 2408.00118), a sigmoid in modded-nanogpt's record #54; multi-token prediction
# (Gloeckle et al. 2024, 2404.19737) by one output head, #53; loss and gradient in one kernel, #60 and #79.

CAP, SHIFT, WIDTH, MAX_TARGETS, LOSS_LOG2E = 23.0, 5.0, 7.5, 5, 1.4426950408889634


def further_targets(targets: Tensor, count: int, other: Tensor | None = None) -> Tensor:
    """(T, count), with `other` (T, count + 1), from targets (T,): each row's own and of the rows after it, -1 past the
    end; the last column is `other`, such as each target's prefix."""
    _expect("targets", targets.contiguous(), ("T",), (torch.int32, torch.int64))
    _expect("other", other, targets.shape, (targets.dtype,), targets.device, optional=True)
    columns = F.pad(targets, (0, count - 1), value=-1).unfold(0, count, 1)
    return columns.contiguous() if other is None else torch.cat((columns, other[:, None]), 1)


def candidate_positions(targets: Tensor, candidates: Tensor, vocab: int) -> Tensor:
    """Where each of `targets`, in [-1, vocab), stands among the distinct tokens `candidates`; -1 if it does not."""
    _expect("candidates", candidates, ("N",), (torch.int32, torch.int64), targets.device)
    table = targets.new_full((vocab + 1,), -1)  # its last entry, which the target -1 finds, stays -1
    table[candidates.long()] = torch.arange(len(candidates), dtype=targets.dtype, device=targets.device)
    return table[targets.long()]


def _check_cross_entropy(logits, targets, weights, grad_dtype, *dtypes: torch.dtype) -> None:
    if grad_dtype not in (*dtypes, E5M2):
        raise ValueError(f"grad_dtype is {grad_dtype}: pass one of {(*dtypes, E5M2)}.")
    _expect("logits", logits, ("T", "V"), dtypes)
    few = isinstance(weights, Tensor) and weights.numel() <= MAX_TARGETS
    _expect("weights", weights, ("K",), (torch.float32,), logits.device, few, f", K <= {MAX_TARGETS}")
    _expect("targets", targets, (len(logits), len(weights)), (torch.int32, torch.int64), logits.device)


@torch.no_grad()
def softcapped_cross_entropy_reference(logits, targets, weights, grad_scale, grad_dtype,
                                       both_layouts=False) -> tuple[Tensor, Tensor, Tensor]:
    _check_cross_entropy(logits, targets, weights, grad_dtype, *FLOATS, torch.float64)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weight, index = weights.to(dtype) * (targets >= 0), targets.long().clamp(min=0)  # weight 0 where no target is
    sig = logits.to(dtype).add(SHIFT).mul_(1 / WIDTH).sigmoid_()
    prob = torch.softmax(CAP * sig, 1)  # at least e^-23 / V, so its log is finite
    losses = -(weight * prob.gather(1, index).log()).sum(1)
    # d z / d logit = CAP / WIDTH * sig * (1 - sig); the constant goes where it multiplies least.
    scaled = weight * (grad_scale * CAP / WIDTH)
    grad = prob.mul_(scaled.sum(1, keepdim=True)).scatter_add_(1, index, -scaled).mul_(sig.addcmul_(sig, sig, value=-1))
    grad = (grad.clamp_(-E5M2_MAX, E5M2_MAX) if grad_dtype == E5M2 else grad).to(grad_dtype)
    return losses, grad, grad.t().contiguous() if both_layouts else grad.new_empty(0, 0)


# exp(-(logit + SHIFT) / WIDTH) = exp2(logit * SLOPE + OFFSET); exp(-CAP * rest) = exp2(rest * DROP). Sums are of
# exp(z - CAP / 2): it lies between e^-11.5 and e^11.5, so none can overflow and the largest z need not be known.
LOSS_SLOPE, LOSS_OFFSET = tl.constexpr(-LOSS_LOG2E / WIDTH), tl.constexpr(-LOSS_LOG2E * SHIFT / WIDTH)
LOSS_DROP, LOSS_MIDDLE = tl.constexpr(-LOSS_LOG2E * CAP), tl.constexpr(LOSS_LOG2E * CAP / 2)
LOSS_CAP, LOSS_STEEPNESS, LOSS_E5M2_MAX = tl.constexpr(CAP), tl.constexpr(CAP / WIDTH), tl.constexpr(E5M2_MAX)
LOSS_FLOOR = tl.constexpr(2.718281828459045 ** (-CAP / 2))
# PTX from 4 bf16 logits to 4 exp(z - CAP / 2), and in bf16 to these times 1 - tanh^2 = 4 * sig * rest, where tanh is of
# (logit + SHIFT) / (2 * WIDTH). What Triton would make of such lines costs more: it computes a tile again to turn it.
LOSS_HEX = ["0f" + struct.pack(">f", x).hex() for x in (0.5 / WIDTH, 0.5 * SHIFT / WIDTH, CAP / 2 * LOSS_LOG2E)]
LOSS_PTX = tl.constexpr("{ .reg .f32 x, t, s0, s1; .reg .b32 i; " + "".join(
    (f"and.b32 i, ${n // 2 + 6}, 0xffff0000; " if n % 2 else f"shl.b32 i, ${n // 2 + 6}, 16; ")
    + f"mov.b32 x, i; fma.rn.ftz.f32 x, x, {LOSS_HEX[0]}, {LOSS_HEX[1]}; tanh.approx.f32 t, x; "
    f"mul.rn.ftz.f32 x, t, {LOSS_HEX[2]}; ex2.approx.ftz.f32 ${n}, x; "
    f"neg.f32 x, t; fma.rn.ftz.f32 x, x, t, 0f3F800000; mul.rn.ftz.f32 s{n % 2}, x, ${n}; "
    + (f"cvt.rn.bf16x2.f32 ${n // 2 + 4}, s1, s0; " if n % 2 else "") for n in range(4)) + "}")


@jit
def _loss_sigmoid_and_rest(logits):
    """sigmoid((logit + SHIFT) / WIDTH) and 1 minus it, each with fp32's relative accuracy at both ends."""
    # The exponent stops at 100, where the sigmoid is 2^-100, so that inf * 0 cannot arise; a NaN stays a NaN.
    exponent = tl.minimum(logits.to(tl.float32) * LOSS_SLOPE + LOSS_OFFSET, 100.0, propagate_nan=tl.PropagateNan.ALL)
    power = tl.exp2(exponent)
    root = tl.rsqrt(1.0 + power)
    sig = root * root  # to 3e-7, in 2 instructions; a division takes 5
    return sig, power * sig


@jit
def _loss_tile(logits_ptr, rows, cols, T, end, V, FAST: tl.constexpr, POLICY: tl.constexpr):
    """Offsets, mask, exp(z - CAP / 2), and the same times 4 * sig * rest."""
    inside = (rows < T)[:, None] & (cols < end)[None, :]
    at = rows.to(tl.int64)[:, None] * V + cols[None, :]  # T * V passes 2^31 at 43,000 rows of 50,304
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf"), eviction_policy=POLICY)
    if FAST:
        power, slope = tl.inline_asm_elementwise(
            LOSS_PTX, "=&f,=&f,=&f,=&f,=&r,=&r,r,r", [logits], (tl.float32, tl.bfloat16), True, 4)
    else:
        sig, rest = _loss_sigmoid_and_rest(logits)
        power = tl.exp2(rest * LOSS_DROP + LOSS_MIDDLE)
        slope = 4.0 * sig * rest * power
    return at, inside, power, slope


@jit
def _loss_stored(grad, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """grad as DTYPE, clamped where that is e5m2; FAST: by one instruction for 2 values, which clamps by itself."""
    if DTYPE == tl.float8e5 and FAST:
        return tl.inline_asm_elementwise(E5M2_WORD, "=r,f,f,f,f", [grad], tl.float8e5, False, 4)
    elif DTYPE == tl.float8e5:
        grad = tl.clamp(grad, -LOSS_E5M2_MAX, LOSS_E5M2_MAX, propagate_nan=tl.PropagateNan.ALL)
    return grad.to(DTYPE)


@jit
def _loss_weight(targets_ptr, weights_ptr, rows, T, target, TERMS: tl.constexpr):
    """The sum of the weights of each row's terms that have this target, or, where it is None, any."""
    total = tl.zeros(rows.shape, tl.float32)
    for k in tl.static_range(TERMS):
        other = tl.load(targets_ptr + rows * TERMS + k, mask=rows < T, other=-1)
        total += tl.where(other >= 0 if target is None else other == target, tl.load(weights_ptr + k), 0.0)
    return total


@jit
def _loss_dense(logits_ptr, targets_ptr, weights_ptr, totals_ptr, counts_ptr, grad_ptr, grad_t_ptr, T, V, grad_scale,
                TERMS: tl.constexpr, BOTH: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                STRIP: tl.constexpr, AHEAD: tl.constexpr):
    """Sums and gradient in one launch, so that the logits the gradient reads again are still in the L2 cache."""
    # A strip is ROWS x STRIP. Even tickets sum, odd ones write the gradient AHEAD groups of rows later. Every sum that
    # a program waits for has a lower ticket, hence a program that has started: no order of programs can deadlock.
    strips = tl.cdiv(V, STRIP)
    ticket = tl.atomic_add(counts_ptr + tl.cdiv(T, ROWS), 1, sem="relaxed")
    strip = ticket // 2 - ticket % 2 * AHEAD * strips
    group = strip // strips
    start = strip % strips * STRIP
    end = tl.minimum(start + STRIP, V)
    rows = group * ROWS + tl.arange(0, ROWS)
    if ticket % 2 == 0:
        if group * ROWS < T:
            total = tl.zeros([ROWS], tl.float32)
            for first in tl.range(start, end, COLS, num_stages=1):
                cols = first + tl.arange(0, COLS)
                _, _, power, _ = _loss_tile(logits_ptr, rows, cols, T, end, V, FAST, "evict_last")
                total += tl.sum(tl.where((cols < end)[None, :], power, 0.0), 1)
            # In float64, rounded to fp32 when read, so that the order of the additions hardly ever shows.
            tl.atomic_add(totals_ptr + rows, total.to(tl.float64), mask=rows < T, sem="relaxed")
            tl.debug_barrier()  # all threads' additions before the one release
            tl.atomic_add(counts_ptr + group, 1, sem="release")
    elif strip >= 0:  # as if none of the entries were a target, once the rows' totals are complete
        share = _loss_weight(targets_ptr, weights_ptr, rows, T, None, TERMS)
        while tl.atomic_add(counts_ptr + group, 0, sem="acquire") < strips:
            pass
        total = tl.load(totals_ptr + rows, mask=rows < T, other=1.0, cache_modifier=".cg").to(tl.float32)
        share *= grad_scale * LOSS_STEEPNESS * 0.25 / total
        for first in tl.range(start, end, COLS, num_stages=1):
            cols = first + tl.arange(0, COLS)
            at, inside, _, grad = _loss_tile(logits_ptr, rows, cols, T, end, V, FAST, "evict_first")
            if FAST:  # to fp32
                grad = tl.inline_asm_elementwise(
                    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [grad], tl.float32, True, 2)
            grad = _loss_stored(grad * share[:, None], grad_ptr.dtype.element_ty, FAST)
            tl.store(grad_ptr + at, grad, mask=inside, cache_modifier=".cs")
            if BOTH:
                at = cols.to(tl.int64)[:, None] * T + rows[None, :]
                tl.store(grad_t_ptr + at, tl.trans(grad), mask=tl.trans(inside), cache_modifier=".cs")


@jit
def _loss_at_targets(logits_ptr, targets_ptr, weights_ptr, totals_ptr, losses_ptr, grad_ptr, grad_t_ptr, T, V,
                     grad_scale, TERMS: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr):
    """The losses, and over what _loss_dense wrote there, the gradient at the targets."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.load(totals_ptr + rows, mask=rows < T, other=1.0).to(tl.float32) * LOSS_FLOOR  # of exp(z - CAP)
    weight_sum = _loss_weight(targets_ptr, weights_ptr, rows, T, None, TERMS)
    loss = weight_sum * tl.log(total)
    for k in tl.static_range(TERMS):
        target = tl.load(targets_ptr + rows * TERMS + k, mask=rows < T, other=-1).to(tl.int64)
        found, offsets = target >= 0, rows.to(tl.int64) * V + target
        sig, rest = _loss_sigmoid_and_rest(tl.load(logits_ptr + offsets, mask=found, other=0.0))
        loss += tl.where(found, tl.load(weights_ptr + k) * rest * LOSS_CAP, 0.0)
        weight = _loss_weight(targets_ptr, weights_ptr, rows, T, target, TERMS)
        grad = (weight_sum * tl.exp2(rest * LOSS_DROP) / total - weight) * (grad_scale * LOSS_STEEPNESS) * sig * rest
        grad = _loss_stored(grad, grad_ptr.dtype.element_ty, False)
        tl.store(grad_ptr + offsets, grad, mask=found)  # all of a row's terms with this target write the same
        if BOTH:
            tl.store(grad_t_ptr + target * T + rows, grad, mask=found)
    tl.store(losses_ptr + rows, loss, mask=rows < T)


def _loss_outputs(logits, targets, weights, grad_scale, grad_dtype, both_layouts=False) -> tuple:
    grad = torch.empty_like(logits, dtype=grad_dtype)
    grad_t = grad.new_empty(logits.shape[::-1] if both_layouts else (0, 0))
    return logits.new_empty(logits.shape[0], dtype=torch.float32), grad, grad_t


@operation(softcapped_cross_entropy_reference, outputs=_loss_outputs)
def softcapped_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, grad_scale: float,
                             grad_dtype: torch.dtype, both_layouts: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, grad, grad_t): each row's loss, grad_scale times its gradient by the logits, and that transposed."""
    _check_cross_entropy(logits, targets, weights, grad_dtype, *FLOATS)
    losses, grad, grad_t = _loss_outputs(logits, targets, weights, grad_scale, grad_dtype, both_layouts)
    rows, strip, ahead = 64, 256, 2  # 2 groups are 13 MB of logits, which the 60 MB of L2 hold beside the gradient
    (tokens, vocab), groups = logits.shape, triton.cdiv(len(logits), rows)
    fast = logits.dtype == torch.bfloat16 and logits.is_cuda  # not in the interpreter, which runs no PTX
    totals = logits.new_zeros(tokens, dtype=torch.float64)
    counts = logits.new_zeros(groups + 1, dtype=torch.int32)  # the last: tickets
    inputs, outputs = (logits, targets, weights, totals), (grad, grad_t, tokens, vocab, grad_scale)
    _loss_dense[(2 * triton.cdiv(vocab, strip) * (groups + ahead),)](
        *inputs, counts, *outputs, len(weights), both_layouts, fast, rows, 128, strip, ahead,
        num_warps=8, maxnreg=64 if fast else None)  # 64 registers: 4 programs fit a multiprocessor
    _loss_at_targets[(triton.cdiv(tokens, 128),)](*inputs, losses, *outputs, len(weights), both_layouts, 128)
    return losses, grad, grad_t


# --- Symmetric products, and the orthogonalisation made of them -------------------------------------------------------
#     gram(x) = x x' (R <= C) or x' x (R > C)            gram(x, b, c) = b x + c x x', for a symmetric x
#     orthogonalise(g):   x = g / (1.02 ||g||_F + 1e-6),   then for the a, b, c of each of five rounds
#         step = gram(gram(x), b, c),   x = a x + step x (R <= C) or a x + x step (R > C)
# x, g    (N, R, C)  bf16, or for NAME.kernel alone fp16 or fp32 (small ones overflow in fp16), contiguous, one shape
# results of the arguments' dtype; sums in fp32, and gram, step and x are rounded to that dtype between the products
# Of a symmetric product only the tiles on and below the diagonal are computed, each stored twice. ||g||^2 is the trace
# of g's own Gram matrix, and the first step makes up for the scale: so ||g||_F must be below 1e8.
# Sources: Muon (K. Jordan et al. 2024); Polar Express (arXiv 2505.16932), five rounds, safety factor 1.02.

POLAR_EXPRESS = (  # a, b, c of each round
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def _check_matrices(name: str, x: Tensor, *dtypes: torch.dtype, square: bool = False) -> None:
    fits = not square or x.shape[1:2] == x.shape[2:]
    _expect(name, x, ("N", "S", "S") if square else ("N", "R", "C"), dtypes, None, fits)


@torch.no_grad()
def gram_reference(x: Tensor, b: float = 0.0, c: float = 1.0) -> Tensor:
    _check_matrices("x", x, *FLOATS, torch.float64, square=(b, c) != (0, 1))
    product = x.mT @ x if x.size(1) > x.size(2) else x @ x.mT
    return product if (b, c) == (0, 1) else b * x + c * product


@torch.no_grad()
def orthogonalise_reference(g: Tensor) -> Tensor:
    _check_matrices("g", g, *FLOATS, torch.float64)
    x = g / (1.02 * g.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        step = gram_reference(gram_reference(x), b, c)
        x = a * x + (x @ step if g.size(1) > g.size(2) else step @ x)
    return x


@jit
def _symmetric_product(x_ptr, out_ptr, R, C, a, b, c, POLYNOMIAL: tl.constexpr, TRACE: tl.constexpr, TALL: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """One tile of gram(x), or where POLYNOMIAL of a * 1 + b x + c x x', of one matrix: a tile of the BM x BM blocks on
    and below the diagonal, BN dividing BM, stored twice. TRACE, not 0: x is a Gram matrix of at most TRACE rows, and
    a, b, c are for x over (1.02 ||g||_F + 1e-6)^2, its trace being ||g||_F^2."""
    S, K = (C, R) if TALL else (R, C)
    m, k = (1, C) if TALL else (C, 1)
    x_ptr += tl.program_id(1).to(tl.int64) * R * C
    out_ptr += tl.program_id(1).to(tl.int64) * S * S
    block = tl.program_id(0) // (BM // BN)
    i = ((tl.sqrt(8.0 * block + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= block, i + 1, i)  # should the root have been rounded down
    j = tl.program_id(0) - (BM // BN) * (i * (i + 1) // 2)
    rows = i * BM + tl.arange(0, BM)[:, None]
    cols = j * BN + tl.arange(0, BN)[None, :]
    ks = tl.arange(0, BK)
    left_ptrs = x_ptr + rows * m + ks[None, :] * k
    right_ptrs = x_ptr + ks[:, None] * k + cols * m
    inside = (rows < S) & (cols < S)
    if POLYNOMIAL:  # loaded before the sum, which hides its latency
        own = tl.load(x_ptr + rows * S + cols, mask=inside)
        if TRACE:
            at = tl.arange(0, TRACE)
            trace = tl.sum(tl.load(x_ptr + at * (S + 1), mask=at < S, other=0.0).to(tl.float32))
            scale = 1.0 / (1.02 * tl.sqrt(trace) + 1e-6)
            cube = scale * scale * scale
            a, b, c = a * scale, b * cube, c * cube * (scale * scale)
    acc = tl.zeros([BM, BN], tl.float32)
    for done in tl.range(0, K, BK, num_stages=STAGES):
        left = tl.load(left_ptrs, mask=(rows < S) & (ks[None, :] < K - done), other=0.0)
        right = tl.load(right_ptrs, mask=(ks[:, None] < K - done) & (cols < S), other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        left_ptrs += BK * k
        right_ptrs += BK * k
    if POLYNOMIAL:
        acc = c * acc + b * own.to(tl.float32) + tl.where(rows == cols, a, 0.0)
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * S + cols, value, mask=inside)
    if (j + 1) * BN <= i * BM:  # below the diagonal's blocks, all of whose tiles are computed
        tl.store(out_ptr + tl.trans(cols) * S + tl.trans(rows), tl.trans(value), mask=tl.trans(inside))


def _run_symmetric_product(x: Tensor, *factors: float, scaled: bool = False) -> Tensor:
    """gram(x), or with the factors a, b, c their polynomial in x."""
    (count, rows, cols), short = x.shape, min(x.shape[1:])
    bm, bn, bk, stages, warps = (64, 32, 128, 5, 4) if short <= 256 else (128, 64, 64, 5, 8)
    if not x.is_cuda or x.dtype == torch.float32:
        bm, bn, bk, stages, warps = 32, 16, 32, 2, 4
    out, blocks = x.new_empty(count, short, short), triton.cdiv(short, bm)
    _symmetric_product[(bm // bn * (blocks * (blocks + 1) // 2), count)](
        x, out, rows, cols, *(factors or (0.0, 0.0, 0.0)), bool(factors), triton.next_power_of_2(short) * scaled,
        rows > cols, bm, bn, bk, stages, num_warps=warps)
    return out


@operation(gram_reference, outputs=lambda x, *_: x.new_empty(len(x), *[min(x.shape[1:])] * 2), dtypes=(torch.bfloat16,))
def gram(x: Tensor, b: float = 0.0, c: float = 1.0) -> Tensor:
    """x x' or, where x is tall, x' x; with b and c b x + c x x', for symmetric x."""
    polynomial = (b, c) != (0, 1)
    _check_matrices("x", x, *FLOATS, square=polynomial)
    return _run_symmetric_product(x, *(0.0, b, c) * polynomial)


@operation(orthogonalise_reference, outputs=torch.empty_like, dtypes=(torch.bfloat16,))
def orthogonalise(g: Tensor) -> Tensor:
    """As defined above: singular values of at least 1e-3 ||g||_F go to about 1."""
    _check_matrices("g", g, *FLOATS)
    x, tall = g, g.size(1) > g.size(2)
    for factors in POLAR_EXPRESS:  # the polynomial's kernel adds a to the step's diagonal
        step = _run_symmetric_product(_run_symmetric_product(x), *factors, scaled=x is g)
        x = torch.bmm(x, step) if tall else torch.bmm(step, x)
    return x


# --- Transposes: a copy, an addition, quantised to FP8 both ways ------------------------------------------------------
#     transpose_:  dst = src', or with add dst += src'
#     quantize_transpose:  q = e4m3(clamp(x * (1 / scale))),  q_t = q'
# src   (M, N)  any dtype of 1, 2 or 4 bytes, contiguous; with add bf16, fp16 or fp32 (the reference also of 8)
# dst   (N, M)  src's dtype, contiguous, not src itself; with add any of its dtypes
# x     (M, N)  bf16, fp16 or fp32, contiguous, multiples of 16 (FP8 products want the same); M, N below 2^24 here
# q, q_t  x's shape and its transpose, float8_e4m3fn        scale ()  fp32, in the device's memory


def _check_transpose(dst: Tensor, src: Tensor, add: bool, *sizes: int) -> None:  # sizes in bytes that dtypes may have
    dtypes = [t for t in ((*FLOATS, torch.float64) if add else (src.dtype,)) if t.itemsize in sizes]
    _expect("src", src, ("M", "N"), dtypes or [f"of {sizes} bytes"])
    _expect("dst", dst, src.shape[::-1], dtypes, src.device, dst is not src, ", not src itself")


def _check_quantize(x: Tensor, scale: Tensor) -> None:
    _expect("x", x, ("M", "N"), FLOATS, None, all(size % 16 == 0 for size in x.shape), ", multiples of 16")
    _expect("scale", scale, (), (torch.float32,), x.device)


def transpose_reference_(dst: Tensor, src: Tensor, add: bool = False) -> None:
    _check_transpose(dst, src, add, 1, 2, 4, 8)
    dst.copy_(dst + src.t() if add else src.t())


def quantize_transpose_reference(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    _check_quantize(x, scale)
    q = (x.float() * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return q, q.t().contiguous()


@jit
def _turn_tiles(M, N, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """This program's elements of a matrix (M, N), the r-th of each word r * N further on, and of its transpose in
    words (N, M / PACK): offset and mask. Programs go down the columns, so that neighbours share lines written."""
    high = tl.cdiv(M // PACK, BM)
    first_m, first_n = (tl.program_id(0) % high) * BM, (tl.program_id(0) // high) * BN
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    inside_m, inside_n = first_m + m < M // PACK, first_n + n < N
    src = first_m.to(tl.int64) * PACK * N + first_n + (m * (PACK * N))[:, None] + n[None, :]
    dst = first_n.to(tl.int64) * (M // PACK) + first_m + (n * (M // PACK))[:, None] + m[None, :]
    return src, inside_m[:, None] & inside_n[None, :], dst, inside_n[:, None] & inside_m[None, :]


@jit
def _transpose(src_ptr, dst_ptr, M, N, PACK: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dst (N, M / PACK) of 4-byte words, each PACK elements of a column of src (M, N): shared memory moves words of
    4 bytes at full rate and bytes at a quarter of it, so short elements are packed before the tile is turned."""
    src, src_inside, dst, dst_inside = _turn_tiles(M, N, PACK, BM, BN)
    word = tl.load(src_ptr + src, mask=src_inside)
    if PACK > 1:
        word = word.to(tl.uint32)
        for r in tl.static_range(1, PACK):
            word |= tl.load(src_ptr + src + r * N, mask=src_inside).to(tl.uint32) << (r * (32 // PACK))
    word = tl.trans(word)
    if ADD:
        word = tl.load(dst_ptr + dst, mask=dst_inside).to(tl.float32) + word.to(tl.float32)
    tl.store(dst_ptr + dst, word.to(dst_ptr.dtype.element_ty), mask=dst_inside)


@jit
def _quantize_transpose(x_ptr, scale_ptr, q_ptr, t_ptr, M, N, PTX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """As _transpose with words of 4 rows. PTX: not in the interpreter."""
    src, src_inside, dst, dst_inside = _turn_tiles(M, N, 4, BM, BN)
    inverse, parts = tl.div_rn(1.0, tl.load(scale_ptr)), ()
    for r in tl.static_range(4):
        x = tl.load(x_ptr + src + r * N, mask=src_inside, other=0.0).to(tl.float32)
        x = tl.clamp(x * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(q_ptr + src + r * N, x.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=src_inside)
        parts = parts + (x,)
    if PTX:
        word = tl.inline_asm_elementwise(E4M3_WORD, "=r,r,r,r,r", parts, tl.uint32, is_pure=True, pack=1)
    else:
        word = tl.zeros([BM, BN], tl.uint32)
        for r in tl.static_range(4):
            word |= parts[r].to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * r)
    tl.store(t_ptr + dst, tl.trans(word), mask=dst_inside)


def _turn(src: Tensor, dst: Tensor, pack: int, add: bool) -> None:
    (m, n), (bm, bn) = src.shape, (32, 256) if pack == 4 else (64, 128)
    grid = (triton.cdiv(m // pack, bm) * triton.cdiv(n, bn),)
    _transpose[grid](src, dst, m, n, PACK=pack, ADD=add, BM=bm, BN=bn, num_warps=8)


@operation(transpose_reference_, outputs=lambda *_: None, changes=("dst",))
def transpose_(dst: Tensor, src: Tensor, add: bool = False) -> None:
    """dst = src', or with add dst += src'."""
    _check_transpose(dst, src, add, 1, 2, 4)
    word = src.itemsize if add or (len(src) * src.itemsize | dst.data_ptr()) % 4 else 4  # bytes
    if not add:
        src, dst = (t.view(getattr(torch, f"uint{8 * size}")) for t, size in ((src, src.itemsize), (dst, word)))
    _turn(src, dst, word // src.itemsize, add)


@operation(quantize_transpose_reference, outputs=lambda x, scale: (
    torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[::-1], dtype=E4M3)))
def quantize_transpose(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(q, q_t): x / scale in e4m3, saturated, and the same transposed."""
    _check_quantize(x, scale)
    q, q_t = torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[::-1], dtype=E4M3)
    (m, n), (bm, bn) = x.shape, (16, 128)
    _quantize_transpose[(triton.cdiv(m // 4, bm) * triton.cdiv(n, bn),)](
        x, scale, q.view(torch.uint8), q_t.view(torch.uint32), m, n, not INTERPRETED, bm, bn, num_warps=4)
    return q, q_t


# --- What runs on the GPU at hand -------------------------------------------------------------------------------------

MODES = ("auto", "library", "reference")
# Compute capabilities, from and below, on which a kernel is used, the kernel, and what takes its place elsewhere (or
# PyTorch's FlashAttention, from 8.0). Tiles are chosen for Hopper's shared memory and matrix instructions.
CAPABILITIES = {
    "attention": ((9, 0), (10, 0), attention, attention_reference),
    "mlp": ((9, 0), (10, 0), relu_square_mlp, relu_square_mlp_reference),
    "cross_entropy": ((8, 0), (13, 0), softcapped_cross_entropy, softcapped_cross_entropy_reference),
    "orthogonalise": ((9, 0), (10, 0), orthogonalise, orthogonalise_reference),
    "quantize_transpose": ((8, 9), (13, 0), quantize_transpose, quantize_transpose_reference),
}
Kernels = NamedTuple("Kernels", [(name, Callable) for name in CAPABILITIES])  # a run's functions, made by `choose`


def choose(capability: tuple[int, int], dtype: torch.dtype, mode: str = "auto") -> tuple[Kernels, dict[str, str]]:
    """The functions for a GPU of this compute capability ((0, 0): a CPU) and this dtype, and the kind of each for the
    log: "kernel", "library" or "reference". mode: "auto", or without this file's kernels "library", "reference"."""
    able, chosen, kinds = triton is not None and mode == "auto" and dtype == torch.bfloat16, {}, {}
    for name, (low, high, kernel, other) in CAPABILITIES.items():
        chosen[name], kinds[name] = (kernel, "kernel") if able and low <= capability < high else (other, "reference")
    if kinds["attention"] == "reference" and mode != "reference" and capability >= (8, 0) and dtype == torch.bfloat16:
        chosen["attention"], kinds["attention"] = attention_library, "library"
    return Kernels(**chosen), kinds
