"""These tests run the kernels: on the GPU, at real shapes too, where there is one, else in Triton's interpreter.

The interpreter must be switched on before triton is first imported and then holds for its process, so without a GPU
this folder is left to tests/test_kernels.py, which runs it in processes of its own."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton_kernels  # noqa: E402

collect_ignore_glob = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Public functions take their references, as on a CPU without the interpreter."""
    monkeypatch.setattr(triton_kernels, "kernels_available", lambda device: False)
