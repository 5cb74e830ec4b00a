"""
Ladder, rung 64: the state of 2026-01 (record #64, 2026-01-30: 3.2783 in 1,555 steps of growing batches, published 1.630
min). It is the first version of this project's own trainer, on library kernels and in one file.

    ./run.sh records/ladder/64_ValueOutInit/train_gpt.py preset=corpus
    python records/ladder/64_ValueOutInit/train_gpt.py help

Against rung 20 (records #21 to #64 together): slices of whole documents, cut at 2,048 tokens; batch, windows and rate
grow in three stages, and a fourth extends the schedule; 11 layers, one without attention; gates on attention heads,
value embeddings, the token before and a single skip; a hashed table of token pairs; partial key offset; paired heads;
YaRN at window changes; several tokens ahead as targets; head and embedding one table for two thirds of the run; NorMuon
with Polar Express, cautious decay and float32 weights kept as two halves; Adam on odd steps alone.

Differences from the original: documents begin where the stream has one, over shard borders too, and a step's eight
slices depend on the step alone, so fewer GPUs see the same (the original drops the end of a shard). Stages end on even
steps (504 and 1,010 of 1,515; originally 505 and 1,010), and embedding and head part there. Paired heads turn with the
position they have in the doubled sequence. Gradients are summed by all-reduce. Attention is PyTorch's FlashAttention,
the loss with its gradient and the orthogonalisation are compiled PyTorch; the original has kernels of its own. The
warm-up runs every stage on made-up tokens outside the clock. With other `steps=` stages and cool-down keep their
shares.
"""
import contextlib
import dataclasses
import datetime
import difflib
import glob
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

HERE = Path(__file__).resolve()
ROOT = next((folder for folder in HERE.parents if (folder / "run.sh").is_file()), HERE.parent)
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the format of kjj0/fineweb10B-gpt2
VOCAB = 50257


class UserError(Exception):
    """A mistake the user can mend: one sentence with the value and the remedy, printed without a traceback."""


class World(NamedTuple):
    """This process among the others."""
    rank: int
    size: int
    device: torch.device


def knob(default, doc: str):
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that other rungs have too. Those with a doc can be given as key=value."""
    preset: str = knob("official", "official (published steps, FineWeb), corpus (129M tokens you bring) or smoke")
    name: str = knob("", "name of the run in the log's path; default: ladder_ and the rung's number")
    seed: int = knob(0, "seed of the initial weights")
    steps: int = knob(1555, "steps in all; stages and cool-down keep their published shares of them")
    extension: int = knob(40, "of these, steps after the schedule, with a longer window")
    stop_after: int = knob(0, "stop after this many steps of the unchanged schedule; 0: train to the end")
    slices: int = knob(8, "slices (micro-batches) a step; 16 halves their memory and moves where documents are cut")
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards, in order")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    val_tokens: int = knob(10_485_760, "validation tokens, from the start of the validation shards")
    val_slice_tokens: int = knob(262_144, "validation tokens a forward pass")
    val_every: int = knob(250, "steps between validations; 0: only at the end")
    log_every: int = knob(10, "steps between train_loss lines")
    log_dir: str = knob("records/runs", "where logs are written")
    dtype: str = knob("auto", "auto (bfloat16 on a GPU, float32 else), bfloat16 or float32")
    compile: str = knob("auto", "torch.compile: auto (on a GPU), on or off")
    fetch: str = "python data/cached_fineweb10B.py 9"  # makes the preset's shards; "": they are brought by hand

    @property
    def last_step(self) -> int:
        return min(self.stop_after or self.steps, self.steps)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return sum(self.stages[stage_at(self, step)].tokens for step in range(self.last_step))


########################################
#       The rung: configuration        #
########################################


RUNG = "64_ValueOutInit"
BOS, MAX_DOC, GATE_CHANNELS = 50256, 2048, 12  # document start; its longest piece; channels that a gate reads
FP8_X, FP8_W, FP8_GRAD = 100 / 448, 1.6 / 448, 0.75 / 448  # scales of the head: stored = value / scale
CHOICES = {"fp8": ("auto", "on", "off")}  # of options that are not free


class Layer(NamedTuple):
    """One row a layer."""
    window: str = "short"         # "short", "long", or "" for a layer without attention
    paired: bool = False          # two half-sets of heads interleaved as one sequence of 2T (record #58)
    key_offset: bool = False      # the key half that does not turn comes from the token before (record #49)
    value_embed: bool = False     # adds a gated token embedding to V (record #14)
    skip_from: int | None = None  # adds the gated output of an earlier layer to the input (record #11)
    backout: bool = False         # this output is subtracted, scaled, from the last (record #40)


class Stage(NamedTuple):
    """One row a stage. Windows count the tokens a query sees before itself; in paired layers, half as many."""
    end: float                    # share of the schedule at which it ends; above 1: the extension
    tokens: int                   # tokens a step, over all slices
    short: int
    long: int
    lr: float                     # rate factor before the cool-down
    ahead: tuple[tuple[float, ...], tuple[float, ...]]  # weights of the next tokens, at the stage's start and end
    tied: bool                    # embedding and head are one table


class Shape(NamedTuple):
    layers: tuple[Layer, ...]
    heads: int = 6
    dim: int = 768
    vocab: int = 50304            # 50,257 padded to a multiple of 128
    bigram_rows: int = 5 * 50304  # of the hashed table of pairs; the last is for the first token


class Rates(NamedTuple):
    """One row a parameter. Without betas it is updated by NorMuon, else by Adam."""
    lr: tuple[float, ...]         # factors of lr_muon, cycled over a bank's matrices; one of lr_adam
    decay: float = 1.0
    betas: tuple[float, float] | None = None


SHAPE = Shape((
    Layer(paired=True, value_embed=True), Layer(value_embed=True), Layer(paired=True), Layer("long", key_offset=True),
    Layer(), Layer(paired=True), Layer("", skip_from=3), Layer(backout=True), Layer(value_embed=True),
    Layer(paired=True, value_embed=True), Layer("long", key_offset=True, value_embed=True)))
STAGES = (
    Stage(1 / 3, 131_072, 128, 384, 1.0, ((1, .5, .25), (1, .5, 0)), tied=True),
    Stage(2 / 3, 262_144, 384, 896, 1.52, ((1, .5), (1, 0)), tied=True),
    Stage(1, 393_216, 640, 1408, 1.73, ((1,), (1,)), tied=False),
    Stage(2, 393_216, 768, 1664, 1.73, ((1,), (1,)), tied=False))
SMOKE_SHAPE = Shape((Layer(paired=True, value_embed=True), Layer("long", key_offset=True),
                     Layer("", skip_from=1, backout=True), Layer(value_embed=True)), 2, 64, bigram_rows=8192)
SMOKE_STAGES = tuple(stage._replace(tokens=tokens, short=short, long=2 * short) for stage, tokens, short in
                     zip(STAGES, (256, 384, 512, 512), (32, 48, 64, 96), strict=True))
SMALL = Rates((5,), 0, (.9, .99))
RATES = {
    "attn_bank": Rates((1,)), "mlp_bank": Rates((1, 2)), "value_embeds": Rates((75,), 5, (.75, .95)),
    "bigram_embed": Rates((75,), 5, (.75, .95)), "head": Rates((1,), 150, (.5, .95)),
    "embed": Rates((1,), 150, (.5, .95)), "resid_mix": SMALL, "x0_mix": Rates((5,), 0, (.65, .95)),
    "bigram_mix": SMALL, "attn_scales": SMALL, "smear_scale": SMALL, "skip_scale": SMALL, "backout_scale": SMALL,
    "smear_gate": Rates((.01,), 0, (.9, .99)), "skip_gate": Rates((.05,), 0, (.9, .99)),
    "attn_gates": Rates((1,), 1, (.9, .99)), "value_gates": Rates((1,), 1, (.9, .99))}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """The rung's own settings."""
    lr_muon: float = knob(0.023, "learning rate of the matrices, times sqrt(rows / columns) of tall ones")
    lr_adam: float = knob(0.008, "learning rate of everything else")
    cooldown: float = knob(0.55, "share of the schedule over which the rate falls to a tenth")
    momentum_warmup: int = knob(300, "steps over which NorMuon's momentum rises from 0.85 to 0.95")
    momentum_cooldown: int = knob(50, "last steps, over which it falls back")
    final_window: int = knob(2560, "long window of the last validation")
    fp8: str = knob("auto", "FP8 head: auto (compute capability 8.9 and up), on or off")
    shape: Shape = SHAPE
    stages: tuple[Stage, ...] = STAGES


