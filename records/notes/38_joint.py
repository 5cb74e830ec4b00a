"""What torch's tracer hands to its compiler of a slice's loss and of a validation, with the MLPs traced through and, as
the patch has it, each one node that is taken apart later: 38 of NOTES.md; no GPU needed

    git apply records/notes/38_start.patch
    TRITON_INTERPRET=1 PYTHONPATH=. python records/notes/38_joint.py

As on Hopper. Nothing is compiled or run; the interpreter lets operators take CPU tensors. Names are numbered anew."""
import hashlib
import re
import types

import numpy as np
import torch
from torch._dynamo.backends.common import aot_autograd

import train_gpt as t
import triton_kernels as tk


class Traced(Exception):
    pass


def keep(graph, *_, **__):
    lines, names = re.sub(r"[ ]*#.*", "", graph.print_readable(print_output=False)).split("\n"), {}
    text = "\n".join(line for line in lines if line.strip())
    found.append(re.sub(r"\b[a-z]\w*?_\d+\b|\b[a-z]\w*\b(?= ?[:=;,)\]])", lambda m: names.setdefault(
        m[0], f"{m[0].rstrip('0123456789').rstrip('_')}.{len(names)}"), text))
    raise Traced


def trace(function, *inputs) -> None:
    compiled = torch.compile(function, dynamic=False, fullgraph=True, backend=aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=keep))
    try:
        compiled(*inputs)
    except Exception as error:
        if "Traced" not in repr(error):
            raise


cfg = t.parse_options(["preset=corpus"])
through = types.FunctionType(tk.relu_square_mlp.__code__, tk.__dict__, "through", ((),))  # the same, by no name known
t.compiler(True)
kernels, _ = tk.choose((9, 0), torch.bfloat16)
for fp8 in (True, False):
    for stage in (0, 2):
        graphs = []
        for mlp in (through, tk.relu_square_mlp):
            found, row, draw, view = [], cfg.stages[stage], np.random.default_rng(0), t.stage_view(cfg, stage)
            model = t.GPT(cfg.shape._replace(bigram_rows=8192), torch.bfloat16, kernels._replace(mlp=mlp),
                          t.read_token_tables(cfg), 1)
            rotary = t.rotary_tables(cfg, stage, 2 * cfg.val_slice_tokens, "cpu", torch.bfloat16)
            some, many = (t.made_up_batch(draw, count, 100, torch.device("cpu"))
                          for count in (row.tokens // cfg.slices, cfg.val_slice_tokens))
            weights = torch.tensor(t.target_weights(cfg, [0, *t.stage_ends(cfg)][stage]))
            trace(t.slice_loss, model, *some, row.max_doc, *rotary, view, weights, fp8)
            with torch.no_grad():
                trace(model.forward, many.tokens[:-1], many.cu_seqlens, 2048, *rotary, view)
            graphs.append(found)
            torch._dynamo.reset()
        for name, one, other in zip(("loss and gradients", "validation"), *graphs, strict=True):
            hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (one, other)]
            print(f"FP8 {fp8}, stage {stage}, {name}: {len(one.splitlines())} lines, {', '.join(hashes)}, "
                  + ("the same" if one == other else "another"))
