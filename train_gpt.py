"""
Train a GPT-2-class model (122M active parameters) to 3.28 validation loss on FineWeb, as fast as the machine allows.

    ./run.sh                                              8, 4, 2 or 1 GPUs, or the smoke preset on a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py
    python train_gpt.py preset=smoke seed=1               one process, no torchrun
    python train_gpt.py help                              every option

A step's tokens are eight fixed slices of the document stream, each one micro-batch; a process of rank r among w
trains on slices r, r + w, ... so 1, 2, 4 and 8 processes compute the same sum, in a different order.
Importing this file starts nothing. Budget: 1,600 lines, functions of at most 60 lines (forward: 110).
"""
import dataclasses
import difflib
import functools
import glob
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
import triton_kernels
from runtime import Checkpoints, Clock, Console, Log, Profile, UserError, World, knob
from triton_kernels import Kernels, documents, fp8_matmul, number

ROOT = Path(__file__).resolve().parent  # paths count from here
FILES = ("train_gpt.py", "triton_kernels.py", "runtime.py")
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the format of kjj0/fineweb10B-gpt2
BOS = 50256  # GPT-2's end-of-text token; it stands before every document
VOCAB = 50257


# ==================== Configuration: tables ====================

class Layer(NamedTuple):
    """One row a layer; init and forward read it, so no layer number stands anywhere else."""
    window: str = "short"         # attention window: "short", "long", or "" for a layer without attention
    paired: bool = False          # two half-sets of heads interleaved as one sequence of 2T (record #58)
    key_offset: bool = False      # the key half that does not rotate comes from the token before (record #49)
    value_embed: bool = False     # adds a gated token embedding to V (arXiv 2410.17897, record #14)
    exclusive: bool = False       # heads leave out what lies along the token's own V (XSA, arXiv 2603.09078)
    reads: int | None = None      # attention reads the output of an earlier layer (record #77)
    mixes: int | None = None      # V and the stream around both additions mixed with x0 and that output (#81)
    final: float | None = None    # mixed into the model's output as x0 and value embeddings are; first factor (#81)


class Shape(NamedTuple):
    dim: int
    heads: int
    head_dim: int
    mlp_dim: int
    bigram_rows: int              # rows of the hashed bigram table; the last is for the first token
    layers: tuple[Layer, ...]
    mix_dim: int = 64             # width of the small networks that mix the residual stream
    mix_groups: int = 12          # groups of channels that the last mix weighs apart
    attn_scale: float = 0.1       # softmax scale of the first window; grows with the window (YaRN)
    vocab: int = 50304            # 50,257 padded to a multiple of 128

    @property
    def attn_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.window]

    @property
    def value_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.value_embed]


class Stage(NamedTuple):
    """One row a stage. Windows count the tokens a query sees before itself; in paired layers, half as many."""
    end: float                    # fraction of the scheduled steps at which the stage ends; above 1: the extension
    tokens: int                   # tokens a step, over all slices
    max_doc: int                  # documents are cut at this length
    short: int
    long: int
    lr: float                     # learning rate multiplier before the cooldown
    mtp: tuple[tuple[float, ...], tuple[float, ...]]  # multi-token weights at the stage's start and end
    prefix: tuple[float, float] = (0, 0)  # the same of the next token's longest prefix that is a token (record #88)
    sample: int = 0               # tokens of the vocabulary that a slice's softmax is over; 0: all (record #92)


class Param(NamedTuple):
    """One row a parameter: who updates it, how fast, how it decays."""
    algorithm: str                # "normuon" (every step) or "adam" (odd steps, on the sum of two steps' gradients)
    lr_mul: tuple[float, ...]     # cycled over the matrices of a bank
    wd_mul: float
    betas: tuple[float, float] = (0.0, 0.0)


# Record #64's (reference: its log's source), and later records' where a column or a comment names them.
GPT2_SHAPE = Shape(dim=768, heads=6, head_dim=128, mlp_dim=3072, bigram_rows=377_280, layers=(
    Layer("short", paired=True, value_embed=True),
    Layer("short", exclusive=True, value_embed=True),
    Layer("short", paired=True),
    Layer("long", exclusive=True, key_offset=True, final=0.0),
    Layer("short", exclusive=True),
    Layer("short", paired=True),
    Layer(""),
    Layer("short", exclusive=True, final=-0.5),
    Layer("short", value_embed=True),
    Layer("short", exclusive=True),
    Layer("short", paired=True, value_embed=True, reads=7, final=0.0),
    Layer("long", key_offset=True, value_embed=True, reads=7, mixes=7),
))
GPT2_STAGES = (
    Stage(1 / 3, 131_072, 896, 128, 384, 1.0, ((1, .5, .25), (1, .5, 0)), (.25, .25), 10_240),
    Stage(2 / 3, 262_144, 2048, 384, 896, 1.52, ((1, .5), (1, 0)), (.25, 0), 12_288),
    Stage(.92, 393_216, 2048, 640, 1408, 1.73, ((1,), (1,)), (0, 0), 16_384),
    Stage(2, 393_216, 2048, 768, 1664, 1.73, ((1,), (1,))),
)
SMOKE_SHAPE = Shape(dim=128, heads=2, head_dim=64, mlp_dim=512, bigram_rows=8192, mix_groups=2, layers=(
    Layer("short", paired=True, value_embed=True),
    Layer("long", exclusive=True, key_offset=True),
    Layer("", final=-0.5),
    Layer("short", value_embed=True, reads=1, mixes=1),
))
SMOKE_STAGES = (
    Stage(1 / 3, 1024, 96, 32, 64, 1.0, ((1, .5), (1, 0))),
    Stage(2 / 3, 1536, 192, 48, 96, 1.23, ((1,), (1,))),
    Stage(1, 2048, 256, 64, 128, 1.41, ((1,), (1,))),
    Stage(2, 2048, 256, 96, 192, 1.41, ((1,), (1,))),
)