PRESETS = {
    "official": {},
    "corpus": dict(steps=452, extension=8, val_every=74, train_files="data/corpus/corpus_train_*.bin",
                   val_files="data/corpus/corpus_val_*.bin", fetch=""),
    "smoke": dict(shape=SMOKE_SHAPE, stages=SMOKE_STAGES, steps=40, extension=4, val_every=20, log_every=4,
                  val_tokens=2048, val_slice_tokens=256, final_window=224, momentum_warmup=15, momentum_cooldown=5,
                  train_files="data/local_text/local_train_*.bin", val_files="data/local_text/local_val_*.bin",
                  fetch="python data/local_text.py")}


def stage_ends(cfg: Config) -> list[int]:
    """Step at which each stage ends; even within the schedule, so that no stage begins amid two steps of Adam."""
    schedule = cfg.steps - cfg.extension
    return [2 * round(stage.end * schedule / 2) for stage in cfg.stages[:-2]] + [schedule, cfg.steps]


def stage_at(cfg: Config, step: int) -> int:
    """Index of the stage of a step; the last stage also answers for the step after the end."""
    return next((i for i, end in enumerate(stage_ends(cfg)) if step < end), len(cfg.stages) - 1)


def lr_factor(cfg: Config, step: int) -> float:
    """The stage's, then linear to 0.1 over the cool-down."""
    left = min(1.0, max(0.0, (1 - step / (cfg.steps - cfg.extension)) / cfg.cooldown))
    return cfg.stages[stage_at(cfg, step)].lr * left + 0.1 * (1 - left)


def momentum(cfg: Config, step: int) -> float:
    """NorMuon's: from 0.85 up to 0.95, and back at the end."""
    rise, fall = step / max(1, cfg.momentum_warmup), (cfg.steps - step) / max(1, cfg.momentum_cooldown)
    return 0.85 + 0.1 * max(0.0, min(1.0, rise, fall))


def ahead_weights(cfg: Config, step: int) -> list[float]:
    """Weights of the next tokens in the loss, linear between the ends of the stage (arXiv 2404.19737)."""
    i, ends = stage_at(cfg, step), [0, *stage_ends(cfg)]
    progress = (step - ends[i]) / max(1, ends[i + 1] - ends[i])
    return [a + (b - a) * progress for a, b in zip(*cfg.stages[i].ahead, strict=True)]


