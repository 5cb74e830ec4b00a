"""
Ladder, rung 01: GPT-2 as llm.c trains it (record #1, 2024-05: 3.2722 in 19,560 steps, published 45 min in CUDA C).

    ./run.sh records/ladder/01_llmc/train_gpt.py preset=corpus
    python records/ladder/01_llmc/train_gpt.py help

The start of the ladder: GPT-2 with 124M parameters, learned positions, LayerNorm, GELU (tanh form), tied embedding,
AdamW with a warm-up and a cosine, decay of the matrices, clipping. The published time is the CUDA program's; the same
mathematics is in its PyTorch trainer, whose own time and loss were not logged.

Mended against the PyTorch trainer: it validated on the first process's tokens alone; here validation averages all
processes, over 10,485,760 tokens. A step's tokens depend on the step alone (`Stream`; the CUDA program permutes shards
and samples, which is left out). Optimizer state is whole on every process (the original shards it). Gradients are
averaged by all-reduce after the last micro-batch, then clipped. Three warm-up steps are outside the clock. With other
`steps=` the warm-up keeps its published share.
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

HERE = Path(__file__).resolve()
ROOT = next((folder for folder in HERE.parents if (folder / "run.sh").is_file()), HERE.parent)
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the format of kjj0/fineweb10B-gpt2
VOCAB = 50257
WARM_UP_STEPS = 3  # on made-up tokens, before the clock


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
    """Settings of every rung. Those with a doc can be given as key=value."""
    preset: str = knob("official", "official (published steps, FineWeb), corpus (129M tokens you bring) or smoke")
    name: str = knob("", "name of the run in the log's path; default: ladder_ and the rung's number")
    seed: int = knob(0, "seed of the initial weights")
    steps: int = knob(0, "scheduled steps; warm-up and cool-down keep their published shares of them")
    stop_after: int = knob(0, "stop after this many steps of the unchanged schedule; 0: train to the end")
    batch_tokens: int = knob(524_288, "tokens a step, over all processes")
    seq_len: int = knob(1024, "tokens a sequence")
    device_batch_size: int = knob(32, "sequences of a micro-batch; fewer save memory and change rounding only")
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards, in order")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    val_tokens: int = knob(10_485_760, "validation tokens, from the start of the validation shards")
    val_every: int = knob(125, "steps between validations; 0: only at the end")
    log_every: int = knob(10, "steps between train_loss lines")
    log_dir: str = knob("records/runs", "where logs are written")
    dtype: str = knob("auto", "auto (bfloat16 on a GPU, float32 else), bfloat16 or float32")
    compile: str = knob("auto", "torch.compile: auto (on a GPU), on or off")
    fetch: str = "python data/cached_fineweb10B.py {shards}"  # makes the preset's shards; "": they are brought by hand

    @property
    def last_step(self) -> int:
        return min(self.stop_after or self.steps, self.steps)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.last_step * self.batch_tokens


CORPUS = dict(steps=228, val_every=38, train_files="data/corpus/corpus_train_*.bin",
              val_files="data/corpus/corpus_val_*.bin", fetch="")
SMOKE = dict(steps=40, val_every=20, log_every=4, batch_tokens=512, seq_len=128, device_batch_size=2, val_tokens=2048,
             train_files="data/local_text/local_train_*.bin", val_files="data/local_text/local_val_*.bin",
             fetch="python data/local_text.py")


########################################
#       The rung: configuration        #
########################################


RUNG = "01_llmc"
PUBLISHED_STEPS, WARMUP, CLIP = 19_560, 700, 1.0
CHOICES = {}  # of options that are not free
SEQ_UNIT = 1  # divides seq_len


class Shape(NamedTuple):
    layers: int = 12
    heads: int = 12
    dim: int = 768
    vocab: int = VOCAB


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """The rung's own settings."""
    steps: int = knob(PUBLISHED_STEPS, "scheduled steps")
    lr_adam: float = knob(0.0006, "learning rate")
    shape: Shape = Shape()


PRESETS = {"official": dict(val_every=250), "corpus": CORPUS, "smoke": SMOKE | dict(shape=Shape(2, 2, 64))}


def scaled(cfg: Config, published: int) -> int:
    """A published number of steps, for a schedule of cfg.steps."""
    return round(published * cfg.steps / PUBLISHED_STEPS)


