"""What Triton's and torch's ptxas make of the kernels for Hopper: 38 of NOTES.md; no GPU needed, a torch with bin/ptxas

    PYTHONPATH=. python records/notes/38_ptxas.py

Registers, bytes of spills and of code of each kernel of 36_ptx.py by either."""
import os
import re
import runpy
import subprocess
import sys
import tempfile

import torch
import triton

ours = triton.knobs.nvidia.ptxas.path
theirs = os.path.join(os.path.dirname(torch.__file__), "bin", "ptxas")
compile_kernel, rows = triton.compile, []


def assembled(ptxas: str, ptx: str) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = f"{folder}/kernel.cubin", f"{folder}/kernel.ptx"
        with open(source, "w") as file:
            file.write(ptx)
        done = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", source, "-o", cubin], capture_output=True, text=True,
                              check=True)
        registers, spilled = (int(re.search(pattern, done.stderr)[1]) for pattern in (
            r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        return [registers, spilled, os.path.getsize(cubin)]


def compiled(source, **options):
    kernel = compile_kernel(source, **options)
    rows.append([*assembled(ours, kernel.asm["ptx"]), *assembled(theirs, kernel.asm["ptx"])])
    return kernel


for ptxas in (ours, theirs):
    print(subprocess.check_output([ptxas, "--version"], text=True).splitlines()[-2])
ONE = """
import triton, triton_kernels as tk
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
constants = {"PACK": 1, "ADD": False, "BM": 64, "BN": 128}
kinds = {"src_ptr": "*fp32", "dst_ptr": "*fp32", "M": "i32", "N": "i32", **dict.fromkeys(constants, "constexpr")}
print(triton.compile(ASTSource(tk._transpose, kinds, constants), target=GPUTarget("cuda", 90, 32)).hash[:16])
"""
for path in ({}, {"TRITON_PTXAS_PATH": theirs}):
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder} | path
        name = subprocess.check_output([sys.executable, "-c", ONE], env=environment)
    print("_transpose is kept as", name.decode().strip())
triton.compile = compiled
sys.argv[1:] = [os.getcwd()]
runpy.run_path("records/notes/36_ptx.py")
print("registers, spilled and code bytes by Triton's, by torch's")
for row in rows:
    print(("{:4d} {:5d} {:7d}  " * 2).format(*row))
