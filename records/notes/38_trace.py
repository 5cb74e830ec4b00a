"""Seconds that Dynamo takes to trace each stage's loss and validation, no GPU needed: 38 of NOTES.md

    git apply records/notes/38_start.patch
    TRITON_INTERPRET=1 PYTHONPATH=. python records/notes/38_trace.py [through]

through: the MLPs too, as without the patch. As on Hopper, FP8 and all; nothing is compiled or run.
The interpreter lets operators take CPU tensors."""
import cProfile
import pstats
import sys
import time

import numpy as np
import torch

import train_gpt as t
import triton_kernels as tk


class Traced(Exception):
    pass


def stop(graph, inputs):
    raise Traced


def seconds(function, *inputs) -> float:
    begin = time.perf_counter()
    try:
        function(*inputs)
    except Exception as error:
        if "Traced" not in repr(error):
            raise
    return time.perf_counter() - begin


cfg = t.parse_options(["preset=corpus"])
kernels, _ = tk.choose((9, 0), torch.bfloat16)
model = t.GPT(cfg.shape._replace(bigram_rows=8192), torch.bfloat16, kernels, t.read_token_tables(cfg), 1)
torch._dynamo.config.recompile_limit = 64
if "through" not in sys.argv:
    t.compiler(True)
loss, hidden = (torch.compile(function, dynamic=False, fullgraph=True, backend=stop)
                for function in (t.slice_loss, model.forward))
for stage, row in enumerate(cfg.stages):
    rotary = t.rotary_tables(cfg, stage, 2 * cfg.val_slice_tokens, "cpu", torch.bfloat16)
    draw, view = np.random.default_rng(0), t.stage_view(cfg, stage)
    slices = [t.made_up_batch(draw, count, 100, torch.device("cpu"))
              for count in (row.tokens // cfg.slices, cfg.val_slice_tokens)]
    weights = torch.tensor(t.target_weights(cfg, [0, *t.stage_ends(cfg)][stage]))
    inputs = loss, model, *slices[0], row.max_doc, *rotary, view, weights, True
    took = seconds(*inputs)
    with torch.no_grad():
        also = seconds(hidden, slices[1].tokens[:-1], slices[1].cu_seqlens, 2048, *rotary, view)
    print(f"stage {stage}: loss {took:.2f} s, validation {also:.2f} s")
torch._dynamo.reset()
profile = cProfile.Profile()
profile.runcall(seconds, *inputs)
rows = {key[2]: value[3] for key, value in pstats.Stats(profile).stats.items() if key[2] in ("seconds", "call_apply")}
print(f"of the last loss, under the profiler: autograd.Function {rows['call_apply']:.2f} s of {rows['seconds']:.2f}")