def yarn(cfg: Config, stage: int) -> tuple[np.ndarray, float]:
    """Frequencies (head_dim / 4,), in radians a token, and softmax scale of a stage. At each change of the long window,
    frequencies that turn less than once in it are stretched with it, those of more than 32 turns kept (arXiv
    2309.00071)."""
    freqs, scale = (1 / 1024) ** np.linspace(0, 1, cfg.shape.dim // cfg.shape.heads // 4), 0.1
    for old, new in zip(cfg.stages[:stage], cfg.stages[1:stage + 1], strict=True):
        keep = np.clip((old.long * freqs / (2 * np.pi) - 1) / (32 - 1), 0, 1)
        freqs = freqs * (old.long / new.long * (1 - keep) + keep)
        scale *= 1 + 0.2 * math.log(new.long / old.long)
    return freqs, scale


class View(NamedTuple):
    """What a forward pass sees; constants of a compiled graph."""
    short: int
    long: int
    max_doc: int    # bound on the length of a document
    scale: float    # of the attention's softmax
    tied: bool      # tokens are embedded by the head's table


########################################
#           The rung: model            #
########################################


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (T, heads, head_dim), cos and sin (T, head_dim / 4); channel i and i + head_dim / 4 are a pair, half of the
    channels stand still."""
    quarter, cos, sin = cos.size(-1), cos[:, None], sin[:, None]
    a, b, still = x.split((quarter, quarter, x.size(-1) - 2 * quarter), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, still), dim=-1)


def shift_key(k: Tensor) -> Tensor:
    """k: (T, heads, head_dim) with its still half moved on by one token; the first keeps its own."""
    turning, still = k.chunk(2, dim=-1)
    return torch.cat((turning, torch.cat((still[:1], still[:-1]))), dim=-1)


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """sigmoid of a map of the first channels: x (T, dim), weight (n,) or (heads, n) to (T,) or (T, heads)."""
    return torch.sigmoid(x[:, :weight.size(-1)] @ weight.to(x.dtype).t())


def bigram_hash(tokens: Tensor, rows: int) -> Tensor:
    """(T,) int32 ids to rows of the table of pairs; the first token has the last row."""
    pairs = torch.bitwise_xor(tokens[1:] * 36313, tokens[:-1] * 27191) % (rows - 1)  # below 2^31 for GPT-2's ids
    return torch.cat((torch.full_like(tokens[:1], rows - 1), pairs))


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_doc: int, window: int, scale: float) -> Tensor:
    """Causal, within the document, at most `window` tokens back; by PyTorch's FlashAttention where it can.
    q, k, v: (T, heads, head_dim); cu_seqlens: (N + 1,) int32 starts of documents, then T; out: as q."""
    if q.is_cuda and q.dtype == torch.bfloat16:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_doc, max_doc, scale=scale, window_size=(window, 0))
    at = torch.arange(len(q), dtype=torch.int32, device=q.device)
    docs, back = torch.searchsorted(cu_seqlens, at, right=True), at[:, None] - at
    mask = (back >= 0) & (back <= window) & (docs[:, None] == docs)
    y = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, scale=scale)
    return y.transpose(0, 1)


def softcap(logits: Tensor) -> Tensor:
    return 23 * torch.sigmoid((logits.float() + 5) / 7.5)


def loss_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor, scale: float, dtype: torch.dtype):
    """Weighted cross entropies of the next len(weights) tokens under the softcap, (T,) float32, those beyond the end
    left out; and `scale` times the gradient of the logits (T, V), in dtype. targets: (T,) next tokens."""
    place = torch.arange(len(logits), device=logits.device)[:, None] + torch.arange(len(weights), device=logits.device)
    weights = weights * (place < len(logits))
    targets = targets.long()[place.clamp(max=len(logits) - 1)]
    total = softcap(logits).logsumexp(1, keepdim=True)
    losses = (weights * (total - softcap(logits.gather(1, targets)))).sum(1)
    column, share = torch.arange(logits.size(1), device=logits.device), torch.sigmoid((logits.float() + 5) / 7.5)
    grad = weights.sum(1, keepdim=True) * (23 * share - total).exp()
    for weight, target in zip(weights.unbind(1), targets.unbind(1), strict=True):
        grad = grad - weight[:, None] * (column == target[:, None])
    grad = scale * 23 / 7.5 * grad * share * (1 - share)
    return losses, (grad.clamp(-57344, 57344) if dtype == torch.float8_e5m2 else grad).to(dtype)


class HeadLoss(torch.autograd.Function):
    """Sum over tokens of the loss of x W'. x: (T, dim), w: (V, dim), targets: (T,), weights: (K,) float32. The gradient
    of the logits is made with the loss, so that no logits are kept; with fp8, products of e4m3 and e5m2."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, targets: Tensor, weights: Tensor, fp8: bool) -> Tensor:
        ctx.fp8 = fp8
        if fp8:
            x, w = (x / FP8_X).to(torch.float8_e4m3fn), (w / FP8_W).clamp(-448, 448).to(torch.float8_e4m3fn)
        logits = fp8_matmul(x, w.t(), FP8_X, FP8_W, fast=True) if fp8 else x @ w.t()
        dtype, scale = (torch.float8_e5m2, 1 / FP8_GRAD) if fp8 else (x.dtype, 1.0)
        losses, grad = loss_and_gradient(logits, targets, weights, scale, dtype)
        ctx.save_for_backward(x, w, grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, w, grad = ctx.saved_tensors
        if ctx.fp8:  # FP8 products take a row-major left and a column-major right side
            scale = upstream * FP8_GRAD
            dx = fp8_matmul(grad, w.t().contiguous().t(), scale, FP8_W, fast=False)
            dw = fp8_matmul(grad.t().contiguous(), x.t().contiguous().t(), scale, FP8_X, fast=False)
        else:
            dx, dw = upstream.to(x.dtype) * (grad @ w), upstream.to(x.dtype) * (grad.t() @ x)
        return dx, dw, None, None, None


def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor | float, scale_b: float, fast: bool) -> Tensor:
    scales = [scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=a.device)
              for scale in (scale_a, scale_b)]
    return torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)


def choose_fp8(cfg: Config, dtype: torch.dtype) -> bool:
    able = (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) and dtype == torch.bfloat16)
    if cfg.fp8 == "on" and not able:
        raise UserError("fp8=on needs a GPU of compute capability 8.9 or more and bfloat16: take fp8=auto")
    return able and cfg.fp8 != "off"


