"""What holds for triton_kernels.py as a whole: where its kernels run, and what runs elsewhere.

The tests of the kernels themselves are in tests/kernels; without a GPU this file runs them in Triton's interpreter."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_kernels as tk

ROOT = Path(__file__).resolve().parents[1]
TRITON = importlib.util.find_spec("triton") is not None
BF16, F32 = torch.bfloat16, torch.float32
HOPPER, AMPERE, ADA, BLACKWELL, TURING, CPU = (9, 0), (8, 0), (8, 9), (10, 0), (7, 5), (0, 0)

if not torch.cuda.is_available():

    @pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
    @pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests/kernels").glob("test_*.py")))
    def test_kernels_in_the_interpreter(file):
        options = ["-q", "--no-header", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, f"tests/kernels/{file}"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and " passed" in done.stdout, f"\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


def kinds(capability, dtype=BF16, mode="auto"):
    return tk.choose(capability, dtype, mode)[1]


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
def test_hopper_runs_every_kernel_in_bfloat16():
    assert set(kinds(HOPPER).values()) == {"kernel"}


@pytest.mark.parametrize(("capability", "dtype", "mode"), [
    (CPU, F32, "auto"), (CPU, BF16, "auto"), (TURING, F32, "auto"), (HOPPER, F32, "auto"), (HOPPER, BF16, "reference"),
    (HOPPER, torch.float16, "auto"),
])
def test_plain_pytorch_runs_without_the_hardware_or_on_request(capability, dtype, mode):
    chosen, kind = tk.choose(capability, dtype, mode)
    assert set(kind.values()) == {"reference"}
    assert all(function is getattr(tk, function.__name__) and function.__name__.endswith("_reference")
               for function in chosen)


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
@pytest.mark.parametrize("capability, kernels", [
    (CPU, ()), (TURING, ()), (AMPERE, ("cross_entropy",)), ((8, 6), ("cross_entropy",)),
    (ADA, ("cross_entropy", "quantize_transpose")), (BLACKWELL, ("cross_entropy", "quantize_transpose")),
    ((12, 0), ("cross_entropy", "quantize_transpose")), ((13, 0), ())])
def test_what_runs_on_each_gpu(capability, kernels):
    expected = {name: "kernel" if name in kernels else "reference" for name in tk.CAPABILITIES}
    if capability >= AMPERE:
        expected["attention"] = "library"
    assert kinds(capability) == expected


def test_library_mode_takes_pytorchs_attention_and_no_kernel():
    chosen, kind = tk.choose(HOPPER, BF16, "library")
    assert chosen.attention is tk.attention_library and "kernel" not in kind.values()


@pytest.mark.skipif(tk.gluon is tk.PLAIN, reason="this Triton has no Gluon")
def test_the_hopper_kernel_compiles_where_no_gpu_is():
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    block = f"tensordesc<bf16{tk.HOPPER_BLOCK},{tk.HOPPER_LAYOUT!r}>"
    source = GluonASTSource(tk._hopper_relu_square_backward, dict.fromkeys(("g", "w", "post", "dpre"), block), {}, {})
    kernel = tk.triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})
    assert kernel.metadata.shared <= 227 * 1024
    for instruction in ("wgmma.mma_async.sync.aligned.m64n128k16", "cp.async.bulk.tensor", "setmaxnreg"):
        assert instruction in kernel.asm["ptx"]


def compiled_for(capability, kernel, kinds, constants, **options):
    """A kernel's code in every form, made where no GPU is. kinds: types of arguments by name, or they are constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function, signature = getattr(tk, kernel), {}
    constants = {p.name: constants.get(p.name, p.default) for p in function.params
                 if p.name in constants or p.name not in kinds}
    for p in function.params:
        signature[p.name] = "constexpr" if p.name in constants else kinds[p.name]
    source = ASTSource(function, signature, constants)
    return tk.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


POINTERS = dict.fromkeys(("qk_ptr", "q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "gate_ptr", "grad_ptr", "dk_ptr",
                          "dv_ptr"), "*bf16")