# Table order is the order in which gradients are reduced, parameters updated and gathered: each update runs while the
# reductions of the rows below it are under way. Multipliers: record #64.
PARAMS = {
    "qk_bank": Param("normuon", (1.0,), 1.0),
    "vo_bank": Param("normuon", (1.0,), 1.0),
    "mlp_bank": Param("normuon", (1.0, 2.0), 1.0),  # up, down
    "value_embeds": Param("adam", (75.0,), 5.0, (.75, .95)),
    "bigram_embed": Param("adam", (75.0,), 5.0, (.75, .95)),
    "head": Param("adam", (1.0,), 150.0, (.5, .95)),  # also embeds the tokens
    "small": Param("adam", (1.0,), 1.0),  # packed; the rows of SMALL_PARAMS govern its parts
}
SMALL_PARAMS = {  # layers: L all, A attend, E embed values, N mix; H heads, G channels, S sources, M mix_dim, D dim
    "resid_lambdas": Param("adam", (5.0,), 0.0, (.9, .99)),   # (L,) scale of the residual stream at each layer
    "x0_lambdas": Param("adam", (5.0,), 0.0, (.65, .95)),     # (L,) how much of the embedding is mixed back in
    "bigram_lambdas": Param("adam", (5.0,), 0.0, (.9, .99)),  # (L + 1,) the same of the bigram, first at the input
    "attn_lambdas": Param("adam", (5.0,), 0.0, (.9, .99)),    # (A, 2) scales of the QKV and the output matrix
    "smear_lambda": Param("adam", (5.0,), 0.0, (.9, .99)),    # ()
    "final_lambdas": Param("adam", (5.0,), 0.0, (.9, .99)),   # (S,) sources of the last mix
    "smear_gate": Param("adam", (.01,), 0.0, (.9, .99)),      # (G,) gates read the first G channels
    "attn_gates": Param("adam", (1.0,), 1.0, (.9, .99)),      # (A, H, G)
    "value_gates": Param("adam", (1.0,), 1.0, (.9, .99)),     # (E, H, G)
    "mix_in": Param("adam", (.1,), 1.0, (.9, .99)),           # (L, M, D) networks of a token's own coefficients
    "mix_out": Param("adam", (.1,), 1.0, (.9, .99)),          # (L, 2 + H, M) x0, bigram, exclusion by head
    "layer_mix_in": Param("adam", (.25,), 1.0, (.9, .99)),    # (N, M, D) for the N layers that mix
    "layer_mix_out": Param("adam", (.25,), 1.0, (.9, .99)),   # (N, 12, M) V 3; stream before 3, with attention 4, MLP 2
    "final_in": Param("adam", (.25,), 1.0, (.9, .99)),        # (M, D)
    "final_out": Param("adam", (.25,), 1.0, (.9, .99)),       # (S groups, M)
}
GATE_CHANNELS = 12  # record #28
SUMMED = ("value_embeds", "bigram_embed")  # tables of which a slice reads few rows: see LookUp


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting. Those with a doc can be given as key=value; the others are tables that a preset chooses."""
    preset: str = knob("official", "official, 24gb (on small GPUs), corpus (that you bring) or smoke (on a CPU)")
    name: str = knob("", "name of the run in the log's path; default: the preset")
    seed: int = knob(0, "seed of the initial weights; trial k uses seed + k")
    trials: int = knob(1, "compile once, then train this many times")
    steps: int = knob(1515, "scheduled steps")
    extension: int = knob(40, "steps after the schedule, at its last learning rate, with a longer window")
    stop_after: int = knob(0, "stop after this many steps of the unchanged schedule; 0: train to the end")
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards, in order")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    val_tokens: int = knob(10_485_760, "validation tokens, from the start of the validation shards")
    val_slice_tokens: int = knob(262_144, "validation tokens per forward pass; lower it to save memory")
    val_every: int = knob(250, "steps between validations; 0: only at the end")
    log_every: int = knob(10, "steps between train_loss lines")
    token_tables: str = knob("data/gpt2_tokens.npz", "what is known of each token; data/gpt2_tokens.py makes it")
    log_dir: str = knob("records/runs", "where logs are written, and checkpoints beside them")
    save_every: int = knob(0, "steps between checkpoints, even; the last step has one too; 0: none")
    keep: int = knob(2, "newest checkpoints of the run that stay; 0: all")
    resume: str = knob("", "checkpoint to go on from, with the options of its run; also on another number of GPUs")
    profile: int = knob(0, "step from which two are profiled: a Chrome trace beside the log, a table in it; 0: none")
    slices: int = knob(8, "slices (micro-batches) a step; 16 halves their memory and moves where documents are cut")
    dtype: str = knob("auto", "auto (bfloat16 on a GPU, float32 else), bfloat16, float32 or float64")
    fp8: str = knob("auto", "FP8 in head (compute capability 8.9 and up) and MLP (9.0): auto, on or off")
    kernels: str = knob("auto", "auto (triton_kernels.py where the GPU can), library (PyTorch's) or reference")
    compile: str = knob("auto", "torch.compile: auto (on a GPU), on or off")
    lr_normuon: float = knob(0.023, "learning rate of the matrices")
    lr_adam: float = knob(0.008, "learning rate of everything else")
    cooldown: float = knob(0.6, "share of the scheduled steps over which the learning rate falls")
    lr_floor: float = knob(0.15, "learning rate factor at the end of the schedule")
    momentum_warmup: int = knob(300, "steps over which NorMuon's momentum rises from 0.85 to 0.95")
    momentum_cooldown: int = knob(50, "last steps, over which it falls back")
    final_window: int = knob(2560, "long window of the last validation (no YaRN update, record #33)")
    fetch: str = "python data/cached_fineweb10B.py 9"  # makes the shards of this preset; "": they are brought by hand
    shape: Shape = GPT2_SHAPE
    stages: tuple[Stage, ...] = GPT2_STAGES

    @property
    def total_steps(self) -> int:
        return self.steps + self.extension

    @property
    def last_step(self) -> int:
        return min(self.stop_after or self.total_steps, self.total_steps)


PRESETS = {
    "official": {},
    "corpus": dict(steps=444, extension=8, val_every=148, train_files="data/corpus/corpus_train_*.bin",
                   val_files="data/corpus/corpus_val_*.bin", fetch=""),
    "24gb": dict(slices=32, val_slice_tokens=65_536),  # the official track on GPUs of 24 GB: expected_memory
    "smoke": dict(shape=SMOKE_SHAPE, stages=SMOKE_STAGES, steps=72, extension=8, val_every=20, log_every=4,
                  val_tokens=8192, val_slice_tokens=512, final_window=224, momentum_warmup=30, momentum_cooldown=10,
                  train_files="data/local_text/local_train_*.bin", val_files="data/local_text/local_val_*.bin",
                  fetch="python data/local_text.py"),
}


def parse_options(argv: list[str]) -> Config:
    """key=value arguments to a Config: defaults, then the preset, then the given values. Raises UserError."""
    given = runtime.parse_arguments(argv, Config, "train_gpt.py")
    preset = given.get("preset", "official")
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)
        raise UserError(f"unknown preset {preset!r}: did you mean preset={near[0]}? There are {', '.join(PRESETS)}")
    cfg = Config(**{"name": preset, **PRESETS[preset], **given})
    check_config(cfg)
    return cfg


def check_config(cfg: Config) -> None:
    """Raises UserError for values that no run can have."""
    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(sentence)

    for key in ("trials", "steps", "val_tokens", "val_slice_tokens", "log_every", "slices", "final_window"):
        need(getattr(cfg, key) >= 1, f"{key}={getattr(cfg, key)} must be at least 1")
    for key in ("extension", "stop_after", "val_every", "seed", "momentum_warmup", "momentum_cooldown", "save_every",
                "keep", "profile"):
        need(getattr(cfg, key) >= 0, f"{key}={getattr(cfg, key)} must not be negative")
    for key in ("lr_normuon", "lr_adam", "lr_floor"):
        need(math.isfinite(getattr(cfg, key)) and getattr(cfg, key) >= 0, f"{key}={getattr(cfg, key)} must be a finite "
             f"number that is not negative: the default is {getattr(Config, key)}")
    need(re.fullmatch(r"\w[\w.+-]{0,99}", cfg.name), f"name={cfg.name!r} cannot name a folder: take letters "
         "and digits, with _ . + - between them, at most 100")
    need(cfg.log_dir, "log_dir= is empty: give a folder, for example log_dir=records/runs")
    need(cfg.seed + cfg.trials <= 2**63, f"seed={cfg.seed} is too large: take one below 2**63")
    need(0 < cfg.cooldown <= 1, f"cooldown={cfg.cooldown} must be above 0 and at most 1")
    for key, choices in (("dtype", ("auto", "bfloat16", "float32", "float64")), ("fp8", ("auto", "on", "off")),
                         ("kernels", triton_kernels.MODES), ("compile", ("auto", "on", "off"))):
        need(getattr(cfg, key) in choices, f"{key}={getattr(cfg, key)!r} is not one of {', '.join(choices)}")
    need(cfg.slices % 8 == 0, f"slices={cfg.slices} does not divide among 8 processes: take 8, 16 or 32")
    need(cfg.save_every % 2 == 0, f"save_every={cfg.save_every} is odd, and Adam gathers the gradients of two steps: "
         f"take save_every={cfg.save_every + 1}")
    need(not cfg.save_every or cfg.last_step % 2 == 0 or cfg.last_step == cfg.total_steps, f"stop_after="
         f"{cfg.stop_after} is odd, and no run could go on from its checkpoint: take {cfg.last_step + 1}")
    need(not cfg.profile or cfg.profile + 2 <= cfg.last_step,
         f"profile={cfg.profile} takes two steps from there, and the run has {cfg.last_step}: lower it")
    need(not cfg.profile or all(not every or (cfg.profile + 1) % every for every in (cfg.val_every, cfg.save_every)),
         f"profile={cfg.profile} has a validation or checkpoint between its steps: take another, or val_every=0")
    need(not cfg.resume or cfg.trials == 1, f"resume= goes on with one run, not trials={cfg.trials}: leave one out")
    for i, layer in enumerate(cfg.shape.layers):
        need(layer.window in ("", "short", "long") and {layer.reads, layer.mixes} <= {None, *range(i)},
             f"layer {i} has a window other than short and long or names a layer that is not before it: mend {layer}")
    for stage in cfg.stages:
        need(stage.tokens % cfg.slices == 0, f"a batch of {stage.tokens} tokens does not divide into slices="
             f"{cfg.slices} equal slices: take slices=8")
    need(cfg.val_tokens % (8 * cfg.val_slice_tokens) == 0, f"val_tokens={cfg.val_tokens} does not divide into eight "
         f"equal shares of val_slice_tokens={cfg.val_slice_tokens}: take a multiple of {8 * cfg.val_slice_tokens}")


# ==================== Schedule ====================

def stage_ends(cfg: Config) -> list[int]:
    """Step at which each stage ends. Ends within the schedule are even, so that a stage starts on a step without
    Adam and finds no gradient half accumulated."""
    return [2 * round(stage.end * cfg.steps / 2) for stage in cfg.stages[:-1]] + [cfg.total_steps]


def stage_at(cfg: Config, step: int) -> int:
    """Index of the stage of a step; the last stage also answers for the step after the end (the last validation)."""
    return next((i for i, end in enumerate(stage_ends(cfg)) if step < end), len(cfg.stages) - 1)


def lr_factor(cfg: Config, step: int) -> float:
    """The stage's multiplier, then linear to the floor over the last `cooldown` of the schedule."""
    left = min(1.0, max(0.0, (1 - step / cfg.steps) / cfg.cooldown))
    return cfg.stages[stage_at(cfg, step)].lr * left + cfg.lr_floor * (1 - left)


def momentum(cfg: Config, step: int, low: float = 0.85, high: float = 0.95) -> float:
    rise = min(1.0, step / max(1, cfg.momentum_warmup))
    fall = min(1.0, max(0, cfg.total_steps - step) / max(1, cfg.momentum_cooldown))
    return low + (high - low) * min(rise, fall)


def target_weights(cfg: Config, step: int) -> list[float]:
    """Weights in the loss of the next tokens (arXiv 2404.19737, record #53) and, in stages that have it, of the next
    one's prefix: linear between the ends of the stage."""
    ends, i = [0, *stage_ends(cfg)], stage_at(cfg, step)
    progress = (step - ends[i]) / max(1, ends[i + 1] - ends[i])
    ranges = [*zip(*cfg.stages[i].mtp, strict=True), *[cfg.stages[i].prefix] * any(cfg.stages[i].prefix)]
    return [a + (b - a) * progress for a, b in ranges]


class View(NamedTuple):
    """What a forward pass sees; constants of a compiled graph."""
    short: int      # window in tokens before the query
    long: int
    scale: float    # attention softmax scale
    prefix: bool = False  # the loss has a term of the next token's prefix
    sample: int = 0       # tokens that the softmax of the loss is over; 0: all


def yarn(cfg: Config, stage: int) -> tuple[np.ndarray, float]:
    """Rotary frequencies (float64, (head_dim / 4,), radians a token) and softmax scale of a stage.

    At every change of the long window w -> w', frequencies that turn less than once in w are interpolated by w / w'
    and those that turn more than 32 times are kept (YaRN, arXiv 2309.00071; here by record #31)."""
    count = cfg.shape.head_dim // 4
    freqs = (1 / 1024) ** np.linspace(0, 1, count)
    scale = cfg.shape.attn_scale
    for old, new in zip(cfg.stages[:stage], cfg.stages[1:stage + 1], strict=True):
        turns = old.long * freqs / (2 * np.pi)
        keep = np.clip((turns - 1) / (32 - 1), 0, 1)
        freqs = freqs * (old.long / new.long * (1 - keep) + keep)
        scale *= 1 + 0.2 * math.log(new.long / old.long)
    return freqs, scale


def stage_view(cfg: Config, stage: int, final: bool = False) -> View:
    row = cfg.stages[stage]
    return View(row.short, cfg.final_window if final else row.long, yarn(cfg, stage)[1], any(row.prefix), row.sample)


def validation_view(cfg: Config, step: int) -> tuple[int, View]:
    """The stage and the windows with which validation sees the model after a step."""
    stage = stage_at(cfg, min(step, cfg.total_steps - 1))
    return stage, stage_view(cfg, stage, final=step == cfg.total_steps)