def lr_factor(cfg: Config, step: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0."""
    warmup = scaled(cfg, WARMUP)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, cfg.steps - warmup))


########################################
#           The rung: model            #
########################################


def precision(device: torch.device, dtype: torch.dtype):
    """Context of every forward pass: weights stay float32, products run in dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def view(cfg: Config, step: int, tokens: np.ndarray) -> tuple[Tensor, ...]:
    """What forward takes besides tokens: nothing."""
    return ()


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
        self.out = nn.Linear(shape.dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.up = nn.Linear(shape.dim, 4 * shape.dim)
        self.down = nn.Linear(4 * shape.dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(shape.dim), Attention(shape)
        self.norm2, self.mlp = nn.LayerNorm(shape.dim), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def tied_logits(x: Tensor, table: Tensor) -> Tensor:
    """x (..., dim) times the transposed table (vocab, dim). Rows of zeros make the product 128 n wide, without which it
    is slow; their logits are cut off again."""
    return F.linear(x, F.pad(table, (0, 0, 0, -len(table) % 128)))[..., :len(table)]


class GPT(nn.Module):
    def __init__(self, cfg: Config, dtype: torch.dtype):
        super().__init__()
        shape = cfg.shape
        self.embed = nn.Embedding(shape.vocab, shape.dim)  # the head too
        self.positions = nn.Embedding(cfg.seq_len, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal with deviation 0.02, smaller for what adds to the residual stream; norms 1, biases 0."""
        draw = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                p.copy_(torch.randn(p.shape, generator=draw) * 0.02 * ((2 * len(self.blocks)) ** -0.5 if deep else 1))
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets: (B, T) int64; out: () float32, the mean loss in nats."""
        x = self.embed(tokens) + self.positions.weight[:tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = tied_logits(self.norm(x), self.embed.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


########################################
#         The rung: optimizers         #
########################################


def make_optimizers(model: GPT, cfg: Config, world: World, compile) -> list[torch.optim.Optimizer]:
    """Matrices and embeddings decay, vectors do not."""
    groups = [dict(params=[p for p in model.parameters() if p.ndim == 2], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.ndim == 1], weight_decay=0)]
    return [torch.optim.AdamW(groups, lr=cfg.lr_adam, betas=(0.9, 0.95), fused=world.device.type == "cuda")]


def update(model: GPT, optimizers: list[torch.optim.Optimizer], cfg: Config, step: int) -> None:
    """Clips the whole gradient's norm, then one step of every optimizer at the schedule's rate."""
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(cfg, step)
        optimizer.step()


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
    need(cfg.seq_len % SEQ_UNIT == 0, f"seq_len={cfg.seq_len} must be a multiple of {SEQ_UNIT}")
    for key in ("batch_tokens", "val_tokens"):
        need(getattr(cfg, key) % cfg.seq_len == 0, f"{key}={getattr(cfg, key)} is not a whole number of sequences: "
             f"take a multiple of seq_len={cfg.seq_len}")


LEAST_ONE = ("steps", "batch_tokens", "seq_len", "device_batch_size", "val_tokens", "log_every")


class MicroBatches(NamedTuple):
    """A step's (or the validation's) sequences in equal parts; process r of w takes parts r, r + w, ..."""
    tokens: int  # of one part
    count: int   # over all processes


def micro_batches(cfg: Config, world: World, tokens: int) -> MicroBatches:
    """At most device_batch_size sequences each, so accumulation is automatic. Raises UserError unless it divides."""
    sequences = cfg.batch_tokens // cfg.seq_len
    size = min(cfg.device_batch_size, sequences // world.size)
    if size == 0 or sequences % (size * world.size) or tokens // cfg.seq_len % size:
        raise UserError(f"the {sequences} sequences of a step do not divide into micro-batches of device_batch_size="
                        f"{cfg.device_batch_size} for {world.size} process(es): take powers of two")
    return MicroBatches(size * cfg.seq_len, tokens // (size * cfg.seq_len))


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


def average_gradients(model: nn.Module, world: World, count: int) -> None:
    """From this process's sums over its micro-batches to the mean over all `count` of them."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if world.size > 1:
        for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
            work.wait()
    torch._foreach_div_(grads, count)


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
#          All rungs: training         #
########################################


class Trainer:
    """Model, optimizers, and the one train_step and one evaluate that warm-up and run both use."""

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        able = world.device.type == "cuda" and torch.cuda.get_device_capability(world.device) >= (8, 0)
        self.dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if able else "float32")
        self.compiled = {"on": True, "off": False, "auto": world.device.type == "cuda"}[cfg.compile]
        self.model = GPT(cfg, self.dtype).to(world.device)
        self.optimizers = make_optimizers(self.model, cfg, world, self.compile)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["base_lr"] = group["lr"]
        self.loss = self.compile(self.model)
        self.training, self.validation = (micro_batches(cfg, world, n) for n in (cfg.batch_tokens, cfg.val_tokens))

    def compile(self, function):
        return torch.compile(function, dynamic=False) if self.compiled else function

    def describe(self) -> list[str]:
        cfg, (tokens, count) = self.cfg, self.training
        parameters = sum(p.numel() for p in self.model.parameters())
        return [f"data: {cfg.last_step} steps x {cfg.batch_tokens:,} tokens = {count} micro-batches of "
                f"{tokens // cfg.seq_len} x {cfg.seq_len} on {self.world.size} process(es), "
                f"{cfg.val_tokens:,} tokens for validation",
                f"model: {RUNG}, {parameters:,} parameters, {str(self.dtype).removeprefix('torch.')}, "
                f"torch.compile {'on' if self.compiled else 'off'}",
                f"operations: {WARM_UP_STEPS} warm-up steps on made-up tokens before the clock, state put back after"]

    def reset(self) -> None:
        """Initial weights, drawn on the CPU so that they are equal on every process and machine; no optimizer state."""
        self.model.init_weights(self.cfg.seed)
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def batch_loss(self, step: int, tokens: np.ndarray) -> Tensor:
        """Mean loss of one micro-batch; tokens: (n + 1,), inputs and the last one's target."""
        pair = torch.from_numpy(np.stack((tokens[:-1], tokens[1:]))).view(2, -1, self.cfg.seq_len)
        inputs = [on_device(x, self.world.device) for x in (*pair, *view(self.cfg, step, tokens[:-1]))]
        with precision(self.world.device, self.dtype):
            return self.loss(*inputs)

    def mine(self, micro: MicroBatches, first: int):
        """Where this process's micro-batches begin in the stream, and their tokens with the last one's target."""
        return ((first + i * micro.tokens, micro.tokens + 1) for i in range(self.world.rank, micro.count,
                                                                            self.world.size))

    def train_step(self, step: int, read) -> Tensor:
        """Forward, backward and update on this process's share of a step; returns its sum of micro-batch losses."""
        total = torch.zeros((), device=self.world.device)
        for place in self.mine(self.training, step * self.cfg.batch_tokens):
            loss = self.batch_loss(step, read(*place))
            loss.backward()
            total += loss.detach()
        average_gradients(self.model, self.world, self.training.count)
        update(self.model, self.optimizers, self.cfg, step)
        self.model.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def evaluate(self, step: int, read, micro: MicroBatches) -> float:
        """Mean loss over the validation micro-batches of all processes."""
        total = torch.zeros((), device=self.world.device)
        for place in self.mine(micro, 0):
            total += self.batch_loss(step, read(*place))
        return self.mean(total, micro.count)

    def mean(self, total: Tensor, count: int) -> float:
        total = total.double()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total.item() / count

    def warm_up(self) -> None:
        """Compiles and runs everything on made-up tokens, then puts the state back to its start."""
        self.reset()
        draw = np.random.default_rng(0)
        for step in range(WARM_UP_STEPS):
            self.train_step(step, lambda begin, count: draw.integers(0, VOCAB, count))
        one = self.validation._replace(count=self.world.size)
        self.evaluate(0, lambda begin, count: draw.integers(0, VOCAB, count), one)
        self.reset()


def train(cfg: Config, world: World) -> None:
    clock = Clock(world.device)
    micro_batches(cfg, world, cfg.val_tokens)  # what cannot be shared out is known before anything is read
    train_stream = Stream(cfg, "train_files", cfg.tokens + 1)
    val_stream = Stream(cfg, "val_files", cfg.val_tokens + 1)
    log = Log(cfg, world)
    with clock.region("process group and model"):
        connect(world)
        trainer = Trainer(cfg, world)
    log_header(log, cfg, trainer)
    with clock.region("compilation and warm-up"):
        trainer.warm_up()
    clock.start()
    for step in range(cfg.last_step + 1):
        if step == cfg.last_step or (cfg.val_every and step % cfg.val_every == 0):
            clock.stop()
            with clock.region("validation"):
                val_loss = trainer.evaluate(step, val_stream.read, trainer.validation)
            log.write(f"step:{step}/{cfg.steps} val_loss:{val_loss:.4f} train_time:{1e3 * clock.read():.0f}ms "
                      f"step_avg:{1e3 * clock.read() / max(step, 1):.2f}ms", show=True)
            if not math.isfinite(val_loss):
                raise UserError(f"val_loss is {val_loss} at step {step}: the run has diverged; lower its rates")
            if step == cfg.last_step:
                break
            clock.start()
        loss = trainer.train_step(step, train_stream.read)
        if (step + 1) % cfg.log_every == 0:
            train_loss = trainer.mean(loss, trainer.training.count)
            log.write(f"step:{step + 1}/{cfg.steps} train_loss:{train_loss:.4f} train_time:{1e3 * clock.read():.0f}ms")
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
        return fail(f"out of GPU memory: halve device_batch_size= (now {cfg.device_batch_size}), which moves rounding "
                    "only; where it is 1 already, a shorter seq_len= is another run", 3, everywhere=True)
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
