"""How far FP8 moves a slice's gradients, the head's and the MLP's apart: 36 of NOTES.md; from the project's folder

    python records/notes/36_scales.py

GPT-2's shape but for a smaller table of bigrams, 1,024 tokens, fresh weights with drawn ways down, times what they grow
by in the corpus run; FP8 by the kernels' references, against float32."""
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from conftest import REFERENCE, tables  # noqa: E402

import train_gpt  # noqa: E402
import triton_kernels  # noqa: E402

shape, total = train_gpt.GPT2_SHAPE._replace(bigram_rows=20_000), 1024
cfg = dataclasses.replace(train_gpt.Config(), shape=shape)
torch.manual_seed(0)
tokens = torch.randint(0, 50257, (total + 1,), dtype=torch.int32)
starts = torch.tensor([0, 200, 201, 777, total, total], dtype=torch.int32)


def learn(dtype, fp8, scales, grown):
    kernels = REFERENCE._replace(mlp=triton_kernels.relu_square_mlp) if dtype == torch.bfloat16 else REFERENCE
    model = train_gpt.GPT(shape, dtype, kernels, tables(shape.vocab))
    model.init_weights(0)
    with torch.no_grad():
        model.mlp_bank[1::2].normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        model.mlp_bank.mul_(grown)
    train_gpt.FP8_MLP = scales
    loss = train_gpt.slice_loss(model, tokens, starts, 896, *train_gpt.rotary_tables(cfg, 0, 2 * total, "cpu", dtype),
                                train_gpt.stage_view(cfg, 0), torch.tensor([1.0, 0.25]), fp8)
    (loss / 8).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


x = train_gpt.FP8_MLP[0]
for grown in (1, 4):
    exact = learn(torch.float32, False, (), grown)
    for name, fp8, scales in (
            ("bf16", False, ()), ("head alone", True, ()), *((f"{w:g} / 448, {post:g}, 2^{g}, 2^{dpre}", True, (
                x, w / 448, post, 2.0**g, 2.0**dpre)) for w, post, g, dpre in (
                    (2, 4, -13, -11), (2, 4, -16, -14), (8, 8, -13, -11), (8, 16, -13, -11)))):
        found = learn(torch.bfloat16, fp8, scales, grown)
        errors = {name: (found[name] - grad).norm() / grad.norm() for name, grad in exact.items()}
        print(f"matrices x {grown}, {name}: " + ", ".join(f"{name} {error:.3f}" for name, error in errors.items()),
              flush=True)