class GPT(nn.Module):
    """Parameters by name, the matrices of a kind in one bank: attn_bank (4A, dim, dim) has Q K V O of each attention
    layer, mlp_bank (2L, 4 dim, dim) up and down of each MLP, down transposed; padded so that 8 processes share them."""

    def __init__(self, cfg: Config, dtype: torch.dtype):
        super().__init__()
        shape = self.shape = cfg.shape
        count, dim = len(shape.layers), shape.dim
        self.attn_layers = [i for i, layer in enumerate(shape.layers) if layer.window]
        self.value_layers = [i for i, layer in enumerate(shape.layers) if layer.value_embed]
        attn, values = len(self.attn_layers), len(self.value_layers)
        sizes = dict(attn_bank=(-(-attn // 2) * 8, dim, dim), mlp_bank=(-(-count // 4) * 8, 4 * dim, dim),
                     value_embeds=(values * shape.vocab, dim), bigram_embed=(shape.bigram_rows, dim),
                     head=(shape.vocab, dim), embed=(shape.vocab, dim))
        small = dict(resid_mix=(count,), x0_mix=(count,), bigram_mix=(count,), attn_scales=(attn, 2), smear_scale=(),
                     skip_scale=(), backout_scale=(), smear_gate=(GATE_CHANNELS,), skip_gate=(GATE_CHANNELS,),
                     attn_gates=(attn, shape.heads, GATE_CHANNELS), value_gates=(values, shape.heads, GATE_CHANNELS))
        for name, size in (sizes | small).items():
            wide = name in small and "gates" not in name
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=torch.float32 if wide else dtype)))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices U(-a, a) with deviation 0.5 / sqrt(dim), the MLPs' second ones 0; head N(0, 0.005), the embedding
        its copy; tables and gates 0."""
        draw = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.zero_()
        bound = (0.75 / self.shape.dim) ** 0.5
        for bank in (self.attn_bank, self.mlp_bank[::2]):
            bank.copy_(torch.empty(bank.shape).uniform_(-bound, bound, generator=draw))
        self.head.copy_(torch.empty(self.head.shape).normal_(0, 0.005, generator=draw))
        self.embed.copy_(self.head)
        for p, value in ((self.resid_mix, 1.1), (self.bigram_mix, 0.1), (self.backout_scale, 0.5),
                         (self.skip_scale, -1.5)):
            p.fill_(value)
        self.attn_scales.copy_(torch.tensor((0.5, 1.0)).expand_as(self.attn_scales))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, cos: Tensor, sin: Tensor, view: View) -> Tensor:
        """Packed documents to normed hidden states. tokens: (T,) int32; cu_seqlens: (N + 1,) int32 starts of documents,
        then T; cos, sin: (at least 2T, head_dim / 4); out: (T, dim)."""
        shape, outputs, mlps = self.shape, [], self.mlp_bank.unbind()
        x = F.embedding(tokens, self.head if view.tied else self.embed)
        x = torch.cat((x[:1], x[1:] + self.smear_scale * gate(x[1:], self.smear_gate)[:, None] * x[:-1]))
        x = x0 = rms_norm(x)
        bigram = F.embedding(bigram_hash(tokens, shape.bigram_rows), self.bigram_embed)
        tables = torch.arange(len(self.value_layers), device=tokens.device, dtype=tokens.dtype) * shape.vocab
        values = F.embedding(tables[:, None] + tokens, self.value_embeds).unbind()
        values = dict(zip(self.value_layers, zip(values, self.value_gates, strict=True), strict=True))
        attn = dict(zip(self.attn_layers, zip(self.attn_bank.split(4), self.attn_scales, self.attn_gates, strict=False),
                        strict=False))
        mixes = zip(self.resid_mix.unbind(), self.x0_mix.unbind(), self.bigram_mix.unbind(), strict=True)
        for i, (layer, (resid, first, pairs)) in enumerate(zip(shape.layers, mixes, strict=True)):
            if layer.skip_from is not None:
                amount = torch.sigmoid(self.skip_scale) * 2 * gate(x0, self.skip_gate)
                x = x + amount[:, None] * outputs[layer.skip_from]
            x = resid * x + first * x0 + pairs * bigram
            if layer.window:
                x = x + self.attention(rms_norm(x), layer, *attn[i], values.get(i), cu_seqlens, cos, sin, view)
            x = x + F.relu(rms_norm(x) @ mlps[2 * i].t()).square() @ mlps[2 * i + 1]
            outputs.append(x)
        backed = [output for output, layer in zip(outputs, shape.layers, strict=True) if layer.backout]
        return rms_norm(x - self.backout_scale * sum(backed))

    def attention(self, x: Tensor, layer: Layer, matrices: Tensor, scales: Tensor, out_gate: Tensor,
                  value: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor, cos, sin, view: View) -> Tensor:
        """Self-attention of normed inputs x (T, dim); matrices: (4, dim, dim); scales: (2,), of QKV and of O; out_gate:
        (heads, n); value: the value embedding (T, dim) and its gate (heads, n)."""
        (total, dim), heads = x.shape, self.shape.heads
        w_qkv, w_out = matrices.flatten(0, 1).split((3 * dim, dim))
        q, k, v = (x @ (scales[0] * w_qkv).t()).view(total, 3, heads, -1).unbind(1)
        if value is not None:
            v = v + 2 * gate(x, value[1])[:, :, None] * value[0].view(v.shape)
        q, k, max_doc = rms_norm(q), rms_norm(k), view.max_doc
        if layer.paired:  # token t becomes rows 2t and 2t + 1, each with half of the heads
            q, k, v = (y.reshape(2 * total, heads // 2, -1) for y in (q, k, v))
            cu_seqlens, max_doc = 2 * cu_seqlens, 2 * max_doc
        q, k = (rotate(y, cos[:len(y)], sin[:len(y)]) for y in (q, k))
        if layer.key_offset:
            k = shift_key(k)
        y = attend(q, k, v, cu_seqlens, max_doc, view.short if layer.window == "short" else view.long, view.scale)
        y = y.reshape(total, heads, -1) * gate(x, out_gate)[:, :, None]
        return y.flatten(1) @ (scales[1] * w_out).t()


def slice_loss(model: GPT, tokens: Tensor, cu_seqlens: Tensor, cos, sin, view: View, weights: Tensor,
               fp8: bool) -> Tensor:
    """Training loss of one slice, summed over its tokens. tokens: (T + 1,) int32; weights: (K,) float32."""
    x = model(tokens[:-1], cu_seqlens, cos, sin, view)
    return HeadLoss.apply(x, model.head, tokens[1:], weights, fp8)


def token_losses(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross entropy of each row, (T,) float32: what validation reports."""
    return F.cross_entropy(softcap(x @ w.t()), targets.long(), reduction="none")


########################################
#         The rung: optimizers         #
########################################