def rotary_tables(cfg: Config, stage: int, length: int, device, dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim / 4)."""
    freqs = torch.from_numpy(yarn(cfg, stage)[0]).to(device, torch.float32)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * freqs
    return angles.cos().to(dtype), angles.sin().to(dtype)


# ==================== Operations ====================

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class LookUp(torch.autograd.Function):
    """table[rows], whose gradient backward adds to `sums` at once, in those rows alone: else each slice fills, reads
    and writes tables of 1 GB. sums: like the table, at least float32; the table itself gets no .grad."""

    @staticmethod
    def forward(ctx, table, rows, sums):
        ctx.save_for_backward(rows, sums)
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx, upstream):
        rows, sums = ctx.saved_tensors
        sums.index_add_(0, rows.flatten(), upstream.flatten(0, -2).to(sums.dtype))
        return None, None, None


def look_up(rows: Tensor, table: Tensor, sums: Tensor | None) -> Tensor:
    return F.embedding(rows, table) if sums is None else LookUp.apply(table, rows, sums)


def bigram_hash(tokens: Tensor, rows: int) -> Tensor:
    """(T,) int32 token ids to rows of the bigram table; the first token has the last row (record #62)."""
    hashed = torch.bitwise_xor(tokens[1:] * 36313, tokens[:-1] * 27191) % (rows - 1)  # below 2^31 for GPT-2's ids
    return torch.cat((torch.full_like(tokens[:1], rows - 1), hashed))


def bigram_vectors(tokens: Tensor, table: Tensor, signs: Tensor, sums: Tensor | None = None) -> Tensor:
    """(T,) tokens to (T, D): the hashed row, each channel's sign by another hash, so that bigrams which share a row
    disturb one another less (record #83). signs: (a power of two, D), 1 or -1."""
    before = F.pad(tokens[:-1], (1, 0))
    hashed = torch.bitwise_and(torch.bitwise_xor(before * 30011, tokens * 48271), len(signs) - 1)  # wraps in int32
    return look_up(bigram_hash(tokens, len(table)), table, sums) * F.embedding(hashed, signs)


def narrow(x: Tensor, w: Tensor) -> Tensor:
    """x (T, K) @ w', w (N, K) padded to a multiple of 16 rows: cuBLAS is slow with an odd few (1.1% of stage 1)."""
    return (x @ F.pad(w.to(x.dtype), (0, 0, 0, -len(w) % 16)).t())[:, :len(w)]


def mix(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Corrections, a token's own, to learned coefficients: x (T, D), w_in (M, D), w_out (N, M) to (T, N) (MUDD, arXiv
    2502.12170; records #81, #85)."""
    return narrow(0.1 * F.gelu(x @ w_in.to(x.dtype).t()), w_out)


def weigh(amounts: Tensor, sources: Iterable[Tensor]) -> Tensor:
    """sum over k of amounts[:, k] * sources[k], each of G groups of channels by its own amount: amounts (T, K, G),
    K sources of (T, D), out (T, D)."""
    groups = amounts.size(2)
    return sum(amount[..., None] * source.unflatten(1, (groups, -1))
               for amount, source in zip(amounts.unbind(1), sources, strict=True)).flatten(1)


def exclude(y: Tensor, v: Tensor, amount: Tensor) -> Tensor:
    """Takes out of attention's output y (T, H, head_dim) the share tanh(amount), (T, H), of what lies along v."""
    along = (y * v).sum(-1) / v.square().sum(-1).clamp_min(1e-8)
    return y - (torch.tanh(amount) * along)[..., None] * v


# Scales of FP8, by hand: stored = value / scale. Inputs are RMS-normed, so |x| < 28. The head's: record #51. The MLP's
# six products in FP8 took 6.5% off the corpus run's time, for 39 lines (records #84, #89, #92; NOTES.md, 35).
FP8_X, FP8_W, FP8_GRAD = 100 / 448, 1.6 / 448, 0.75 / 448
FP8_MLP = 28 / 448, 8 / 448, 8.0, 2.0**-13, 2.0**-11  # x, matrices, hidden layer; gradients of output and hidden layer


class HeadLoss(torch.autograd.Function):
    """sum over rows of the softcapped multi-token cross entropy of x W'.

    x: (T, D), RMS-normed; w: (V, D); targets: (T, K), -1 where there is none; weights: (K,) float32; out: () float32.
    The gradient of the logits is made with the loss, so no logits are kept (records #60, #79). With fp8 the three
    products run on e4m3 inputs and e5m2 gradients, and the rest in x's dtype (record #19); FP8 products want the inner
    dimension contiguous on both sides, so everything is written in both layouts where it is made."""

    @staticmethod
    def forward(ctx, x, w, targets, weights, fp8, kernels):
        ctx.fp8 = fp8
        if fp8:
            x, x_t = kernels.quantize_transpose(x, number(x, FP8_X))
            w, w_t = kernels.quantize_transpose(w, number(w, FP8_W))
            logits = fp8_matmul(x, w.t(), FP8_X, FP8_W, fast=True)
            losses, *grads = kernels.cross_entropy(logits, targets, weights, 1 / FP8_GRAD, torch.float8_e5m2,
                                                   both_layouts=True)
            ctx.save_for_backward(x_t, w_t, *grads)
        else:
            losses, grad, _ = kernels.cross_entropy(x @ w.t(), targets, weights, 1.0, x.dtype)
            ctx.save_for_backward(x, w, grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        if ctx.fp8:
            x_t, w_t, grad, grad_t = ctx.saved_tensors
            scale = upstream * FP8_GRAD
            dx = fp8_matmul(grad, w_t.t(), scale, FP8_W, fast=False)
            dw = fp8_matmul(grad_t, x_t.t(), scale, FP8_X, fast=False)
        else:
            x, w, grad = ctx.saved_tensors
            upstream = upstream.to(x.dtype)
            dx, dw = upstream * (grad @ w), upstream * (grad.t() @ x)
        return dx, dw, None, None, None, None


def sample_vocabulary(targets: Tensor, vocab: int, size: int) -> Tensor:
    """(size,) int64, distinct tokens, ascending: the targets (T, K) (-1: none), as far as there is room, and as many
    others as there is room for, spread evenly and by another start for each slice. The softmax over them is not
    corrected for the others (record #92). 8% of stage 3's time for 0.0012 of loss, one seed (NOTES.md, 26)."""
    wanted = targets.where(targets >= 0, targets[:, :1]).flatten()
    known = torch.zeros(vocab, dtype=torch.int64, device=targets.device).index_fill(0, wanted.long(), vocab)
    order = (torch.arange(vocab, device=targets.device) * 20011 + targets[:, 0].sum()) % vocab  # a permutation
    return (known + order).topk(size, sorted=False).indices.sort().values


def token_losses(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross entropy of each row under the softcap, float32 (T,): what validation reports."""
    return F.cross_entropy(capped_logits(x, w), targets.long(), reduction="none")


def capped_logits(x: Tensor, w: Tensor) -> Tensor:
    """(T, dim), (vocab, dim) to (T, vocab), at least float32."""
    return 23 * torch.sigmoid(((x @ w.t()).to(torch.promote_types(x.dtype, torch.float32)) + 5) / 7.5)


# ==================== Model ====================

def small_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    layers, attn, values = len(shape.layers), len(shape.attn_layers), len(shape.value_layers)
    deep = sum(layer.mixes is not None for layer in shape.layers)
    sources = 1 + sum(layer.final is not None for layer in shape.layers) + values
    return {
        "resid_lambdas": (layers,), "x0_lambdas": (layers,), "bigram_lambdas": (layers + 1,),
        "attn_lambdas": (attn, 2), "smear_lambda": (), "final_lambdas": (sources,),
        "smear_gate": (GATE_CHANNELS,), "attn_gates": (attn, shape.heads, GATE_CHANNELS),
        "value_gates": (values, shape.heads, GATE_CHANNELS),
        "mix_in": (layers, shape.mix_dim, shape.dim), "mix_out": (layers, 2 + shape.heads, shape.mix_dim),
        "layer_mix_in": (deep, shape.mix_dim, shape.dim), "layer_mix_out": (deep, 12, shape.mix_dim),
        "final_in": (shape.mix_dim, shape.dim), "final_out": (sources * shape.mix_groups, shape.mix_dim),
    }


def unpack(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views of a packed vector by name."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """sigmoid of a linear map of the first channels: x (T, D), weight (H, G) to (T, H)."""
    return torch.sigmoid(narrow(x[:, :weight.size(1)], weight))


class GPT(nn.Module):
    """Parameters by name; every matrix of a kind in one bank, so that an optimizer step is a few large operations.

    qk_bank: (A H padded, 2 head_dim, D), of each attention layer the heads of Q, then of K, in the pairs that NorMuon
    takes (record #80); vo_bank: (2A padded, D, D), V and O; mlp_bank: (2L padded, F, D), up and down, the latter
    transposed. Matrices and tables have `dtype`; the packed small parameters are at least float32."""

    def __init__(self, shape: Shape, dtype: torch.dtype, kernels: Kernels, tables: tuple[Tensor, Tensor],
                 processes: int = 8):
        super().__init__()
        self.shape, self.kernels = shape, kernels
        self.small_shapes = small_shapes(shape)
        self.banks = {  # matrices, rows of each
            "qk_bank": (len(shape.attn_layers) * shape.heads, 2 * shape.head_dim),
            "vo_bank": (2 * len(shape.attn_layers), shape.dim), "mlp_bank": (2 * len(shape.layers), shape.mlp_dim)}
        share = max(8, processes)
        sizes = {  # banks are padded so that the processes hold equal shares
            **{name: (-(-count // share) * share, rows, shape.dim) for name, (count, rows) in self.banks.items()},
            "value_embeds": (len(shape.value_layers) * shape.vocab, shape.dim),
            "bigram_embed": (shape.bigram_rows, shape.dim),
            "head": (shape.vocab, shape.dim),
        }
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=dtype)))  # drawn by init_weights
        signs = torch.randint(0, 2, (8192, shape.dim), generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.register_buffer("signs", signs.to(dtype))
        self.register_buffer("prefixes", tables[0])
        self.register_buffer("kinds", tables[1])
        for name in SUMMED:
            self.register_buffer(f"{name}_sums", None, persistent=False)  # the optimizer's
        small = sum(math.prod(size) for size in self.small_shapes.values())
        self.small = nn.Parameter(torch.zeros(small, dtype=torch.promote_types(dtype, torch.float32)))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The same weights for a seed on every machine: drawn on the CPU in float32. Scales: records #64, #70, #85."""
        draw = torch.Generator().manual_seed(seed)

        def fill(tensor: Tensor, bound: float = 0.0, deviation: float = 0.0) -> None:
            new = torch.empty(tensor.shape)
            tensor.copy_(new.uniform_(-bound, bound, generator=draw) if bound else
                         new.normal_(0, deviation, generator=draw))

        for parameter in self.parameters():
            parameter.zero_()
        for name, (count, _) in self.banks.items():
            bank = getattr(self, name)[:count]
            fill(bank[::2] if name == "mlp_bank" else bank,  # the way down starts at zero
                 bound=0.5 * (3 / self.shape.dim) ** 0.5)  # standard deviation 0.5 / sqrt(dim)
        fill(self.head, deviation=0.005)
        for table in self.value_embeds.split(self.shape.vocab):
            fill(table, deviation=0.01)
        small = unpack(self.small, self.small_shapes)
        small["resid_lambdas"].fill_(1.1)
        small["bigram_lambdas"].fill_(0.1)
        factors = [layer.final for layer in self.shape.layers if layer.final is not None]
        small["final_lambdas"][1:1 + len(factors)] = torch.tensor(factors)
        for name in ("mix_in", "layer_mix_in", "final_in"):
            fill(small[name], bound=self.shape.dim ** -0.5)
        small["attn_lambdas"].copy_(torch.tensor([0.5, 1.0]).expand(len(self.shape.attn_layers), 2))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, max_doc: int, cos: Tensor, sin: Tensor, view: View,
                fp8: bool = False) -> Tensor:
        """Packed documents to RMS-normed hidden states; fp8: the MLPs' products in FP8, where their kernels run.

        tokens: (T,) int32; cu_seqlens: (N + 1,) int32 document starts, padded with T; cos, sin: (at least 2T,
        head_dim / 4); out: (T, dim)."""
        shape = self.shape
        small = unpack(self.small, self.small_shapes)
        resid, x0_lambdas, bigram_lambdas = (small[f"{name}_lambdas"].unbind() for name in ("resid", "x0", "bigram"))
        attn_rows = zip(self.qk_bank.split(shape.heads), self.vo_bank.split(2), small["attn_lambdas"].unbind(),
                        small["attn_gates"].unbind(), strict=False)  # the banks' last rows may be padding
        mlp_rows = self.mlp_bank.unbind()
        networks = zip(small["mix_in"].unbind(), small["mix_out"].unbind(), strict=True)
        mixers = zip(small["layer_mix_in"].unbind(), small["layer_mix_out"].unbind(), strict=True)

        x = F.embedding(tokens, self.head)
        x = torch.cat((x[:1], x[1:] + small["smear_lambda"] * gate(x[1:], small["smear_gate"][None]) * x[:-1]))
        x = x0 = rms_norm(x)
        bigram = bigram_vectors(self.kinds[tokens], self.bigram_embed, self.signs, self.bigram_embed_sums)
        x = x + bigram_lambdas[0] * bigram
        tables = torch.arange(len(shape.value_layers), device=tokens.device, dtype=tokens.dtype) * shape.vocab
        embedded = look_up(tables[:, None] + tokens, self.value_embeds, self.value_embeds_sums).unbind()
        values = zip(embedded, small["value_gates"].unbind(), strict=True)

        where = documents(cu_seqlens, max_doc, len(tokens))
        outputs = []
        for i, (layer, network) in enumerate(zip(shape.layers, networks, strict=True)):
            h = rms_norm(x if layer.reads is None else outputs[layer.reads])
            x0_mix, bigram_mix, excluded = mix(h, *network).split((1, 1, shape.heads), 1)
            extra = None
            if layer.mixes is not None:
                by = mix(rms_norm(x), *next(mixers))[..., None].split((3, 3, 4, 2), 1)
                extra = weigh(by[0], (x0, outputs[layer.mixes], x))
                x = x + weigh(by[1], (x, x0, outputs[layer.mixes]))
            x = resid[i] * x + (x0_lambdas[i] + x0_mix) * x0 + (bigram_lambdas[i + 1] + bigram_mix) * bigram
            value = next(values) if layer.value_embed else None
            if layer.window:
                y = self.attend(h, layer, next(attn_rows), value, extra, excluded, where, cos, sin, view)
                x = x + y if extra is None else x + y + weigh(by[2], (x, y, x0, bigram))
            y = self.kernels.mlp(rms_norm(x), mlp_rows[2 * i], mlp_rows[2 * i + 1], FP8_MLP * fp8)
            x = x + y if extra is None else x + y + weigh(by[3], (x, y))
            outputs.append(x)

        sources = [x0, *(outputs[i] for i, layer in enumerate(shape.layers) if layer.final is not None), *embedded]
        amounts = small["final_lambdas"].to(x.dtype)[:, None] + mix(rms_norm(x), small["final_in"], small["final_out"]
                                                                    ).view(len(x), len(sources), shape.mix_groups)
        return rms_norm(x + weigh(amounts, sources))

    def attend(self, x: Tensor, layer: Layer, rows: tuple[Tensor, ...], value: tuple[Tensor, Tensor] | None,
               extra: Tensor | None, excluded: Tensor, where: triton_kernels.Documents, cos: Tensor, sin: Tensor,
               view: View) -> Tensor:
        """Self-attention of normed inputs x (T, dim), to (T, dim). extra: (T, dim), added to V; excluded: (T, H)."""
        heads, head_dim = self.shape.heads, self.shape.head_dim
        w_qk, (w_v, w_out), (qkv_scale, out_scale), gate_weight = rows
        qk, v = x @ (qkv_scale * w_qk.flatten(0, 1)).t(), (x @ (qkv_scale * w_v).t()).view(-1, heads, head_dim)
        if value is not None:
            v = v + 2 * gate(x, value[1])[..., None] * value[0].view(v.shape)
        if extra is not None:
            v = v + extra.view(v.shape)
        y = self.kernels.attention(qk, v.flatten(1), where, heads, getattr(view, layer.window), view.scale, cos, sin,
                                   gate(x, gate_weight), paired=layer.paired, key_offset=layer.key_offset)
        if layer.exclusive:
            y = exclude(y.view(v.shape), v, excluded).flatten(1)
        return y @ (out_scale * w_out).t()


def slice_loss(model: GPT, tokens: Tensor, cu_seqlens: Tensor, max_doc: int, cos: Tensor, sin: Tensor, view: View,
               weights: Tensor, fp8: bool) -> Tensor:
    """Training loss of one slice, summed over its tokens. tokens: (T + 1,) int32; weights: (K,) float32."""
    x, w = model(tokens[:-1], cu_seqlens, max_doc, cos, sin, view, fp8), model.head
    prefix = model.prefixes[tokens[1:]] if view.prefix else None
    targets = triton_kernels.further_targets(tokens[1:], len(weights) - view.prefix, prefix)
    if view.sample:
        candidates = sample_vocabulary(targets, len(w), view.sample)
        targets, w = triton_kernels.candidate_positions(targets, candidates, len(w)), F.embedding(candidates, w)
    return HeadLoss.apply(x, w, targets, weights, fp8, model.kernels)


# ==================== Optimizer ====================

def normuon_direction(g: Tensor, momentum_buffer: Tensor, second: Tensor, mu: Tensor, beta2: float,
                      orthogonalise: Callable) -> Tensor:
    """NorMuon (arXiv 2510.05491): Nesterov momentum, orthogonalised, then each row (of the longer side) divided by a
    running mean of its size, with the Frobenius norm of every matrix kept. g: (N, R, C); second: (N, R, 1) or
    (N, 1, C); both buffers change in place."""
    momentum_buffer.lerp_(g.to(momentum_buffer.dtype), 1 - mu)
    nesterov = g.to(momentum_buffer.dtype).lerp(momentum_buffer, mu)
    update = orthogonalise(nesterov.to(g.dtype)).to(momentum_buffer.dtype)
    across, along = (-1, -2) if g.size(-2) >= g.size(-1) else (-2, -1)
    power = update.square().mean(across, keepdim=True)
    second.lerp_(power, 1 - beta2)
    gain = second.clamp_min(1e-10).rsqrt()
    kept = power.sum(along, keepdim=True) / (power * gain.square()).sum(along, keepdim=True).clamp_min(1e-20)
    return update * (gain * kept.sqrt())


def split_float(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to its bfloat16 high half (truncated) and its low 16 bits as int16 (record #57)."""
    bits = x.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_float(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of split_float."""
    return ((high.view(torch.int16).to(torch.int32) << 16) | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def normuon_step(p: Tensor, g: Tensor, momentum_buffer: Tensor, second: Tensor, low: Tensor | None, lr: Tensor,
                 decay: Tensor, mu: Tensor, orthogonalise: Callable, beta2: float = 0.9) -> None:
    """One step on a bank p (N, R, C), in place. lr, decay: (N, 1, 1). Weight decay acts where update and weight agree
    in sign (cautious weight decay, arXiv 2510.12402). `low` holds the low halves of bfloat16 weights, so the master
    weight is float32 without a second copy of the high half; None for wider weights."""
    update = normuon_direction(g, momentum_buffer, second, mu, beta2, orthogonalise)
    weight = p if low is None else join_float(p, low)
    weight = weight - lr * update - decay * weight * (update * weight >= 0)
    if low is None:
        p.copy_(weight)
    else:
        high, rest = split_float(weight)
        p.copy_(high)
        low.copy_(rest)


def adam_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, count: Tensor, lr: Tensor, decay: Tensor,
              beta1: Tensor | float, beta2: Tensor | float) -> None:
    """Adam with cautious weight decay, in place; moments at least float32. count: () number of this step, from 1.
    Hyper-parameters are scalars or one value an element."""
    g, weight = g.to(m.dtype), p.to(m.dtype)
    m.copy_(m + (g - m) * (1 - beta1))
    v.copy_(v + (g * g - v) * (1 - beta2))
    size = lr * (1 - beta2 ** count).sqrt() / (1 - beta1 ** count)
    update = size * m / (v.sqrt() + 1e-10)
    p.copy_(weight - update - decay * weight * (update * weight > 0))


def compiler(on: bool):
    """torch.compile as used here, one graph a shape, or the identity."""
    if on:
        torch._dynamo.config.recompile_limit = 64  # a graph for each stage, training and validation
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # kept by their code, but
        tag = runtime.file_hash("triton_kernels.py")  # operators' backward by name; the environment is for processes
        os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = torch.compiler.config.cache_key_tag = tag  # that compile
    return functools.partial(torch.compile, dynamic=False, fullgraph=True) if on else lambda function: function


class Optimizer:
    """Keeps the books of NorMuon and Adam: each process holds the state of, and updates, its share of every parameter
    (ZeRO, arXiv 1910.02054). The order of reductions, updates and gathers is PARAMS'; the mathematics is above."""

    def __init__(self, model: GPT, cfg: Config, world: World, compiled: bool):
        named = dict(model.named_parameters())
        assert set(named) == set(PARAMS), f"PARAMS and the model differ: {set(named) ^ set(PARAMS)}"
        self.params = {name: named[name] for name in PARAMS}  # in the order of the table
        assert list(model.small_shapes) == list(SMALL_PARAMS), "SMALL_PARAMS and the model differ"
        self.cfg, self.world = cfg, world
        self.wd_normuon, self.wd_adam, self.orthogonalise = 1.2, 0.005, model.kernels.orthogonalise
        self.state = {name: self.new_state(name) for name in self.params}
        self.bank_rates = {name: self.new_rates(name) for name, row in PARAMS.items() if row.algorithm == "normuon"}
        counts = torch.tensor([math.prod(shape) for shape in model.small_shapes.values()])
        columns = zip(*((p.lr_mul[0], p.wd_mul, *p.betas) for p in SMALL_PARAMS.values()), strict=True)
        self.small_rows = {  # a rate, a decay and two betas for each element of the packed small parameters
            key: torch.tensor(column).repeat_interleave(counts).to(world.device, model.small.dtype)
            for key, column in zip(("lr_mul", "wd_mul", "beta1", "beta2"), columns, strict=True)}
        self.sums = {name: named[name].data.to(torch.promote_types(named[name].dtype, torch.float32), copy=True).zero_()
                     for name in SUMMED}
        for name, sums in self.sums.items():
            setattr(model, f"{name}_sums", sums)
        self.normuon_step, self.adam_step = compiler(compiled)(normuon_step), compiler(compiled)(adam_step)

    def own(self, name: str) -> Tensor:
        """The part of a parameter that this process updates."""
        data = self.params[name].data
        return data if name == "small" else self.world.share(data)

    def new_state(self, name: str) -> dict[str, Tensor]:
        p = self.own(name)
        wide = torch.promote_types(p.dtype, torch.float32)
        if PARAMS[name].algorithm == "adam":
            return {"m": torch.zeros_like(p, dtype=wide), "v": torch.zeros_like(p, dtype=wide),
                    "count": torch.zeros(())}
        rows, cols = p.shape[1:]
        second = (len(p), rows, 1) if rows >= cols else (len(p), 1, cols)
        state = {"momentum_buffer": torch.zeros_like(p, dtype=wide), "second": p.new_zeros(second, dtype=wide)}
        if p.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(p, dtype=torch.int16)
        return state

    def new_rates(self, name: str) -> Tensor:
        """(n, 1, 1) learning rate multipliers of this process's matrices: the table's, times sqrt(rows / columns) of
        tall ones, which gives their outputs the step of a square matrix's."""
        p, muls = self.own(name), PARAMS[name].lr_mul
        rates = torch.tensor([muls[(self.world.rank * len(p) + i) % len(muls)] for i in range(len(p))])
        shape_factor = max(1, p.size(1) / p.size(2)) ** 0.5
        return (shape_factor * rates).to(p.device, torch.promote_types(p.dtype, torch.float32)).view(-1, 1, 1)

    def reset(self) -> None:
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        for tensor in (*self.tensors().values(), *self.sums.values(), *grads):
            tensor.zero_()

    def gradient(self, name: str) -> Tensor | None:
        """What has gathered; sums go to other processes in the table's dtype."""
        p, sums = self.params[name], self.sums.get(name)
        return p.grad if sums is None else sums if self.world.size == 1 else sums.to(p.dtype)

    def is_share(self, name: str) -> bool:
        """Whether a tensor of this process's state is its share of a larger one."""
        parameter, _, key = name.partition(".")
        return self.world.size > 1 and key not in ("", "count") and parameter != "small"

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, state in self.state.items() for key, tensor in state.items()}

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Reduce, update and gather every parameter that is due; Adam's are due on odd steps and have gathered the
        gradients of two (record #39)."""
        due = [name for name, p in self.params.items() if (p.grad is not None or name in self.sums)
               and (PARAMS[name].algorithm == "normuon" or step % 2 == 1)]
        reduced = {name: (self.world.all_reduce if name == "small" else self.world.reduce_scatter)
                   (self.gradient(name)) for name in due}
        gathers = []
        for name in due:
            grad, work = reduced.pop(name)
            work.wait()
            self.update(name, grad, step)
            self.sums.get(name, self.params[name].grad).zero_()  # in its place, where captured graphs add to it
            if name != "small":  # whole on every process
                gathers.append(self.world.all_gather(self.params[name].data))
        for work in gathers:
            work.wait()

    def update(self, name: str, grad: Tensor, step: int) -> None:
        """One parameter's share. Rates go in as 0-dimensional CPU tensors: a Python number would be a new graph."""
        row, p, state = PARAMS[name], self.own(name), self.state[name]
        factor = lr_factor(self.cfg, step)
        if row.algorithm == "normuon":
            base = self.cfg.lr_normuon * factor
            lr = self.bank_rates[name] * base
            self.normuon_step(p, grad, state["momentum_buffer"], state["second"], state.get("low"), lr,
                              lr * (self.wd_normuon * row.wd_mul * base), torch.tensor(momentum(self.cfg, step)),
                              self.orthogonalise)
            return
        state["count"] += 1
        by = self.small_rows if name == "small" else dict(lr_mul=torch.tensor(row.lr_mul[0]), wd_mul=row.wd_mul,
                                                          beta1=row.betas[0], beta2=row.betas[1])
        lr = self.cfg.lr_adam * factor * by["lr_mul"]
        self.adam_step(p, grad, **state, lr=lr, decay=lr * lr * (self.wd_adam * by["wd_mul"]), beta1=by["beta1"],
                       beta2=by["beta2"])


# ==================== Data ====================

def find_shards(cfg: Config, what: str) -> list[Path]:
    """Files of a glob (relative to this file unless absolute), sorted. Raises UserError when there is none."""
    pattern = getattr(cfg, what)
    files = sorted(ROOT / f for f in glob.glob(pattern, root_dir=ROOT)) if pattern else []
    if not files:
        raise UserError(f"no shard matches {what}={pattern!r}: {more_shards(cfg)} or name your own with {what}=")
    return files


def read_token_tables(cfg: Config) -> tuple[Tensor, Tensor]:
    """Of each token, int32 (vocab,): its longest prefix that is a token too, -1 where there is none; its kind, the
    lowest token of the same text but for case, accents and white space. Raises UserError where the file is no such."""
    try:
        with np.load(ROOT / cfg.token_tables) as tables:
            prefix, kind = (torch.from_numpy(tables[name].astype(np.int32)) for name in ("prefix", "kind"))
        prefix, kind = F.pad(torch.stack((prefix, kind)), (0, cfg.shape.vocab), value=-1)[:, :cfg.shape.vocab]
    except Exception as error:  # NumPy's, the archive's and the compression's own
        raise UserError(f"token_tables={cfg.token_tables!r} cannot be used ({error}): restore the file, or make it "
                        "with `python data/gpt2_tokens.py`") from None
    own = torch.arange(cfg.shape.vocab, dtype=torch.int32)  # rows past the tokenizer's are their own kind
    return prefix.where(prefix < len(own), -1), kind.where((kind >= 0) & (kind < len(own)), own)


def own_shards(cfg: Config) -> bool:
    """Whether the globs are the preset's, so that its fetch command makes what they miss."""
    preset = PRESETS[cfg.preset]
    return bool(cfg.fetch) and all(getattr(cfg, key) == preset.get(key, getattr(Config, key))
                                   for key in ("train_files", "val_files"))


def more_shards(cfg: Config, needed: int = 0) -> str:
    """What to do for shards that are missing."""
    if not own_shards(cfg):
        return "put more token shards there (data/README.md)"
    command = cfg.fetch.replace("python", runtime.python_command(), 1)
    return f"run `{command.replace(' 9', f' {needed}') if needed > 9 else command}`"


def shard_tokens(path: Path) -> int:
    """Number of tokens a shard holds, by its header; raises UserError unless header and size agree."""
    name = os.path.relpath(path, ROOT)
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UserError(f"cannot read shard {name}: {error.strerror}; make it readable or give a glob without it") \
            from None
    if len(header) < HEADER_INTS:
        raise UserError(f"shard {name} is {path.stat().st_size} bytes, shorter than its header: fetch it again")
    if header[0] != SHARD_MAGIC:
        raise UserError(f"shard {name} begins with {header[0]}, not with {SHARD_MAGIC}: it is not a token shard; "
                        "make shards with data/local_text.py or data/fineweb.py")
    if header[1] != SHARD_VERSION:
        raise UserError(f"shard {name} has format version {header[1]}, this trainer reads version {SHARD_VERSION}: "
                        "make it again with the scripts in data/")
    expected, size = 4 * HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    if size != expected:
        raise UserError(f"shard {name} has {size} bytes where its header promises {expected}: it is truncated or "
                        "damaged; delete it and fetch it again")
    return int(header[2])


class Shard(NamedTuple):
    checksum: int        # sum of its 64-bit words
    tokens: np.ndarray   # (N,) uint16
    starts: np.ndarray   # (M,) int64, position of each document's BOS
    lengths: np.ndarray  # (M,) int64


def read_shard(path: Path, first: bool = True) -> Shard:
    """A shard and where its documents begin; tokens before the first BOS belong to a document of the shard before, and
    that may be all of them unless this is the first."""
    count = shard_tokens(path)
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=4 * HEADER_INTS)
    largest = int(tokens.max(initial=0))
    if largest >= VOCAB:
        raise UserError(f"shard {os.path.relpath(path, ROOT)} holds token id {largest}, GPT-2's vocabulary ends at "
                        f"{VOCAB - 1}: tokenise it again with GPT-2's vocabulary")
    starts = np.flatnonzero(tokens == BOS)
    if first and not len(starts):
        raise UserError(f"shard {os.path.relpath(path, ROOT)} holds no document start (token {BOS}): "
                        "tokenise it again with that token before each document")
    whole = tokens[:len(tokens) // 4 * 4]
    checksum = int(whole.view("<u8").sum()) + int(tokens[len(whole):].sum(dtype=np.uint64))
    return Shard(checksum, tokens, starts, np.diff(starts, append=count))


class OutOfTokens(Exception):
    """The shards end before the schedule does."""


class DocumentStream:
    """The documents of all shards in order. The next shard is read and indexed on a thread.

    It does not know of processes: all of them take the same slices in the same order and keep those they train on."""

    def __init__(self, files: list[Path], checksums: tuple[int, ...] = ()):
        """checksums: of the first files, as they were before; a shard that has another is refused."""
        self.files, self.opened, self.expected, self.checksums = files, 0, checksums, []
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="shard")
        self.upcoming = self.reader.submit(read_shard, files[0])
        self.shard, self.document, self.sums = None, 0, {}
        self.open_next()

    def open_next(self) -> None:
        if self.upcoming is None:
            raise OutOfTokens
        self.shard, self.document, self.sums = self.upcoming.result(), 0, {}
        self.checksums.append(self.shard.checksum)
        if self.expected[self.opened:self.opened + 1] not in ((), (self.shard.checksum,)):
            raise UserError(f"shard {os.path.relpath(self.files[self.opened], ROOT)} is not what it was when it was "
                            "checked: it was changed or damaged since; fetch it again")
        self.opened += 1
        self.upcoming = (self.reader.submit(read_shard, self.files[self.opened], first=False)
                         if self.opened < len(self.files) else None)

    def take(self, count: int, max_doc: int, want: bool = True) -> tuple[np.ndarray | None, np.ndarray]:
        """The next `count` tokens: whole documents cut at max_doc, the last one cut to fit; its rest is dropped.

        Returns tokens (count,) int32 (None unless wanted) and the documents' starts within them. Goes on into the
        next shard where one ends. Raises OutOfTokens after the last."""
        pieces, starts, filled = [], [], 0
        while filled < count:
            while self.document == len(self.shard.starts):
                self.open_next()
            if max_doc not in self.sums:
                self.sums[max_doc] = np.concatenate(([0], np.cumsum(np.minimum(self.shard.lengths, max_doc))))
            sums, first = self.sums[max_doc], self.document
            last = int(np.searchsorted(sums, sums[first] + count - filled))  # first document not begun
            last = min(last, len(self.shard.starts))
            begins = sums[first:last + 1] - sums[first] + filled
            ends = np.minimum(begins[1:], count)
            starts.append(begins[:-1])
            if want:
                pieces += [self.shard.tokens[s:s + n] for s, n in
                           zip(self.shard.starts[first:last], ends - begins[:-1], strict=True)]
            self.document, filled = last, int(ends[-1])
        tokens = np.concatenate(pieces).astype(np.int32) if want else None
        return tokens, np.concatenate(starts)

    def close(self) -> None:
        self.reader.shutdown(wait=False, cancel_futures=True)


class Plan(NamedTuple):
    """What a dry run over the shards' document starts found; sizes the tables and proves that the tokens suffice."""
    shards: int                # training shards that the run opens
    documents: list[int]       # most documents in a slice, for each stage
    tokens: int                # tokens the network trains on
    checksums: tuple[int, ...]  # of those shards


def skip(cfg: Config, stream: DocumentStream, step: int) -> int:
    """Takes a step's tokens from the stream and drops them; returns the most documents in one of its slices."""
    stage = cfg.stages[stage_at(cfg, step)]
    return max(len(stream.take(stage.tokens // cfg.slices + 1, stage.max_doc, want=False)[1])
               for _ in range(cfg.slices))


def plan_run(cfg: Config, files: list[Path]) -> Plan:
    """Walks the run's document starts without a model. Raises UserError when the shards are too few."""
    stream, documents, trained = DocumentStream(files), [1] * len(cfg.stages), 0
    try:
        for step in range(cfg.last_step):
            i = stage_at(cfg, step)
            documents[i] = max(documents[i], skip(cfg, stream, step))
            trained += cfg.stages[i].tokens
    except OutOfTokens:
        ends = [min(end, cfg.last_step) for end in stage_ends(cfg)]
        scheduled = sum(stage.tokens * (end - start) for stage, start, end in
                        zip(cfg.stages, [0, *ends], ends, strict=False))
        lasted = trained or sum(map(shard_tokens, files))  # not one step: an estimate by size alone
        needed = max(len(files) + 1, math.ceil(len(files) * scheduled / lasted))
        raise UserError(f"the schedule of {cfg.last_step} steps needs about {needed} shards ({scheduled:,} tokens in "
                        f"whole documents), found {len(files)} that last {trained:,} tokens at train_files="
                        f"{cfg.train_files!r}: {more_shards(cfg, needed)} or shorten it with stop_after=") from None
    finally:
        stream.close()
    return Plan(stream.opened, documents, trained, tuple(stream.checksums))


def seqlens(starts: np.ndarray, total: int, rows: int) -> np.ndarray:
    """cu_seqlens (rows + 1,) int32: document starts, then `total` to the end of the table (empty documents)."""
    table = np.full(rows + 1, total, dtype=np.int32)
    starts = starts[starts < total]  # the last token of a slice is only a target
    table[:len(starts)] = starts
    return table


class Batch(NamedTuple):
    """One slice on the device."""
    tokens: Tensor      # (T + 1,) int32: inputs and, one on, targets
    cu_seqlens: Tensor  # (N + 1,) int32


class Loader:
    """Batches of this process from a step on, made and copied to the device two steps ahead on a thread.

    position: (shards opened, documents of the last one taken) after the batches given so far."""

    def __init__(self, cfg: Config, world: World, files: list[Path], plan: Plan, first: int = 0, ahead: int = 2):
        self.cfg, self.world, self.plan, self.stream = cfg, world, plan, DocumentStream(files, plan.checksums)
        for step in range(first):
            skip(cfg, self.stream, step)
        self.position = self.stream.opened, self.stream.document
        self.copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self.maker = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self.next_step = min(first + ahead, cfg.last_step)
        self.queue = deque(self.maker.submit(self.make, step) for step in range(first, self.next_step))

    def make(self, step: int) -> tuple[list[Batch], torch.cuda.Event | None, tuple[int, int]]:
        i, batches = stage_at(self.cfg, step), []
        count, max_doc = self.cfg.stages[i].tokens // self.cfg.slices, self.cfg.stages[i].max_doc
        for piece in range(self.cfg.slices):
            mine = piece % self.world.size == self.world.rank
            tokens, starts = self.stream.take(count + 1, max_doc, want=mine)
            if mine:
                batches.append((tokens, seqlens(starts, count, table_rows(self.plan.documents[i]))))
        batches = [Batch(*(torch.from_numpy(array) for array in batch)) for batch in batches]
        position = self.stream.opened, self.stream.document
        if self.copies is None:
            return batches, None, position
        with torch.cuda.device(self.world.device), torch.cuda.stream(self.copies):
            batches = [Batch(*(x.pin_memory().to(self.world.device, non_blocking=True) for x in batch))
                       for batch in batches]
            copied = torch.cuda.Event()
            copied.record()
        return batches, copied, position

    def next(self) -> list[Batch]:
        """The slices of the next step."""
        batches, copied, self.position = self.queue.popleft().result()
        if self.next_step < self.cfg.last_step:
            self.queue.append(self.maker.submit(self.make, self.next_step))
            self.next_step += 1
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
            for tensor in (tensor for batch in batches for tensor in batch):
                tensor.record_stream(torch.cuda.current_stream())
        return batches

    def close(self) -> None:
        self.maker.shutdown(wait=False, cancel_futures=True)
        self.stream.close()


def table_rows(documents: int) -> int:
    return -(-documents // 32) * 32


class Validation(NamedTuple):
    slices: list[Batch]  # on the host
    max_doc: int         # longest document of any slice, of any process


def read_validation(cfg: Config, world: World) -> Validation:
    """The first val_tokens tokens in fixed slices, this process's share of them. Raises UserError if too few."""
    files, parts, need = find_shards(cfg, "val_files"), [], cfg.val_tokens + 1
    for path in files:
        parts.append(read_shard(path).tokens[:need - sum(map(len, parts))])
    stream = np.concatenate(parts)
    if len(stream) < need:
        raise UserError(f"val_tokens={cfg.val_tokens} needs {need:,} tokens (one more, as the last target), the "
                        f"{len(files)} shard(s) of val_files={cfg.val_files!r} hold {len(stream):,}: lower val_tokens= "
                        f"or {more_shards(cfg)}")
    size, cut = cfg.val_slice_tokens, []
    for begin in range(0, cfg.val_tokens, size):
        starts = np.flatnonzero(stream[begin:begin + size] == BOS)
        cut.append(starts if len(starts) and starts[0] == 0 else np.concatenate(([0], starts)))
    if len(cut) < world.size:
        raise UserError(f"val_tokens={cfg.val_tokens} is {len(cut)} slice(s) of val_slice_tokens={size}, fewer than "
                        f"{world.size} processes: lower val_slice_tokens=")
    rows = table_rows(max(map(len, cut)))
    max_doc = max(int(np.diff(starts, append=size).max()) for starts in cut)
    mine = range(world.rank, len(cut), world.size)
    slices = [Batch(torch.from_numpy(stream[i * size:(i + 1) * size + 1].astype(np.int32)),
                    torch.from_numpy(seqlens(cut[i], size, rows))) for i in mine]
    return Validation(slices, max_doc)


# ==================== Log ====================

def log_header(log: Log, cfg: Config, world: World, lines: list[str]) -> None:
    """Everything needed to run this again: sources, versions, machine, git state, configuration, Trainer.describe's."""
    for name, source in SOURCES.items():
        log.write(f"{'=' * 100}\nsource: {name}\n{'=' * 100}\n{source}")
    versions = {name: getattr(sys.modules.get(name), "__version__", "absent") for name in ("torch", "numpy", "triton")}
    log.write(f"{'=' * 100}\nenvironment\n{'=' * 100}")
    log.write(f"python:{platform.python_version()} " + " ".join(f"{k}:{v}" for k, v in versions.items())
              + f" cuda:{torch.version.cuda}")
    log.write(f"hardware:{world.size}x {runtime.gpu_description(world.device)}")
    log.write("driver:" + runtime.shell("nvidia-smi", "--query-gpu=driver_version,name,power.limit,clocks.max.sm",
                                "--format=csv,noheader").replace("\n", " | "))
    commit, changed = runtime.shell("git", "rev-parse", "HEAD"), runtime.shell("git", "status", "--short").split("\n")
    log.write(f"git:{commit} changed files:{', '.join(filter(None, changed)) or 'none'}" if "(" not in commit
              else "git:no commit here; the sources above are what ran")
    log.write(f"token tables:sha256 {runtime.file_hash(cfg.token_tables)}")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        rows = value if field.name == "stages" else value.layers if field.name == "shape" else ()
        log.write(f"config {field.name}={'' if rows else value}")
        if field.name == "shape":
            log.write("  " + " ".join(f"{k}={v}" for k, v in value._asdict().items() if k != "layers"))
        for row in rows:
            log.write(f"  {row}")
    for line in lines:
        log.write(line)


# ==================== Train ====================

class Graphs:
    """Functions of a key and tensors as CUDA graphs of one launch, else the GPU waits for the host (NOTES.md, 26, 29).
    Until `on` they run as they are, which compiles them; then a key's first call captures, and each replays. What they
    use beside the tensors stays in its place; the next call overwrites the result. All share one memory."""

    def __init__(self):
        self.on, self.captured, self.pool = False, {}, None

    def run(self, function: Callable, key, *inputs: Tensor) -> Tensor:
        if not self.on:
            return function(key, *inputs)
        if (function, key) not in self.captured:
            graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # runs nothing
                result = function(key, *held)
            self.captured[function, key], self.pool = (graph, held, result), graph.pool()
        graph, held, result = self.captured[function, key]
        for mine, given in zip(held, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return result


class Trainer:
    """A model, its optimizer and the one train_step and the one evaluate that warm-up, trials and the run all use.
    learns=False leaves the optimizer out: to use a trained model."""

    def __init__(self, cfg: Config, world: World, learns: bool = True):
        self.cfg, self.world, self.phase = cfg, world, "model and optimizer"
        self.dtype, kernels, self.kinds, self.fp8 = choose(cfg, world.device)
        self.compiled = {"on": True, "off": False, "auto": world.device.type == "cuda"}[cfg.compile]
        self.model = GPT(cfg.shape, self.dtype, kernels, read_token_tables(cfg), world.size).to(world.device)
        self.optimizer = Optimizer(self.model, cfg, world, self.compiled) if learns else None
        wrap, self.graphs = compiler(self.compiled), Graphs()
        self.slice_loss, self.hidden, self.token_losses = wrap(slice_loss), wrap(self.model.forward), wrap(token_losses)
        longest = max(*(stage.tokens // cfg.slices for stage in cfg.stages), cfg.val_slice_tokens)
        self.rotary = [rotary_tables(cfg, stage, 2 * longest, world.device, self.dtype)  # paired heads: 2 rows a token
                       for stage in range(len(cfg.stages))]

    def describe(self, plan: Plan) -> list[str]:
        """Batch arithmetic and what this machine switches, for the console and the log."""
        cfg, share, ends = self.cfg, self.cfg.slices // self.world.size, stage_ends(self.cfg)
        dtype = str(self.dtype).removeprefix("torch.")
        gradients = [self.optimizer.sums.get(name, p) for name, p in self.optimizer.params.items()]
        gpu = [f"memory: {runtime.expected_memory(cfg, [*self.state().values(), *gradients]):,} MiB expected",
               f"speed: {runtime.product_rate(self.world.device):.0f} TFLOP/s in an 8192-cubed bfloat16 product"
               ] if self.world.device.type == "cuda" else []
        rows = [f"stage {i}: steps {start}-{min(end, cfg.last_step) - 1}, {stage.tokens:,} tokens a step = "
                f"{self.world.size} process(es) x {share} slice(s) x {stage.tokens // cfg.slices:,} tokens, documents "
                f"cut at {stage.max_doc}, windows {stage.short}/{stage.long}"
                for i, (start, end, stage) in enumerate(zip([0, *ends[:-1]], ends, cfg.stages, strict=True))
                if start < cfg.last_step and start < end]
        return [*rows,
                f"data: {plan.tokens:,} training tokens from {plan.shards} shard(s), {cfg.val_tokens:,} for validation",
                f"model: {sum(p.numel() for p in self.model.parameters()):,} parameters, {dtype}, head "
                f"{'fp8' if self.fp8 else dtype}, MLP {'fp8' if fp8_mlp(self.fp8, self.kinds) else dtype}, "
                f"torch.compile {'on' if self.compiled else 'off'}",
                "operations: " + ", ".join(f"{name} {kind}" for name, kind in self.kinds.items()), *gpu]

    def reset(self, seed: int) -> None:
        self.model.init_weights(seed)
        self.optimizer.reset()

    def train_step(self, step: int, batches: list[Batch]) -> Tensor:
        """Forward, backward and update on this process's slices; returns its share of the loss, a device scalar in
        nats (the mean over tokens and multi-token weights)."""
        self.phase, stage, weights = "training", stage_at(self.cfg, step), target_weights(self.cfg, step)
        on_device = torch.tensor(weights).to(self.world.device, non_blocking=True)
        total = 0.0
        for batch in batches:
            self.world.watch.begin()
            total = total + self.graphs.run(self.learn_slice, stage, *batch, on_device)
        self.optimizer.step(step)
        return total / (self.cfg.stages[stage].tokens * sum(weights))

    def learn_slice(self, stage: int, tokens: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
        """Forward and backward of one slice: adds to the gradients and returns the loss, summed over its tokens."""
        self.phase = "training"
        loss = self.slice_loss(self.model, tokens, cu_seqlens, self.cfg.stages[stage].max_doc, *self.rotary[stage],
                               stage_view(self.cfg, stage), weights, self.fp8)
        (loss / self.cfg.slices).backward()
        return loss.detach()

    def evaluate(self, step: int, validation: Validation) -> float:
        """Mean next-token loss in nats over the validation tokens of all processes."""
        self.phase, (stage, view) = "validation", validation_view(self.cfg, step)
        total = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for tokens, cu_seqlens in validation.slices:
            self.world.watch.begin()
            total += self.graphs.run(self.evaluate_slice, (stage, view, validation.max_doc),
                                     tokens.to(self.world.device), cu_seqlens.to(self.world.device))
        self.world.all_reduce(total)[1].wait()
        return total.item() / self.cfg.val_tokens

    @torch.no_grad()
    def evaluate_slice(self, seen: tuple[int, View, int], tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Next-token loss of one slice, summed over its tokens, float64. seen: stage, view and longest document."""
        self.phase, (stage, view, max_doc) = "validation", seen
        x = self.hidden(tokens[:-1], cu_seqlens, max_doc, *self.rotary[stage], view)
        return sum(self.token_losses(rows, self.model.head, targets).double().sum()
                   for rows, targets in zip(x.split(32_768), tokens[1:].split(32_768), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, as this process holds it."""
        return {**dict(self.model.named_parameters()), **(self.optimizer.tensors() if self.optimizer else {})}

    @torch.no_grad()
    def save(self) -> dict[str, Tensor]:
        """The whole state on the host of rank 0, {} elsewhere; all processes must ask for it together."""
        whole = {}
        for name, tensor in self.state().items():
            if self.optimizer.is_share(name):
                full = tensor.new_empty((self.world.size * len(tensor), *tensor.shape[1:]))
                self.world.share(full).copy_(tensor)
                self.world.all_gather(full.view(torch.uint8)).wait()  # NCCL knows no int16
                tensor = full
            if self.world.rank == 0:
                whole[name] = tensor.detach().cpu()
        return whole

    @torch.no_grad()
    def load(self, whole: dict[str, Tensor]) -> None:
        """Takes what `save` gave, on any number of processes; of it, where nothing is learned, the weights alone, in
        this model's dtype. Raises UserError where it is another model's."""
        mine, learns = self.state(), self.optimizer is not None
        if learns:
            self.reset(self.cfg.seed)
        if differ := sorted(mine.keys() - whole.keys() | (whole.keys() - mine.keys() if learns else set())):
            raise UserError(f"the checkpoint is of another model, it differs in {', '.join(differ)}: take its options")
        for name, tensor in mine.items():
            saved, share = whole[name], learns and self.optimizer.is_share(name)
            fits = saved.dim() == tensor.dim() and saved.shape[1:] == tensor.shape[1:]
            if fits and tensor.dim():  # banks may have other rows of padding
                count, _ = self.model.banks.get(name.partition(".")[0], (0, 0))
                fits = len(saved) >= count > 0 or len(saved) == len(tensor) * (self.world.size if share else 1)
            if not fits or learns and saved.dtype != tensor.dtype:
                raise UserError(f"the checkpoint is of another model, its {name} is {saved.dtype} of "
                                f"{tuple(saved.shape)}: take the preset and options of its run")
            if tensor.dim() == 0:
                tensor.copy_(saved)
            else:
                begin = self.world.rank * len(tensor) if share else 0
                saved = saved[begin:begin + len(tensor)]
                tensor[:len(saved)].copy_(saved)

    def warm_up(self, plan: Plan, validation: Validation, console: Console) -> None:
        """Compiles all that the run needs, then runs it, captured where it can be. Outside the clock; sees no token of
        the data; leaves the state as it happens to be: a trial resets it."""
        begin = time.perf_counter()
        for word in ("compiled", "ready")[not self.compiled:]:
            self.graphs.on = self.compiled and word == "ready" and self.world.device.type == "cuda"
            for i, stages in self.rehearse(plan, validation, alone=word == "compiled"):
                runtime.device_sync(self.world.device)
                console.say(f"warm-up: stage {i + 1} of {stages} {word} after {time.perf_counter() - begin:.0f} s")
        self.world.barrier()

    def rehearse(self, plan: Plan, validation: Validation, alone: bool) -> Iterable[tuple[int, int]]:
        """Each stage with and without Adam and each validation view, on made-up tokens; gives a stage's number, among
        how many, when it is through. alone: only what no other process waits for, each process from another stage on,
        so that they compile different ones and find the others in the cache."""
        device, share = self.world.device, 1 if alone else self.cfg.slices // self.world.size
        last, ends = stage_at(self.cfg, max(0, self.cfg.last_step - 1)), [0, *stage_ends(self.cfg)]
        spans = [(i, ends[i], ends[i + 1]) for i in range(last + 1) if ends[i] < ends[i + 1]]
        turn = self.world.rank * len(spans) // self.world.size * alone
        for i, start, end in spans[turn:] + spans[:turn]:
            draw, count = np.random.default_rng(i), self.cfg.stages[i].tokens // self.cfg.slices
            batches = [made_up_batch(draw, count, plan.documents[i], device) for _ in range(share)]
            if alone:
                self.learn_slice(i, *batches[0], torch.tensor(target_weights(self.cfg, start)).to(device))
            else:
                self.train_step(start, batches)
                self.train_step(start + 1 - start % 2 if start + 1 < end else start, batches)
            if self.cfg.val_every or i == last:
                tokens, table = (len(x) for x in validation.slices[0])
                dummy = made_up_batch(draw, tokens - 1, -(-tokens // validation.max_doc), device, table - 1)
                whole = i == last and self.cfg.last_step == self.cfg.total_steps
                for step in (start, self.cfg.total_steps)[:1 + whole]:
                    if alone:
                        self.evaluate_slice((*validation_view(self.cfg, step), validation.max_doc), *dummy)
                    else:
                        self.evaluate(step, Validation([dummy], validation.max_doc))
            yield i, last + 1


def made_up_batch(draw, count: int, documents: int, device: torch.device, rows: int | None = None) -> Batch:
    """Random tokens, by a NumPy generator, in equal documents: tokens (count + 1,) int32 and cu_seqlens."""
    starts = np.linspace(0, count, documents, endpoint=False).astype(np.int64)
    arrays = draw.integers(0, VOCAB, count + 1, dtype=np.int32), seqlens(starts, count, rows or table_rows(documents))
    return Batch(*(torch.from_numpy(x).to(device) for x in arrays))


def choose_dtype(cfg: Config, capability: tuple[int, int]) -> torch.dtype:
    """bfloat16 where the GPU computes in it, float32 elsewhere, unless the option says which."""
    auto = "bfloat16" if capability >= (8, 0) else "float32"
    return getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


def choose_kernels(cfg: Config, capability: tuple[int, int], dtype: torch.dtype) -> tuple[Kernels, dict[str, str]]:
    """The functions behind attention, MLP, loss and orthogonalisation, and for the log the kind of each."""
    if cfg.kernels == "library" and (capability < (8, 0) or dtype != torch.bfloat16):
        raise UserError(f"kernels=library needs a GPU of compute capability 8.0 or more and bfloat16, found "
                        f"{capability[0]}.{capability[1]} and {dtype}: take kernels=auto")
    return triton_kernels.choose(capability, dtype, cfg.kernels)


def choose_fp8(cfg: Config, capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """FP8 products need compute capability 8.9 and sizes that 16 divides."""
    able = (capability >= (8, 9) and dtype == torch.bfloat16
            and all(n % 16 == 0 for stage in cfg.stages for n in (stage.tokens // cfg.slices, stage.sample)))
    if cfg.fp8 == "on" and not able:
        raise UserError(f"fp8=on needs a GPU of compute capability 8.9 or more, bfloat16 and slices of a multiple of "
                        f"16 tokens, found {capability[0]}.{capability[1]} and {dtype}: take fp8=auto")
    return able and cfg.fp8 != "off"


def fp8_mlp(fp8: bool, kinds: dict[str, str]) -> bool:
    """Whether the MLPs' products are in FP8 too: their reference leaves the scales aside."""
    return fp8 and kinds["mlp"] == "kernel"


def choose(cfg: Config, device: torch.device) -> tuple[torch.dtype, Kernels, dict[str, str], bool]:
    """dtype, kernels, their kinds and whether FP8 is used on this device. Raises UserError for what it cannot do."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    dtype = choose_dtype(cfg, capability)
    return dtype, *choose_kernels(cfg, capability, dtype), choose_fp8(cfg, capability, dtype)


# What a checkpoint holds. Nothing is drawn after the initial weights, so there is no generator's state.
SAVED = {"step": int, "train_time": float, "total_time": float, "tokens": int, "val_loss": float, "position": tuple,
         "state": dict, "sources": dict, "config": dict, "checksums": tuple, "token_tables": str}
FIXED = ("seed", "steps", "slices", "dtype", "shape", "stages")  # what a run cannot change on its way


def describe_config(cfg: Config, dtype: torch.dtype) -> dict:
    """Every setting as a plain value, for a checkpoint."""
    return {name: runtime.plain(getattr(cfg, name)) for name in (*runtime.option_fields(Config), "shape", "stages")} \
        | {"dtype": str(dtype).removeprefix("torch.")}


def saved_config(saved: dict, **changes) -> Config:
    """The configuration that describe_config wrote, with changes. Raises UserError where this trainer has no such."""
    try:
        shape, stages = saved["shape"], saved["stages"]
        tables = dict(shape=Shape(**{**shape, "layers": tuple(Layer(**row) for row in shape["layers"])}),
                      stages=tuple(Stage(**row) for row in stages))
        return Config(**{**saved, **tables, **changes})
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint is of another version of the trainer ({error}): take the version that made "
                        "it, or source=checkpoint, which runs the code in it") from None


def read_resume(cfg: Config, dtype: torch.dtype, plan: Plan) -> tuple[dict, list[str]]:
    """The checkpoint to go on from, {} for none, and what differs from its run. UserError where this run cannot."""
    if not cfg.resume:
        return {}, []
    saved, now = runtime.read_checkpoint(runtime.find(cfg.resume), SAVED), describe_config(cfg, dtype)
    for key in FIXED:
        if saved["config"].get(key) != now[key]:
            if key in ("shape", "stages"):
                raise UserError(f"resume={cfg.resume} has other {key}: take preset={saved['config'].get('preset')}")
            raise UserError(f"resume={cfg.resume} was trained with {key}={saved['config'].get(key)}, this run has "
                            f"{key}={now[key]}: give {key}={saved['config'].get(key)}")
    if saved["step"] > cfg.last_step or saved["step"] % 2 and saved["step"] < cfg.last_step:
        raise UserError(f"resume={cfg.resume} is at step {saved['step']}, this run ends at {cfg.last_step}: take "
                        "an earlier checkpoint, or raise stop_after=")
    if 0 < cfg.profile < saved["step"]:
        raise UserError(f"profile={cfg.profile} is before step {saved['step']}, where resume={cfg.resume} is: raise it")
    pairs = zip(saved["checksums"], plan.checksums, strict=False)
    for path, (before, checksum) in zip(find_shards(cfg, "train_files"), pairs, strict=False):
        if before != checksum:
            raise UserError(f"shard {os.path.relpath(path, ROOT)} is not the one that resume={cfg.resume} was trained "
                            "on: give that run's train_files=")
    unlike = [f"{key}={now[key]} (was {saved['config'].get(key)})" for key in now
              if key.startswith(("lr_", "cooldown", "momentum", "extension", "fp8", "kernels"))
              and saved["config"].get(key) != now[key]]
    unlike += ["another token table"] * (saved["token_tables"] != runtime.file_hash(cfg.token_tables))
    unlike += [f"another {name}" for name in FILES if saved["sources"].get(name) != SOURCES[name]]
    return saved, [f"resumed:{cfg.resume} at step {saved['step']}, with {', '.join(unlike) or 'its settings'}"]


class Trial:
    """One run, from the seed's initial weights or a checkpoint to the last validation: the clock, the log and the
    console around the trainer's steps."""

    def __init__(self, trainer: Trainer, plan: Plan, clock: Clock, console: Console, log: Log, seed: int, saved: dict):
        self.trainer, self.cfg, self.world, self.plan = trainer, trainer.cfg, trainer.world, plan
        self.clock, self.console, self.log, self.seed, self.saved = clock, console, log, seed, saved
        self.checkpoints = Checkpoints(log.path, self.cfg.keep, self.cfg.resume)
        self.first, self.tokens, self.total, self.val_loss, self.pending = 0, 0, 0.0, float("nan"), deque()

    def run(self, files: list[Path], validation: Validation) -> dict:
        """Trains once and returns the result."""
        cfg, clock, steps, watch = self.cfg, self.clock, self.cfg.last_step, self.world.watch
        with clock.region("initial weights"), watch.busy():
            if self.saved:
                self.trainer.load(self.saved["state"])
                self.first, clock.trained, self.total, self.tokens = (
                    self.saved[key] for key in ("step", "train_time", "total_time", "tokens"))
            else:
                self.trainer.reset(self.seed)
            self.world.barrier()
        self.begin = time.perf_counter() - self.total
        clock.start()  # inside the clock: all from here on, the reading of every shard included, but validation and
        loader = Loader(cfg, self.world, files, self.plan, self.first)  # checkpoints
        if self.saved and loader.position != self.saved["position"]:
            raise UserError(f"resume={cfg.resume} had read other tokens: take the shards and options of its run")
        self.console.start(self.tokens, clock.read())
        watch.working()
        profile = Profile(self.log, cfg.profile, clock, watch)
        for step in range(self.first, steps + 1):
            last = step == steps
            validate = last or (cfg.val_every and step % cfg.val_every == 0)
            save = cfg.save_every and step > self.first and (last or step % cfg.save_every == 0)
            if validate or save or step in profile.steps:
                clock.stop()
                self.flush(wait=True)
                profile.end(step)
                if validate:
                    self.validate(step, validation)
                if save:
                    self.save(step, loader.position)
                if last:
                    break
                profile.begin(step)
                clock.start()
            loss = self.trainer.train_step(step, loader.next())
            self.tokens += cfg.stages[stage_at(cfg, step)].tokens
            if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
                self.pending.append((step + 1, clock.read(), *runtime.start_reading(self.world, loss)))
            self.flush()
            self.console.step(step + 1, self.tokens, clock.read())
        self.total = time.perf_counter() - self.begin
        loader.close()
        self.console.stop()
        return self.result()

    def validate(self, step: int, validation: Validation) -> None:
        with self.clock.region("validation"):
            self.val_loss = self.trainer.evaluate(step, validation)
        milliseconds = 1e3 * self.clock.read()
        self.say(f"step:{step}/{self.cfg.total_steps} val_loss:{self.val_loss:.4f} train_time:{milliseconds:.0f}ms "
                 f"step_avg:{milliseconds / max(step, 1):.2f}ms")
        self.stop_if_diverged("val_loss", self.val_loss, step)

    def save(self, step: int, position: tuple[int, int]) -> None:
        """A checkpoint of all processes' state, after an even number of steps or the last."""
        with self.clock.region("checkpoints"), self.world.watch.busy():
            state = self.trainer.save()
            for name in self.trainer.optimizer.params:
                if name in state and not state[name].isfinite().all():
                    self.stop_if_diverged(name, math.nan, step)
            line = self.checkpoints.save(step, dict(
                step=step, train_time=self.clock.read(), total_time=time.perf_counter() - self.begin,
                tokens=self.tokens, val_loss=self.val_loss, position=position, state=state, sources=SOURCES,
                config=describe_config(self.cfg, self.trainer.dtype) | {"seed": self.seed},
                checksums=self.plan.checksums[:position[0]], token_tables=runtime.file_hash(self.cfg.token_tables)))
            self.world.barrier()
        self.say(line)

    def say(self, line: str) -> None:
        self.log.write(line)
        self.console.say(line)

    def stop_if_diverged(self, what: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise UserError(f"{what} is {loss} at step {step}: the run has diverged; lower lr_normuon= (now "
                            f"{self.cfg.lr_normuon}) or lr_adam= (now {self.cfg.lr_adam})")

    def flush(self, wait: bool = False) -> None:
        """Writes the train_loss lines whose losses have arrived."""
        while self.pending and (wait or self.pending[0][3] is None or self.pending[0][3].query()):
            step, seconds, loss, arrived = self.pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            self.console.loss = f"{loss.item():.4f}"
            self.log.write(f"step:{step}/{self.cfg.total_steps} train_loss:{self.console.loss} "
                           f"train_time:{1e3 * seconds:.0f}ms")
            self.stop_if_diverged("train_loss", loss.item(), step)

    def result(self) -> dict:
        cfg, world, steps, seconds = self.cfg, self.world, self.cfg.last_step, self.clock.read()
        peak = [f(world.device) / 2**20 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)] \
            if world.device.type == "cuda" else [runtime.peak_host_mib()] * 2  # since the start, warm-up included
        return {"val_loss": round(self.val_loss, 6), "train_time_ms": round(1e3 * seconds),
                "first_step_to_last_validation_ms": round(1e3 * self.total),
                "step_avg_ms": round(1e3 * seconds / steps, 3), "steps": steps, "scheduled_steps": cfg.total_steps,
                "tokens": self.tokens, "seed": self.seed, **({"resumed_at": self.first} if self.first else {}),
                "preset": cfg.preset, "processes": world.size,
                "hardware": f"{world.size}x {runtime.gpu_description(world.device)}",
                "peak_memory_allocated_mib": round(peak[0]), "peak_memory_reserved_mib": round(peak[1])}


# ==================== main ====================

def train(cfg: Config, world: World) -> None:
    clock = Clock(world.device)
    with clock.region("check of shards"):
        files = find_shards(cfg, "train_files")
        plan = plan_run(cfg, files)
        validation = read_validation(cfg, world)
        read_token_tables(cfg)
    console = Console(cfg.last_step, plan.tokens, cfg.log_every, world.rank)
    dtype, *_ = choose(cfg, world.device)  # what this machine cannot do,
    saved, notes = read_resume(cfg, dtype, plan)  # what this run cannot go on from, and
    log = runtime.new_log(cfg, world)  # a folder that cannot be written, are known before the compilation
    results = []
    with runtime.told(cfg, world), clock.region("process group and model"):
        world = runtime.connect(world)
        trainer = Trainer(cfg, world)
        if saved:
            trainer.load(saved["state"])  # that of another model is refused before the compilation
    lines = trainer.describe(plan)
    for line in lines:
        console.say(line)
    log_header(log, cfg, world, lines)
    with runtime.told(cfg, world, trainer), clock.region("compilation and warm-up"):
        trainer.warm_up(plan, validation, console)
    for k in range(cfg.trials):
        if k:
            log, clock = runtime.new_log(cfg, world), Clock(world.device)
            log_header(log, cfg, world, lines)
        trial = Trial(trainer, plan, clock, console, log, cfg.seed + k, saved)
        for line in notes:
            trial.say(line)
        log.write(f"seed:{trial.seed}")
        with runtime.told(cfg, world, trainer, trial.checkpoints):
            results.append(trial.run(files, validation))
        runtime.finish_log(log, clock, console, results[-1])
    if cfg.trials > 1:
        losses = np.array([result["val_loss"] for result in results])
        console.say(f"{cfg.trials} trials: val_loss {losses.mean():.4f}, standard deviation {losses.std(ddof=1):.4f}")


def fetch(cfg: Config, world: World) -> int:
    """Makes the shards that the preset's own globs miss; does nothing for globs that the user gave."""
    return subprocess.run([sys.executable, *cfg.fetch.split()[1:]], cwd=ROOT).returncode if own_shards(cfg) else 0


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit code. 2: bad input, 3: out of memory."""
    if argv and argv[0] in ("help", "--help", "-h"):
        runtime.print_help(__doc__, Config)
        return 0
    try:
        command, argv = (fetch, argv[1:]) if argv and argv[0] == "fetch" else (train, argv)
        cfg = parse_options(argv)
        return command(cfg, runtime.start_world(cfg)) or 0
    except UserError as error:
        return runtime.fail(str(error), error.code, everywhere=error.code in (3, 4))
    except KeyboardInterrupt as error:
        return runtime.fail(*(error.args or ("interrupted", 130)))


if __name__ == "__main__":
    runtime.speak_on_sigterm()
    code = main(sys.argv[1:])
    if code:
        runtime.leave(code)
    if dist.is_initialized():
        dist.destroy_process_group()
