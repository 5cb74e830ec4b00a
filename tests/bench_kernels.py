"""Time every kernel against its floor and against PyTorch's way, on this GPU: python -m tests.bench_kernels [word ...]

With words, only families whose name contains one. Where flash-attn-4 can be imported, its time too. A time is the
median of 25 replays of a CUDA graph, each after the second-level cache was overwritten, so launch overhead is in none
of the columns and nothing is found in the cache. The floor is the larger of bytes / copy rate and operations / matrix
rate, both measured first on the same GPU.
"""
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton_kernels as tk  # noqa: E402

FP8_MLP = 1 / 16, 1 / 224, 4.0, 2.0**-6, 2.0**-4
BF16, E4, E5 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
# tokens, heads, longest document, window: the seven shapes at which other attention kernels were measured
ATTENTION = ((16384, 6, 896, 128), (16384, 6, 896, 384), (32768, 6, 2048, 384), (32768, 6, 2048, 896),
             (49152, 6, 2048, 640), (49152, 6, 2048, 1408), (32768, 3, 1792, 128))


class Row(NamedTuple):
    kernel: str
    shape: str
    ours: Callable
    library: Callable | None
    moved: float                # fewest bytes through memory
    flops: float = 0.0
    kind: str = "bf16"          # whose matrix rate bounds it
    flash4: Callable | None = None