POLAR_EXPRESS = (  # arXiv 2505.16932: five rounds for singular values of at least 1e-3
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(g: Tensor) -> Tensor:
    """Matrices g (n, rows, cols), rows >= cols, in bfloat16, with singular values moved to about 1."""
    x = g.bfloat16()
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x


def normuon_step(p: Tensor, g: Tensor, mean: Tensor, second: Tensor, low: Tensor | None, rates: Tensor, lr: Tensor,
                 mu: Tensor) -> None:
    """NorMuon (arXiv 2510.05491) on a bank p (n, rows, cols), in place: Nesterov momentum, orthogonalised, each row
    divided by a running mean of its size with the matrix's norm kept; decay where update and weight agree in sign
    (arXiv 2510.12402). low: the low halves of float32 weights whose high halves are p, where p is bfloat16; rates:
    (n, 1, 1) factors of lr."""
    mean.lerp_(g.float(), 1 - mu)
    update = orthogonalise(g.float().lerp(mean, mu)).float()
    power = update.square().mean(-1, keepdim=True)
    second.lerp_(power, 0.05)
    gain = second.clamp_min(1e-10).rsqrt()
    kept = power.sum(-2, keepdim=True) / (power * gain.square()).sum(-2, keepdim=True).clamp_min(1e-20)
    update = update * (gain * kept.sqrt())
    weight = p if low is None else join_float(p, low)
    weight = weight - lr * rates * (update + 1.2 * lr * weight * (update * weight >= 0))
    high, rest = (weight, None) if low is None else split_float(weight)
    p.copy_(high)
    if low is not None:
        low.copy_(rest)


def split_float(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to its bfloat16 high half (truncated) and its low 16 bits as int16."""
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_float(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of split_float."""
    return ((high.view(torch.int16).to(torch.int32) << 16) | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def adam_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, size: Tensor, decay: Tensor, beta1: float,
              beta2: float) -> None:
    """Adam with decay where update and weight agree in sign, in place. size: lr with both bias corrections."""
    g, weight = g.float(), p.float()
    m.copy_(m + (g - m) * (1 - beta1))
    v.copy_(v + (g * g - v) * (1 - beta2))
    update = size * m / (v.sqrt() + 1e-10)
    p.copy_(weight - update - decay * lr * lr * weight * (update * weight > 0))


class Optimizer:
    """NorMuon every step, Adam on odd steps with the gradients of two. Each process keeps the state of, and updates,
    its share of every bank and table."""

    def __init__(self, model: GPT, cfg: Config, world: World, compile):
        self.params, self.cfg, self.world = {name: dict(model.named_parameters())[name] for name in RATES}, cfg, world
        self.normuon_step, self.adam_step = compile(normuon_step), compile(adam_step)
        self.reset()

    def reset(self) -> None:
        self.state = {name: self.new_state(name) for name in RATES}

    def share(self, x: Tensor) -> Tensor:
        """This process's rows of a bank or table; all of a small parameter."""
        rows = len(x) // self.world.size if x.ndim > 1 and x.numel() > 2**13 else 0
        return x[self.world.rank * rows:(self.world.rank + 1) * rows] if rows else x

    def new_state(self, name: str) -> dict:
        p = self.share(self.params[name].data)
        wide = dict(dtype=torch.float32, device=p.device)
        if RATES[name].betas:
            return {"m": torch.zeros(p.shape, **wide), "v": torch.zeros(p.shape, **wide), "count": 0}
        factors, first = RATES[name].lr, self.world.rank * len(p)
        rates = [factors[i % len(factors)] * max(1, p.size(1) / p.size(2)) ** 0.5 for i in range(first, first + len(p))]
        return {"mean": torch.zeros(p.shape, **wide), "second": torch.zeros((*p.shape[:2], 1), **wide),
                "low": torch.zeros_like(p, dtype=torch.int16) if p.dtype == torch.bfloat16 else None,
                "rates": torch.tensor(rates, **wide).view(-1, 1, 1)}

    def untie(self) -> None:
        """From here on embedding and head are two tables, with the same values and moments."""
        self.params["embed"].data.copy_(self.params["head"].data)
        self.state["embed"] = {key: value if key == "count" else value.clone() for key, value in
                               self.state["head"].items()}

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Sums over processes, updates and gathers every parameter that is due."""
        due = [name for name, p in self.params.items() if p.grad is not None and (not RATES[name].betas or step % 2)]
        alone = self.world.size == 1
        sums = [None if alone else dist.all_reduce(self.params[name].grad, async_op=True) for name in due]
        for name, work in zip(due, sums, strict=True):
            if work:
                work.wait()
            p = self.params[name].data
            self.update(name, self.share(p), self.share(self.params[name].grad), step)
            self.params[name].grad = None
            if self.share(p) is not p and not alone:
                dist.all_gather_into_tensor(p, self.share(p))

    def update(self, name: str, p: Tensor, grad: Tensor, step: int) -> None:
        """One parameter's share. Rates go in as 0-dimensional CPU tensors: a number would be a new graph."""
        rates, state = RATES[name], self.state[name]
        if not rates.betas:
            base = self.cfg.lr_muon * lr_factor(self.cfg, step)
            self.normuon_step(p, grad, **state, lr=torch.tensor(base), mu=torch.tensor(momentum(self.cfg, step)))
            return
        state["count"] += 1
        lr, (beta1, beta2) = self.cfg.lr_adam * rates.lr[0] * lr_factor(self.cfg, step), rates.betas
        size = lr * (1 - beta2 ** state["count"]) ** 0.5 / (1 - beta1 ** state["count"])
        run = self.adam_step if p.ndim == 2 and p.numel() > 2**13 else adam_step  # no graphs for the small ones
        run(p, grad, state["m"], state["v"], torch.tensor(lr), torch.tensor(size), torch.tensor(0.005 * rates.decay),
            beta1, beta2)


########################################
#     All rungs: options, parallel     #
########################################


def option_fields() -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(Config) if "doc" in f.metadata}


def parse_options(argv: list[str]) -> Config:
    """key=value arguments to a Config: defaults, then the preset, then the given values. Raises UserError."""
    fields, given = option_fields(), {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if key not in fields:
            near = difflib.get_close_matches(key.lstrip("-"), fields, n=1, cutoff=0.4)
            raise UserError(f"unknown option {key!r}: " + (f"did you mean {near[0]}=...?" if near else
                            f"`python {os.path.relpath(HERE, ROOT)} help` lists them all"))
        if not equals:
            raise UserError(f"option {key!r} has no value: write {key}={fields[key].default}")
        try:
            given[key] = fields[key].type(text)
        except ValueError:
            raise UserError(f"{key}={text!r} is not a number of the right kind: give for example "
                            f"{key}={fields[key].default}") from None
    preset = given.get("preset", "official")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: there are {', '.join(PRESETS)}")
    cfg = Config(**{"name": f"ladder_{RUNG.partition('_')[0]}", **PRESETS[preset], **given})
    check_config(cfg)
    return cfg


def check_config(cfg: Config) -> None:
    """Raises UserError for values that no run can have."""
    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(sentence)

    for field in option_fields().values():
        value, least = getattr(cfg, field.name), int(field.name in LEAST_ONE)
        need(field.type is str or least <= value < 2**63, f"{field.name}={value} must be a number of at least {least}")
    need(re.fullmatch(r"\w[\w.+-]{0,99}", cfg.name), f"name={cfg.name!r} cannot name a folder: take letters and digits")
    for key, choices in {"dtype": ("auto", "bfloat16", "float32"), "compile": ("auto", "on", "off"), **CHOICES}.items():
        need(getattr(cfg, key) in choices, f"{key}={getattr(cfg, key)!r} is not one of {', '.join(map(str, choices))}")
    need(0 < cfg.cooldown <= 1, f"cooldown={cfg.cooldown} must be above 0 and at most 1")
    need(cfg.extension < cfg.steps, f"steps={cfg.steps} must be more than extension={cfg.extension}")
    need(cfg.slices % 8 == 0 and all(stage.tokens % cfg.slices == 0 for stage in cfg.stages),
         f"slices={cfg.slices} does not share out a step's tokens among 8 processes: take 8 or 16")
    need(cfg.val_tokens % cfg.val_slice_tokens == 0, f"val_tokens={cfg.val_tokens} is not a whole number of slices: "
         f"take a multiple of val_slice_tokens={cfg.val_slice_tokens}")


LEAST_ONE = ("steps", "slices", "val_tokens", "val_slice_tokens", "log_every", "final_window")


def start_world() -> World:
    """From torchrun's environment, or alone. Raises UserError."""
    rank, local, size = (int(os.environ.get(key, default)) for key, default in
                         (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count()
    if gpus and local >= gpus:
        raise UserError(f"process {local} of this node finds {gpus} GPU(s): start at most {gpus}, with NPROC={gpus}")
    return World(rank, size, torch.device("cuda", local) if gpus else torch.device("cpu"))


def connect(world: World) -> None:
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
        torch.set_float32_matmul_precision("high")
    if world.size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=world.device if cuda else None,
                                timeout=datetime.timedelta(minutes=30))  # ranks may compile at unlike speeds


########################################
#            All rungs: data           #
########################################


def open_shard(path: Path) -> np.ndarray:
    """(N,) uint16, mapped into memory. Raises UserError unless header and size agree."""
    header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    if len(header) < HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{os.path.relpath(path, ROOT)} is not a token shard: make shards with data/local_text.py or "
                        "data/fineweb.py")
    if size != 4 * HEADER_INTS + 2 * header[2]:
        raise UserError(f"shard {os.path.relpath(path, ROOT)} has {size} bytes, not what its header promises: delete "
                        "it and fetch it again")
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS))


