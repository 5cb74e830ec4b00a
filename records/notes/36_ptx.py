"""Whether the kernels of two versions compile to the same PTX for Hopper: 36 of NOTES.md; no GPU needed, Triton 3.6

    python records/notes/36_ptx.py TREE      a hash, a length and a name for each kernel of that checkout; compare two

Line numbers, comments and labels are left out. Constants are those of the bench and of the trainer at widths of 128."""
import hashlib
import os
import re
import sys

tree = os.path.abspath(sys.argv[1])
sys.path[:0] = [tree, tree + "/tests"]
os.chdir(tree)
import test_kernels as tests  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

import triton_kernels as tk  # noqa: E402


def show(name, source, **options):
    ptx = tk.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"].split(".section")[0]
    ptx = re.sub(r"\s*//.*$|^\s*\.(loc|file).*$", "", ptx, flags=re.M)
    ptx = "\n".join(line.strip() for line in re.sub(r"\$L__\w+|\btmp\d+\b", "L", ptx).splitlines() if line.strip())
    print(hashlib.sha256(ptx.encode()).hexdigest()[:16], len(ptx), name, sep="  ", flush=True)


def kernel(name, called, kinds, constants, **options):
    function = getattr(tk, called)
    names = {p.name for p in function.params}
    constants = {key: value for key, value in constants.items() if key in names}
    constants |= {p.name: p.default for p in function.params if p.name not in kinds and p.name not in constants}
    signature = {p.name: "constexpr" if p.name in constants else kinds[p.name] for p in function.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    show(name, ASTSource(function, signature, constants, aligned), **options)


def attention(name, called, constants, **options):
    keys = constants.get("KEYS", 32 if called == "_attention_dq" else tk.TILE)
    boxes = {key: f"tensordesc<bf16[{rows},128]>" for key, rows in (
        ("q_desc", tk.TILE), ("k_desc", keys), ("v_desc", keys), ("out_desc", tk.TILE), ("dout_desc", tk.TILE))}
    sums = dict.fromkeys(("lse_desc", "delta_desc"), f"tensordesc<fp32[1,{tk.TILE}]>")
    kernel(name, called, tests.POINTERS | tests.NUMBERS | boxes | sums,
           {"HEADS": 6, "PARTS": 1, "WIDTH": 128, "V_WIDTH": 128, **constants}, **options)


def rest(name, called, constants, kinds=(), **options):
    kernel(name, called, tests.POINTERS_OF_THE_REST | dict(kinds), constants, **options)


for keys in (32, 64):
    attention(f"attention forward, {keys} keys", "_attention_forward",
              {"BOUNDED": False, "KEYS": keys, "gate_ptr": None}, num_stages=3)
    attention(f"attention forward, normed, gated, {keys} keys", "_attention_forward",
              {"BOUNDED": True, "KEYS": keys}, num_stages=3)
for stages in (2, 4):
    attention(f"attention dq, {stages} stages", "_attention_dq", {"gate_ptr": None, **tests.ROTARY_OFF},
              num_stages=stages)
    attention(f"attention dq, normed, gated, {stages} stages", "_attention_dq", {}, num_stages=stages)
attention("attention dk, dv", "_attention_dkdv", {"dk_ptr": None, **tests.ROTARY_OFF}, num_stages=2)
attention("attention dk, dv, normed", "_attention_dkdv", {"dk_ptr": None}, num_stages=2)
attention("attention dk, dv, offset keys", "_attention_dkdv", {}, num_stages=2)
attention("attention prepare", "_attention_prepare", {"OFFSET": True, "FIRST": 0, "grad_ptr": None}, num_warps=8)
attention("attention prepare, backward", "_attention_prepare", {"OFFSET": True, "FIRST": 1})
plain = {"LIMIT": None, "SATURATE": False, "BM": 128, "BN": 256, "post": None}  # LIMIT: before 36
rest("MLP forward, FP8, amax", "_relu_square_tiles", {**plain, "BK": 128, "GROUP": 8}, tests.UP8, num_warps=8,
     num_stages=4)
rest("MLP forward, bf16", "_relu_square_tiles",
     {**plain, "BK": 64, "GROUP": 1, **dict.fromkeys(("out8", "amax_ptr", "scale_ptr", "out_scale_ptr"))}, tests.UP,
     num_warps=8, num_stages=4)
block = f"tensordesc<bf16{tk.HOPPER_BLOCK},{tk.HOPPER_LAYOUT!r}>"
show("MLP backward, bf16, Gluon", GluonASTSource(
    tk._hopper_relu_square_backward, dict.fromkeys(("g", "w", "post", "dpre"), block), {}, {}), num_warps=4,
    maxnreg=168)
for called, options in (("_loss_dense", {"maxnreg": 64}), ("_loss_at_targets", {})):
    rest(called, called, tests.LOSS, dict.fromkeys(("grad_ptr", "grad_t_ptr"), "*fp8e5"), num_warps=8, **options)
for trace in (0, 256, 1024):
    for bm, bn, bk, stages, warps in ((64, 32, 128, 5, 4), (128, 64, 64, 5, 8)):
        for tall in (False, True):
            rest(f"symmetric product, trace {trace}, {bm} x {bn}{', tall' * tall}", "_symmetric_product",
                 {"POLYNOMIAL": bool(trace), "TRACE": trace, "TALL": tall, "BM": bm, "BN": bn, "BK": bk,
                  "STAGES": stages}, num_warps=warps)
rest("transpose", "_transpose", {"PACK": 4, "ADD": False, **tests.TURN}, num_warps=8)
rest("quantize_transpose", "_quantize_transpose",
     {"BM": 16, "BN": 128, "PTX": True, "DTYPE": tk.tl.float8e4nv, "LIMIT": 448.0, "ASM": tk.E4M3_WORD.value},
     num_warps=4)