def gpu_time(function: Callable, repeats: int = 25) -> float:
    """Microseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, cache = torch.cuda.CUDAGraph(), torch.empty(2**28, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return float(np.median(times))


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def document_lengths(total: int, longest: int) -> list[int]:
    """Lognormal lengths as of web text, cut at `longest`."""
    draw, lengths = np.random.default_rng(0), []
    while sum(lengths) < total:
        length = int(np.clip(draw.lognormal(6.2, 1.0), 40, 20000))
        lengths.append(min(length, longest, total - sum(lengths)))
    return lengths


def flash_attention_4() -> Callable | None:
    """Its attention over packed documents, if it is installed."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def attention_rows() -> Iterator[Row]:
    from torch.nn.attention.varlen import varlen_attn
    flash = flash_attention_4()
    for widths in ((128, 128), (64, 128), "turned"):
        shapes = ATTENTION if widths != (64, 128) else (ATTENTION[0], ATTENTION[4])
        for tokens, heads, longest, window in shapes:
            turned = widths == "turned"
            width, v_width = (128, 128) if turned else widths
            lengths = document_lengths(tokens, longest)
            cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
            where = tk.documents(cu_seqlens, longest, tokens)
            qk, v, dout = (randn(tokens, heads * columns) for columns in (2 * width, v_width, v_width))
            angles = torch.rand(tokens, width // 4, device="cuda") * 6
            cos, sin = (angles.cos().to(BF16), angles.sin().to(BF16)) if turned else (None, None)
            options = heads, window, 0.1

            def ours(qk=qk, v=v, where=where, options=options, cos=cos, sin=sin, turned=turned, dout=dout):
                leaves = [x.detach().requires_grad_() for x in (qk, v)]
                out = tk.attention(*leaves, where, *options, cos, sin, key_offset=turned)
                return torch.autograd.grad(out, leaves, dout)

            def varlen(q, k, v, where=where, window=window, longest=longest):
                cu = where.cu_seqlens
                return varlen_attn(q, k, v, cu, cu, longest, longest, scale=0.1, window_size=(window, 0)).flatten(1)

            def turn(qk, v, where=where, options=options, cos=cos, sin=sin):
                return tk.attention_library(qk, v, where, *options, cos, sin, key_offset=True)

            turn = compiled(turn) if turned else None
            leaves = (qk, v) if turned else (x.unflatten(1, (heads, -1)).contiguous() for x in (*qk.chunk(2, 1), v))
            leaves = [x.detach().requires_grad_() for x in leaves]

            def library(function=turn if turned else varlen, leaves=leaves, dout=dout):
                return torch.autograd.grad(function(*leaves), leaves, dout)

            def flash4(leaves=leaves, where=where, window=window, longest=longest, dout=dout):
                cu = where.cu_seqlens
                out = flash(*leaves, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
                            softmax_scale=0.1, causal=True, window_size=(window, 0))
                out = out[0] if isinstance(out, tuple) else out
                return torch.autograd.grad(out, leaves, dout.view(out.shape))

            starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
            pairs = (np.arange(tokens) - np.maximum(starts, np.arange(tokens) - window) + 1).sum()
            name = "attention + QK-norm, rotary, key offset" if turned else "attention"
            passes = 3 * (3 if width == v_width else 2) + 3  # q, k, v, out and their gradients, once each way
            yield Row(f"{name}, forward + backward",
                      f"{tokens:,} x {heads} heads of {width}/{v_width}, documents {longest}, window {window}", ours,
                      library if width == v_width else None, passes * dout.nbytes,
                      pairs * heads * 2 * (4 * width + 3 * v_width),
                      flash4=flash4 if flash and not turned and width == v_width else None)


def mlp_rows() -> Iterator[Row]:
    for tokens in (16384, 49152):
        x, w, g = randn(tokens, 768), randn(3072, 768) / 28, randn(tokens, 768)
        x8, w8, g8 = x.mul(4).to(E4), w.mul(64).to(E4), g.mul(4).to(E4)
        scale, post_scale, dpre_scale = (torch.full((), value, device="cuda") for value in (1 / 256, 0.05, 0.05))
        post = tk.relu_square_reference(x, w)[0]
        post8 = post.to(E4)
        one, flops, shape = torch.ones((), device="cuda"), 2 * tokens * 768 * 3072, f"{tokens:,} x 768 -> 3072"

        def up8(x8=x8, w8=w8, scale=scale, post_scale=post_scale, one=one):
            post = F.relu(torch._scaled_mm(x8, w8.t(), scale, one, out_dtype=BF16, use_fast_accum=True)).square()
            return post, (post / post_scale).clamp(max=448).to(E4), post.max()

        def up8_turned(up8=up8):
            _, post8, _ = up8()
            return post8, post8.t().contiguous()

        def back(g=g, w=w, post=post):
            return 2 * (g @ w.t()) * post.sqrt()

        def back8(g8=g8, w8=w8, post8=post8, scale=scale, dpre_scale=dpre_scale, one=one):
            product = torch._scaled_mm(g8, w8.t(), scale, one, out_dtype=BF16, use_fast_accum=True)
            dpre8 = (2 * product * post8.to(BF16).sqrt() / dpre_scale).clamp(-448, 448).to(E4)
            return dpre8, dpre8.t().contiguous()

        leaves, library_mlp = [t.clone().requires_grad_() for t in (x, w, w)], compiled(tk.relu_square_mlp_reference)

        def whole(function, *scales, leaves=leaves, g=g):
            return torch.autograd.grad(function(*leaves, *scales), leaves, g)

        for name, turned, library in (("bf16 and FP8 out, amax", False, up8),
                                      ("FP8 out in both layouts", True, up8_turned)):
            yield Row(f"MLP up + ReLU2, FP8 in, {name}", shape,
                      lambda x8=x8, w8=w8, s=scale, p=post_scale, t=turned: tk.relu_square(x8, w8, None, s, p, t),
                      compiled(library), x8.nbytes + w8.nbytes + (1.0 if turned else 1.5) * post.nbytes, flops, "fp8")
        yield Row("MLP up + ReLU2, bf16", shape, lambda x=x, w=w: tk.relu_square(x, w),
                  compiled(lambda x=x, w=w: F.relu(x @ w.t()).square()), x.nbytes + w.nbytes + post.nbytes, flops)
        yield Row("MLP backward through ReLU2, bf16", shape, lambda g=g, w=w, p=post: tk.relu_square(g, w, p),
                  compiled(back), x.nbytes + w.nbytes + 2 * post.nbytes, flops)
        yield Row("MLP backward through ReLU2, FP8 in, FP8 out in both layouts", shape,
                  lambda g8=g8, w8=w8, p=post8, s=scale, d=dpre_scale: tk.relu_square(g8, w8, p, s, d, True),
                  compiled(back8), g8.nbytes + w8.nbytes + 1.5 * post.nbytes, flops, "fp8")
        for name, scales, kind in (("bf16", (), "bf16"), ("FP8 (PyTorch: bf16)", FP8_MLP, "fp8")):
            yield Row(f"MLP, forward + backward, {name}", shape,
                      lambda whole=whole, scales=scales: whole(tk.relu_square_mlp, scales),
                      lambda whole=whole, library=library_mlp: whole(library),
                      4 * x.nbytes + 4 * w.nbytes + post.nbytes * (4 if not scales else 3), 6 * flops, kind)


def loss_rows() -> Iterator[Row]:
    weights = torch.tensor([1.0, 0.5], device="cuda")
    for tokens in (16384, 49152):
        logits = randn(tokens, 50304) * 4
        targets = tk.further_targets(torch.randint(50257, (tokens,), device="cuda"), 2)
        for both in (True, False):
            args = (logits, targets, weights, 1.0, E5, both)
            yield Row(f"loss and e5m2 gradient, {'both layouts' if both else 'row-major'}", f"{tokens:,} x 50,304",
                      lambda args=args: tk.softcapped_cross_entropy(*args),
                      compiled(lambda args=args: tk.softcapped_cross_entropy_reference(*args)),
                      logits.nbytes * (1.5 + 0.5 * both))
        sample = torch.randperm(50304, device="cuda")[:16384]
        args = (randn(tokens, 16384) * 4, tk.candidate_positions(targets, sample, 50304), weights, 1.0, E5, True)
        yield Row("loss and e5m2 gradient, both layouts, over a sample", f"{tokens:,} x 16,384",
                  lambda args=args: tk.softcapped_cross_entropy(*args),
                  compiled(lambda args=args: tk.softcapped_cross_entropy_reference(*args)), args[0].nbytes * 2)


def orthogonalise_rows() -> Iterator[Row]:
    reference = compiled(tk.orthogonalise_reference)
    for count, rows, cols in ((6, 256, 768), (2, 768, 768), (3, 3072, 768)):
        g, short = randn(count, rows, cols), min(rows, cols)
        flops = 5 * 2 * count * (rows * cols * short / 2 + short**3 / 2 + rows * cols * short)
        yield Row("five orthogonalisation rounds", f"{count} x {rows} x {cols}", lambda g=g: tk.orthogonalise(g),
                  lambda g=g: reference(g), 2 * g.nbytes, flops)


def layout_rows() -> Iterator[Row]:
    for rows, cols, dtype in ((16384, 50304, E5), (50304, 768, BF16)):
        x = randn(rows, cols).to(dtype)
        out = x.new_empty(cols, rows)
        yield Row("transpose_", f"{rows:,} x {cols:,} {str(dtype)[6:]}", lambda x=x, out=out: tk.transpose_(out, x),
                  compiled(lambda x=x: x.t().contiguous()), 2 * x.nbytes)
    dst, src = randn(768, 50304), randn(50304, 768)
    yield Row("transpose_, add", "768 x 50,304 bf16", lambda: tk.transpose_(dst, src, add=True),
              compiled(lambda: dst.add_(src.t())), 3 * src.nbytes)
    scale = torch.full((), 0.05, device="cuda")
    for rows, cols in ((50304, 768), (16384, 768), (16384, 3072)):
        x = randn(rows, cols)
        yield Row("quantize_transpose, both layouts", f"{rows:,} x {cols:,}",
                  lambda x=x: tk.quantize_transpose(x, scale),
                  compiled(lambda x=x: tk.quantize_transpose_reference(x, scale)), 2 * x.nbytes)


def measured_rates() -> dict[str, float]:
    """Bytes a second of a copy; operations a second of 8192-cubed products of random matrices."""
    source, target = torch.randn(2**29, device="cuda"), torch.empty(2**29, device="cuda")
    a, b = randn(8192, 8192), randn(8192, 8192)
    a8, b8, one = a.to(E4), b.to(E4), torch.ones((), device="cuda")
    products = {"bf16": lambda: a @ b.t(),
                "fp8": lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=BF16, use_fast_accum=True)}
    rates = {name: 2 * 8192**3 / gpu_time(product) * 1e6 for name, product in products.items()}
    return {"copy": 2 * source.nbytes / gpu_time(lambda: torch.mul(source, 1, out=target)) * 1e6, **rates}