ROTARY_OFF = {"cos_ptr": None, "sin_ptr": None}
NUMBERS = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "first_ptr": "*i32", "last_ptr": "*i32", "T": "i32",
           "padded": "i32", "window": "i32", "scale": "fp32"}


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
@pytest.mark.parametrize("kernel, constants", [
    ("_attention_prepare", {"OFFSET": True, "FIRST": 0, "grad_ptr": None}),
    ("_attention_prepare", {"OFFSET": False, "FIRST": 0, "grad_ptr": None, "PARTS": 1, **ROTARY_OFF}),
    ("_attention_prepare", {"OFFSET": True, "FIRST": 1}),
    ("_attention_forward", {"BOUNDED": False, "KEYS": 32}),
    ("_attention_forward", {"BOUNDED": True, "KEYS": 64, "PARTS": 1, "gate_ptr": None}),
    ("_attention_dq", {}), ("_attention_dq", {"PARTS": 1, "gate_ptr": None, **ROTARY_OFF}),
    ("_attention_dkdv", {}), ("_attention_dkdv", {"PARTS": 1, "dk_ptr": None}),
    ("_attention_dkdv", {"dk_ptr": None, **ROTARY_OFF})], ids=str)
@pytest.mark.parametrize("widths", [(64, 128), (128, 64)], ids=str)
def test_attention_of_two_widths_compiles_for_hopper_where_no_gpu_is(kernel, constants, widths):
    """The interpreter runs what the compiler refuses, such as a name of two shapes in two branches."""
    keys = constants.get("KEYS", 32 if kernel == "_attention_dq" else tk.TILE)
    boxes = {name: f"tensordesc<bf16[{rows},{width}]>" for name, rows, width in (
        ("q_desc", tk.TILE, widths[0]), ("k_desc", keys, widths[0]), ("v_desc", keys, widths[1]),
        ("out_desc", tk.TILE, widths[1]), ("dout_desc", tk.TILE, widths[1]))}
    sums = dict.fromkeys(("lse_desc", "delta_desc"), f"tensordesc<fp32[1,{tk.TILE}]>")
    constants = {"HEADS": 6, "PARTS": 2, "WIDTH": widths[0], "V_WIDTH": widths[1], **constants}
    assert compiled_for(90, kernel, POINTERS | NUMBERS | boxes | sums, constants)["cubin"]


POINTERS_OF_THE_REST = {
    "logits_ptr": "*bf16", "targets_ptr": "*i32", "weights_ptr": "*fp32", "totals_ptr": "*fp64", "counts_ptr": "*i32",
    "losses_ptr": "*fp32", "x_ptr": "*bf16", "scale_ptr": "*fp32", "q_ptr": "*u8", "t_ptr": "*u32", "out_ptr": "*bf16",
    "src_ptr": "*u8", "dst_ptr": "*u32", "post": "*bf16", "out8": "*fp8e4nv", "out_scale_ptr": "*fp32",
    "amax_ptr": "*fp32", "grad_scale": "fp32", **dict.fromkeys("abc", "fp32"), **dict.fromkeys("TVMNKRC", "i32")}
LOSS = {"TERMS": 3, "BOTH": True, "ROWS": 64, "COLS": 128, "STRIP": 256, "AHEAD": 2, "FAST": True}
TURN = {"BM": 32, "BN": 256}
TILES8 = {"SATURATE": False, "BM": 128, "BN": 256, "BK": 128, "GROUP": 8}
UP8 = {"a": "tensordesc<fp8e4nv[128,128]>", "w": "tensordesc<fp8e4nv[256,128]>", "out": "tensordesc<bf16[128,64]>"}
UP = {"a": "tensordesc<bf16[128,64]>", "w": "tensordesc<bf16[256,64]>", "out": "tensordesc<bf16[128,64]>"}


@pytest.mark.skipif(not TRITON, reason="triton cannot be imported")
@pytest.mark.parametrize("capability, kernel, types, constants", [
    *((capability, kernel, dict.fromkeys(("grad_ptr", "grad_t_ptr"), grad), LOSS)
      for capability, grad in ((80, "*bf16"), (89, "*fp8e5"), (90, "*fp8e5"), (120, "*fp8e5"))
      for kernel in ("_loss_dense", "_loss_at_targets")),
    *((capability, "_quantize_transpose", {}, {"PTX": True, "BM": 16, "BN": 128}) for capability in (89, 90, 120)),
    (90, "_transpose", {}, {"PACK": 4, "ADD": False, **TURN}),
    (90, "_transpose", {"src_ptr": "*bf16", "dst_ptr": "*fp32"}, {"PACK": 1, "ADD": True, **TURN}),
    *((90, "_symmetric_product", {}, {"POLYNOMIAL": bool(trace), "TRACE": trace, "TALL": not trace, "BM": 128,
                                      "BN": 64, "BK": 64, "STAGES": 5}) for trace in (0, 1024)),
    (90, "_relu_square_tiles", UP8, {"post": None, **TILES8}),
    (90, "_relu_square_tiles", UP8, {"post": None, "out": None, "amax_ptr": None, **TILES8}),
    *((90, "_relu_square_tiles", {**UP8, "post": post}, {"out": None, "amax_ptr": None, **TILES8})
      for post in ("*bf16", "*fp8e4nv")),
    (90, "_relu_square_tiles", UP, {"out8": None, "amax_ptr": None, "scale_ptr": None, "out_scale_ptr": None,
                                    "post": None, "SATURATE": False, "BM": 128, "BN": 256, "BK": 64, "GROUP": 1}),
], ids=lambda x: "" if isinstance(x, dict) else str(x))
def test_the_other_kernels_compile_for_the_gpus_they_run_on_where_none_is(capability, kernel, types, constants):
    options = {"num_warps": 8, **({"maxnreg": 64} if kernel == "_loss_dense" else {})}
    code = compiled_for(capability, kernel, POINTERS_OF_THE_REST | types, constants, **options)
    assert code["cubin"] and (kernel != "_quantize_transpose" or "e5m2" not in code["ptx"] and "e4m3x2" in code["ptx"])