class Stream:
    """The tokens of a glob's shards as one stream, joined at the borders. Every process reads it at places that depend
    on the step and the micro-batch alone, so no token comes twice and 1, 2, 4 or 8 processes train on the same."""

    def __init__(self, cfg: Config, what: str, need: int):
        pattern = getattr(cfg, what)
        self.what, self.shards = what, [open_shard(ROOT / file) for file in sorted(glob.glob(pattern, root_dir=ROOT))]
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        found = int(self.ends[-1]) if self.shards else 0
        if found < need:
            remedy = f"run `{fetch_command(cfg)}`" if own_shards(cfg) else "put more token shards there"
            raise UserError(f"{need:,} tokens are needed, {what}={pattern!r} has {len(self.shards)} shard(s) of "
                            f"{found:,} in all: {remedy} or name your own with {what}=")

    def read(self, begin: int, count: int) -> np.ndarray:
        """(count,) int64 from position `begin` of the stream."""
        pieces = [shard[max(0, begin - end + len(shard)):max(0, begin + count - end + len(shard))]
                  for shard, end in zip(self.shards, self.ends, strict=True)]
        tokens = np.concatenate([piece for piece in pieces if len(piece)]).astype(np.int64)
        if tokens.max() >= VOCAB:
            raise UserError(f"a shard of {self.what}= holds token id {tokens.max()}, GPT-2's vocabulary ends at "
                            f"{VOCAB - 1}: tokenise it again with GPT-2's vocabulary")
        return tokens