def main(words: list[str]) -> None:
    if not torch.cuda.is_available() or tk.triton is None:
        raise SystemExit("bench_kernels needs an NVIDIA GPU and triton: run it on a machine with both")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.cache_size_limit = 64
    rates = measured_rates()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {tk.triton.__version__}: copy "
          f"{rates['copy'] / 1e12:.2f} TB/s, bf16 {rates['bf16'] / 1e12:.0f} TFLOP/s, fp8 {rates['fp8'] / 1e12:.0f}\n")
    more = flash_attention_4() is not None
    print("| kernel | shape | us | rate | floor us | ratio | PyTorch us |" + " flash-attn-4 us |" * more
          + "\n" + "|---" * (7 + more) + "|", flush=True)
    sums, refused = {}, ""
    for rows in (attention_rows, mlp_rows, loss_rows, orthogonalise_rows, layout_rows):
        if words and not any(word in rows.__name__ for word in words):
            continue
        for row in rows():
            floor = 1e6 * max(row.moved / rates["copy"], row.flops / rates[row.kind])
            ours = gpu_time(row.ours)
            library, flash4 = gpu_time(row.library) if row.library else float("nan"), float("nan")
            if row.flash4 and not refused:
                try:
                    flash4 = gpu_time(row.flash4)
                except Exception as error:  # its backward may know no windows or documents on this GPU
                    refused = f"flash-attn-4 does not do this here: {type(error).__name__} {str(error)[:200]}"
            rate = f"{row.flops / ours / 1e6:.0f} TFLOP/s" if row.flops / rates[row.kind] > row.moved / rates["copy"] \
                else f"{row.moved / ours / 1e6:.2f} TB/s"
            print(f"| {row.kernel} | {row.shape} | {ours:.0f} | {rate} | {floor:.0f} | {ours / floor:.2f} | "
                  + f"{library:.0f} |{f' {flash4:.0f} |' * more}".replace("nan", ""), flush=True)
            if "64/" not in row.shape:
                sums[row.kernel] = sums.get(row.kernel, np.zeros(4)) + (ours, library, flash4, 1)
            torch.cuda.empty_cache()
    print(refused, end="\n" * bool(refused))
    for kernel, (ours, library, flash4, count) in sums.items():
        if "attention" in kernel or "rounds" in kernel:
            print(f"sum of the {count:.0f} rows of {kernel}: {ours:.0f} us, PyTorch {library:.0f} us, "
                  f"{ours / library:.3f} of it" + f", flash-attn-4 {flash4:.0f} us" * bool(flash4 > 0))


if __name__ == "__main__":
    main(sys.argv[1:])