@pytest.mark.parametrize("flash, cells, said", [
    (None, "| 10 |", None), (lambda: 30, "| 10 | 30 |", "20 us, PyTorch 20 us, 1.000 of it, flash-attn-4 60 us"),
    (lambda: 1 / 0, "| 10 |  |", "flash-attn-4 does not do this here: ZeroDivisionError division by zero")])
def test_the_bench_has_a_column_of_flash_attention_4_where_it_is_installed(monkeypatch, capsys, flash, cells, said):
    from tests import bench_kernels as bench
    row = bench.Row("attention", "a shape", lambda: 10, lambda: 10, moved=4e6, flash4=flash)
    for name in ("mlp_rows", "loss_rows", "orthogonalise_rows", "layout_rows"):
        monkeypatch.setattr(bench, name, lambda: [])
    monkeypatch.setattr(bench, "attention_rows", lambda: [row, row])
    monkeypatch.setattr(bench, "gpu_time", lambda function: float(function()))
    monkeypatch.setattr(bench, "measured_rates", lambda: dict.fromkeys(("copy", "bf16", "fp8"), 1e12))
    monkeypatch.setattr(bench, "flash_attention_4", lambda: flash)
    monkeypatch.setattr(bench.tk, "triton", bench.tk.triton or torch.nn)  # whose version is printed
    monkeypatch.setattr(bench.tk.triton, "__version__", "3", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bench.main([])
    out = capsys.readouterr().out
    assert out.count(f"| attention | a shape | 10 | 0.40 TB/s | 4 | 2.50 {cells}\n") == 2
    assert out.count("flash-attn-4") == (0 if flash is None else 2) and (said is None or said in out)


def test_every_operation_has_a_row_in_the_table_but_parts_of_others_and_transposes():
    kernels = [kernel for _, _, kernel, _ in tk.CAPABILITIES.values()]
    operations = {name for name, function in vars(tk).items() if hasattr(function, "kernel") and name[0] != "_"}
    assert {name for name in operations if getattr(tk, name) not in kernels} == {
        "relu_square", "gram", "transpose_"}
    assert all(reference is getattr(tk, f"{kernel.__name__}_reference")
               for _, _, kernel, reference in tk.CAPABILITIES.values())


def test_a_cpu_has_no_kernels():
    assert tk.kernels_available("cpu") == (tk.INTERPRETED and TRITON)


def test_file_works_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # makes "import triton" raise ImportError
import torch, triton_kernels as tk
assert tk.triton is None and not tk.kernels_available("cuda")
assert set(tk.choose((9, 0), torch.bfloat16, "reference")[1].values()) == {"reference"}
assert "kernel" not in tk.choose((9, 0), torch.bfloat16)[1].values()
args = torch.zeros(3, 5), torch.tensor([[0], [1], [2]]), torch.ones(1)
losses, grad, _ = tk.softcapped_cross_entropy(*args, 1.0, torch.float32)
assert losses.isfinite().all() and grad.shape == (3, 5)
where = tk.documents(torch.tensor([0, 3], dtype=torch.int32), 3, 3)
assert tk.attention(torch.randn(3, 128), torch.randn(3, 64), where, 1, 5, 0.1).isfinite().all()
assert tk.relu_square_mlp(torch.randn(3, 4), torch.randn(8, 4), torch.randn(8, 4)).shape == (3, 4)
assert tk.orthogonalise(torch.randn(1, 3, 4)).shape == (1, 3, 4)
assert tk.quantize_transpose(torch.randn(16, 32), torch.ones(()))[1].shape == (32, 16)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