class Documents:
    """The slices of all steps: whole documents of a stream, each cut at MAX_DOC tokens and the last of a slice to fit;
    the next slice begins with the next document. Slices depend on their number alone. Raises UserError if the stream is
    too short."""

    def __init__(self, stream: Stream, cfg: Config):
        self.stream, self.cfg = stream, cfg
        offsets = stream.ends - [len(shard) for shard in stream.shards]
        self.starts = np.concatenate([np.flatnonzero(shard == BOS) + offset for shard, offset in
                                      zip(stream.shards, offsets, strict=True)])
        sums = np.append(0, np.cumsum(np.minimum(np.diff(self.starts, append=stream.ends[-1]), MAX_DOC)))
        self.first = [0]  # number of the document that each slice begins with
        for count in (cfg.stages[stage_at(cfg, step)].tokens // cfg.slices for step in range(cfg.last_step)
                      for _ in range(cfg.slices)):
            self.first.append(int(np.searchsorted(sums, sums[self.first[-1]] + count + 1)))
            if self.first[-1] >= len(sums):
                raise UserError(f"the {int(sums[-1]):,} tokens of train_files={cfg.train_files!r}, in documents cut at "
                                f"{MAX_DOC}, end before {cfg.last_step} steps do: add shards, or give stop_after=")

    def read(self, step: int, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (count + 1,) of a slice, its last one a target alone, and cu_seqlens."""
        count = self.cfg.stages[stage_at(self.cfg, step)].tokens // self.cfg.slices
        first, last = self.first[step * self.cfg.slices + piece:][:2]
        starts = self.starts[first:last]
        end = min(starts[-1] + MAX_DOC, [*self.starts[last:last + 1], self.stream.ends[-1]][0])
        lengths = np.diff(starts, append=end)
        into = np.arange(end - starts[0]) - np.repeat(starts - starts[0], lengths)  # how far into its document
        tokens = self.stream.read(int(starts[0]), int(end - starts[0]))[into < MAX_DOC][:count + 1]
        return tokens, cu_seqlens(np.append(0, np.cumsum(np.minimum(lengths, MAX_DOC)))[:-1], count)


def cu_seqlens(starts: np.ndarray, total: int) -> np.ndarray:
    """Starts of documents among `total` tokens, then `total` to the end of a table whose length depends on it alone.
    Raises UserError if the documents are too many."""
    table = np.full(-(-total // (300 * 128)) * 128 + 1, total, dtype=np.int32)
    if len(starts) >= len(table):
        raise UserError(f"{total} tokens hold {len(starts)} documents, the table has room for {len(table) - 1}: "
                        "merge documents that are this short")
    table[:len(starts)] = np.minimum(starts, total)
    return table


class Validation:
    """The first val_tokens of a stream in fixed slices, uncut: documents end at BOS and at a slice's end."""

    def __init__(self, stream: Stream, cfg: Config):
        self.stream, self.size = stream, cfg.val_slice_tokens
        tables = [self.read(0, piece)[1] for piece in range(cfg.val_tokens // self.size)]
        self.max_doc = max(int(np.diff(table).max()) for table in tables)

    def read(self, step: int, piece: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.stream.read(piece * self.size, self.size + 1)
        return tokens, cu_seqlens(np.union1d(0, np.flatnonzero(tokens[:-1] == BOS)), self.size)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def own_shards(cfg: Config) -> bool:
    """Whether the globs are the preset's, so that its fetch command makes what they miss."""
    return bool(cfg.fetch) and all(getattr(cfg, key) == PRESETS[cfg.preset].get(key, getattr(Options, key))
                                   for key in ("train_files", "val_files"))


def fetch_command(cfg: Config) -> str:
    return cfg.fetch.format(shards=math.ceil((cfg.tokens + 1) / 1e8))


def fetch(cfg: Config, world: World) -> int:
    """Makes the preset's own shards; does nothing for globs that the user gave."""
    return subprocess.run([sys.executable, *fetch_command(cfg).split()[1:]], cwd=ROOT).returncode \
        if own_shards(cfg) else 0


########################################
#       All rungs: log and clock       #
########################################


class Log:
    """One text file a run, and the console; only rank 0 writes."""

    def __init__(self, cfg: Config, world: World):
        folder = ROOT / cfg.log_dir / f"{datetime.date.today():%Y-%m-%d}_{cfg.name}"
        self.path, self.file = folder / f"{uuid.uuid4()}.txt", None
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "x", buffering=1, encoding="utf-8")

    def write(self, text: str, show: bool = False) -> None:
        if self.file:
            self.file.write(text + "\n")
            if show:
                print(text, flush=True)


def shell(*command: str) -> str:
    """Output of a command, or a word why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else f"({command[0]}: exit {done.returncode})"
    except (OSError, subprocess.TimeoutExpired):
        return f"({command[0]}: not available)"


def hardware(world: World) -> str:
    if world.device.type != "cuda":
        return f"{world.size}x cpu ({platform.machine()}, {os.cpu_count()} cores)"
    major, minor = torch.cuda.get_device_capability(world.device)
    return f"{world.size}x {torch.cuda.get_device_name(world.device)}, compute capability {major}.{minor}"


def log_header(log: Log, cfg: Config, trainer: "Trainer") -> None:
    """Everything needed to run this again: source, versions, machine, git state, configuration."""
    log.write(f"{'=' * 100}\nsource: train_gpt.py\n{'=' * 100}\n{HERE.read_text(encoding='utf-8')}")
    log.write(f"{'=' * 100}\nenvironment\n{'=' * 100}")
    triton = getattr(sys.modules.get("triton"), "__version__", "absent")
    log.write(f"python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__} triton:{triton} "
              f"cuda:{torch.version.cuda}")
    log.write(f"hardware:{hardware(trainer.world)}")
    log.write("driver:" + shell("nvidia-smi", "--query-gpu=driver_version,name,power.limit,clocks.max.sm",
                                "--format=csv,noheader").replace("\n", " | "))
    commit, changed = shell("git", "rev-parse", "HEAD"), shell("git", "status", "--short").split("\n")
    log.write(f"git:{commit} changed files:{', '.join(filter(None, changed)) or 'none'}" if "(" not in commit
              else "git:no commit here; the source above is what ran")
    for field in dataclasses.fields(cfg):
        log.write(f"config {field.name}={getattr(cfg, field.name)}")
    for line in trainer.describe():
        log.write(line, show=True)
    log.write(f"seed:{cfg.seed}")


class Clock:
    """The training clock and named regions outside it, in seconds, read with the device idle."""

    def __init__(self, device: torch.device):
        self.device, self.trained, self.started, self.untimed = device, 0.0, None, {}

    def idle(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.idle()

    def stop(self) -> None:
        self.trained += self.idle() - self.started
        self.started = None

    def read(self) -> float:
        """Training time so far, without waiting for the device."""
        return self.trained + (time.perf_counter() - self.started if self.started is not None else 0.0)

    @contextlib.contextmanager
    def region(self, name: str):
        begin = self.idle()
        yield
        self.untimed[name] = self.untimed.get(name, 0.0) + self.idle() - begin


########################################
#          The rung: training          #
########################################


class Trainer:
    """Model, optimizer, and the one train_step and one evaluate that warm-up and run both use."""

    def __init__(self, cfg: Config, world: World, val_max_doc: int):
        self.cfg, self.world, self.val_max_doc = cfg, world, val_max_doc
        able = world.device.type == "cuda" and torch.cuda.get_device_capability(world.device) >= (8, 0)
        self.dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if able else "float32")
        self.fp8 = choose_fp8(cfg, self.dtype)
        self.compiled = {"on": True, "off": False, "auto": world.device.type == "cuda"}[cfg.compile]
        torch._dynamo.config.recompile_limit = 64  # a graph for each stage, in training and validation
        self.model = GPT(cfg, self.dtype).to(world.device)
        self.optimizer = Optimizer(self.model, cfg, world, self.compile)
        self.slice_loss, self.token_losses = self.compile(slice_loss), self.compile(token_losses)
        self.hidden = self.compile(self.model.forward)
        self.reset()

    def compile(self, function):
        return torch.compile(function, dynamic=False) if self.compiled else function

    def describe(self) -> list[str]:
        cfg, ends = self.cfg, stage_ends(self.cfg)
        rows = [f"stage {i}: steps {start}-{min(end, cfg.last_step) - 1}, {stage.tokens:,} tokens a step = "
                f"{cfg.slices} slices x {stage.tokens // cfg.slices:,} tokens, windows {stage.short}/{stage.long}"
                for i, (start, end, stage) in enumerate(zip([0, *ends[:-1]], ends, cfg.stages, strict=True))
                if start < min(end, cfg.last_step)]
        parameters = sum(p.numel() for p in self.model.parameters())
        return [*rows, f"data: {cfg.tokens:,} training tokens on {self.world.size} process(es), {cfg.val_tokens:,} for "
                f"validation", f"model: {RUNG}, {parameters:,} parameters, {str(self.dtype).removeprefix('torch.')}, "
                f"head {'fp8' if self.fp8 else 'as the rest'}, torch.compile {'on' if self.compiled else 'off'}",
                "operations: every stage on made-up tokens before the clock, state put back after"]

    def reset(self) -> None:
        """Initial weights, drawn on the CPU so that they are equal on every process and machine; no optimizer state."""
        self.model.init_weights(self.cfg.seed)
        self.model.zero_grad(set_to_none=True)
        self.optimizer.reset()
        self.stage = -1

    def enter(self, step: int) -> tuple[Tensor, Tensor]:
        """Carries out what changes when a stage begins; returns the rotary tables."""
        stage = stage_at(self.cfg, step)
        if stage != self.stage:
            if not self.cfg.stages[stage].tied and (self.stage < 0 or self.cfg.stages[self.stage].tied):
                self.optimizer.untie()
            rows = 2 * max(self.cfg.val_slice_tokens, *(each.tokens // self.cfg.slices for each in self.cfg.stages))
            freqs = torch.from_numpy(yarn(self.cfg, stage)[0]).to(self.world.device, torch.float32)
            angles = torch.arange(rows, device=self.world.device, dtype=torch.float32)[:, None] * freqs
            self.rotary = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
            self.stage = stage
        return self.rotary

    def view(self, max_doc: int, final: bool = False) -> View:
        row = self.cfg.stages[self.stage]
        return View(row.short, self.cfg.final_window if final else row.long, max_doc, yarn(self.cfg, self.stage)[1],
                    row.tied)

    def batches(self, read, step: int, count: int):
        """This process's slices of `count`, on the device."""
        for piece in range(self.world.rank, count, self.world.size):
            yield [on_device(torch.from_numpy(x.astype(np.int32)), self.world.device) for x in read(step, piece)]

    def train_step(self, step: int, read) -> Tensor:
        """Forward, backward and update on this process's slices; returns its share of the loss, the mean over tokens
        and weights of the targets ahead."""
        rotary, weights = self.enter(step), ahead_weights(self.cfg, step)
        on_gpu, total = on_device(torch.tensor(weights), self.world.device), torch.zeros((), device=self.world.device)
        for batch in self.batches(read, step, self.cfg.slices):
            loss = self.slice_loss(self.model, *batch, *rotary, self.view(MAX_DOC), on_gpu, self.fp8)
            (loss / self.cfg.slices).backward()
            total += loss.detach()
        self.optimizer.step(step)
        return total / (self.cfg.stages[self.stage].tokens * sum(weights))

    @torch.no_grad()
    def evaluate(self, step: int, read, slices: int) -> float:
        """Mean loss over that many slices of validation tokens, of all processes."""
        rotary = self.enter(min(step, self.cfg.steps - 1))
        view = self.view(self.val_max_doc, step == self.cfg.steps)
        total = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for tokens, table in self.batches(read, step, slices):
            x = self.hidden(tokens[:-1], table, *rotary, view)
            for rows, targets in zip(x.split(32_768), tokens[1:].split(32_768), strict=True):
                total += self.token_losses(rows, self.model.head, targets).sum()
        return self.mean(total, slices * self.cfg.val_slice_tokens)

    def mean(self, total: Tensor, count: int) -> float:
        total = total.double()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total.item() / count

    def warm_up(self) -> None:
        """Compiles and runs every stage on made-up tokens, then puts the state back to its start."""
        draw = np.random.default_rng(0)

        def made_up(size: int):
            return lambda step, piece: (draw.integers(0, VOCAB, size + 1), cu_seqlens(np.arange(0, size, 512), size))

        validate, ends = made_up(self.cfg.val_slice_tokens), stage_ends(self.cfg)
        for start, end, stage in zip([0, *ends[:-1]], ends, self.cfg.stages, strict=True):
            if start < min(end, self.cfg.last_step):
                for step in (start, start + 1):
                    self.train_step(step, made_up(stage.tokens // self.cfg.slices))
                self.evaluate(start, validate, self.world.size)
        if self.cfg.last_step == self.cfg.steps:
            self.evaluate(self.cfg.steps, validate, self.world.size)
        self.reset()


def train(cfg: Config, world: World) -> None:
    clock = Clock(world.device)
    documents = Documents(Stream(cfg, "train_files", cfg.tokens + 1), cfg)
    validation = Validation(Stream(cfg, "val_files", cfg.val_tokens + 1), cfg)
    log = Log(cfg, world)
    with clock.region("process group and model"):
        connect(world)
        trainer = Trainer(cfg, world, validation.max_doc)
    log_header(log, cfg, trainer)
    with clock.region("compilation and warm-up"):
        trainer.warm_up()
    clock.start()
    for step in range(cfg.last_step + 1):
        if step == cfg.last_step or (cfg.val_every and step % cfg.val_every == 0):
            clock.stop()
            with clock.region("validation"):
                val_loss = trainer.evaluate(step, validation.read, cfg.val_tokens // cfg.val_slice_tokens)
            log.write(f"step:{step}/{cfg.steps} val_loss:{val_loss:.4f} train_time:{1e3 * clock.read():.0f}ms "
                      f"step_avg:{1e3 * clock.read() / max(step, 1):.2f}ms", show=True)
            if not math.isfinite(val_loss):
                raise UserError(f"val_loss is {val_loss} at step {step}: the run has diverged; lower its rates")
            if step == cfg.last_step:
                break
            clock.start()
        loss = trainer.train_step(step, documents.read)
        if (step + 1) % cfg.log_every == 0:
            log.write(f"step:{step + 1}/{cfg.steps} train_loss:{trainer.mean(loss, 1):.4f} "
                      f"train_time:{1e3 * clock.read():.0f}ms")
    finish(log, cfg, world, clock, val_loss)


def finish(log: Log, cfg: Config, world: World, clock: Clock, val_loss: float) -> None:
    """The end of the log: what was outside the clock, and the result as JSON."""
    for name, seconds in clock.untimed.items():
        log.write(f"untimed:{name} {seconds:.1f}s")
    result = {"val_loss": round(val_loss, 6), "train_time_ms": round(1e3 * clock.read()),
              "step_avg_ms": round(1e3 * clock.read() / cfg.last_step, 3), "steps": cfg.last_step,
              "scheduled_steps": cfg.steps, "tokens": cfg.tokens, "seed": cfg.seed,
              "preset": cfg.preset, "processes": world.size, "hardware": hardware(world)}
    if world.device.type == "cuda":
        result["peak_memory_allocated_mib"] = torch.cuda.max_memory_allocated(world.device) >> 20
    log.write(json.dumps(result))
    log.write(f"log: {os.path.relpath(log.path, ROOT)}", show=True)


def print_help() -> None:
    print(__doc__)
    for name, field in option_fields().items():
        print(f"  {name + '=' + str(field.default):<50} {field.metadata['doc']}")


def fail(sentence: str, code: int, everywhere: bool = False) -> int:
    """Prints one sentence and returns code. Of several processes with the same trouble the first speaks."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank and not everywhere:
        time.sleep(10 + rank)  # torchrun ends this process when the first has gone
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit code. 2: bad input, 3: out of memory."""
    if argv and argv[0] in ("help", "--help", "-h"):
        print_help()
        return 0
    try:
        command, argv = (fetch, argv[1:]) if argv and argv[0] == "fetch" else (train, argv)
        cfg = parse_options(argv)
        return command(cfg, start_world()) or 0
    except UserError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"cannot use {error.filename or 'a file'}: {error.strerror}", 2)
    except torch.OutOfMemoryError:
        return fail(f"out of GPU memory: double slices= (now {cfg.slices}), which moves where documents are cut, or "
                    f"lower val_slice_tokens= (now {cfg.val_slice_tokens})", 3, everywhere=True)
    except KeyboardInterrupt:
        return fail("interrupted; what was logged so far is under log_dir=", 130)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if not code and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not waiting for others, who may never answer; 2 of 17 gloo runs aborted in the interpreter's exit
