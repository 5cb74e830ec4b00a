"""How many FP8 codes differ where post is rounded to bfloat16 first, and where the scale is wrong: 34 of NOTES.md. On a
CPU, whose rounding to FP8 is right, with test_mlp.py's scales: python records/notes/34_codes.py"""
import torch

torch.manual_seed(0)
E4 = torch.float8_e4m3fn
for t, f, d in ((48, 272, 80), (384, 768, 144), (2048, 3072, 768)):
    x, w = (torch.randn(n, d).to(E4).float() for n in (t, f))
    post = (x @ w.t() * 0.7 * d**-0.5).relu() ** 2
    want = (post.bfloat16().float() / 0.013).clamp(max=448).to(E4).float()
    for factor in (1, 1.01, 1.03, 1 / 1.03):
        got = (post / (0.013 * factor)).clamp(max=448).to(E4).float()
        print(f"{t} x {d} -> {f}, scale times {factor:.3f}: {(got == want).double().mean():.4f} alike")
