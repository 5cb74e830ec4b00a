"""What several test files use: tiny shards and a tiny configuration of the real trainer."""
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
import triton_kernels  # noqa: E402

# tests/kernels runs the kernels: on the GPU, at real shapes too, where there is one, else in Triton's interpreter. That
# must be switched on before triton is first imported and then holds for its process, so without a GPU test_kernels.py
# runs the folder in processes of its own.
collect_ignore_glob = [] if torch.cuda.is_available() or triton_kernels.INTERPRETED else ["kernels/*"]
REFERENCE, _ = triton_kernels.choose((0, 0), torch.float32)  # plain PyTorch throughout
TINY_SHAPE = train_gpt.Shape(dim=16, heads=2, head_dim=8, mlp_dim=32, bigram_rows=256, mix_dim=8, mix_groups=2, layers=(
    train_gpt.Layer("short", paired=True, exclusive=True, value_embed=True),
    train_gpt.Layer("long", exclusive=True, key_offset=True),
    train_gpt.Layer("", final=-0.5),
    train_gpt.Layer("short", exclusive=True, value_embed=True, reads=1, mixes=1),
))


def moved(x: torch.Tensor) -> torch.Tensor:
    """x again, starting one element into its memory."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def tables(vocab):
    """Made-up prefixes and kinds of tokens, as train_gpt.read_token_tables gives them."""
    ids = torch.arange(vocab, dtype=torch.int32)
    return torch.where(ids % 3 > 0, ids // 3, -1), torch.where(ids % 5 > 0, ids, ids // 5)


TINY_STAGES = (
    train_gpt.Stage(1 / 3, 8 * 16, 12, 4, 8, 1.0, ((1, .5), (1, 0)), prefix=(.25, .1), sample=64),
    train_gpt.Stage(2 / 3, 8 * 24, 20, 6, 12, 1.2, ((1,), (1,))),
    train_gpt.Stage(1, 8 * 32, 32, 8, 16, 1.4, ((1,), (1,))),
    train_gpt.Stage(2, 8 * 32, 32, 10, 20, 1.4, ((1,), (1,))),
)


# Where pytest-xdist runs the tests, these begin first, so that no worker is left with a long one at the end.
LONG = ("test_smoke.py", "test_resume.py", "test_ladder.py", "test_faults.py", "test_bad_input.py", "test_parallel.py",
        "test_kernels.py", "test_records_race.py", "test_log.py")
# Of these each test is a unit of its own; they share nothing that takes long to make.
APART = ("test_kernels.py", "test_smoke.py", "test_ladder.py", "test_resume.py", "kernels/")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; runs with `./run.sh test -m slow`")
    if workers := getattr(config.option, "numprocesses", None):  # they share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """What `-n auto`, which run.sh gives, means: a worker a core, at most 4, or with a GPU 8 that have 10 GB of it
    each; 0, so the tests run in pytest's own process, where that is one, for single files and to show the output."""
    named = config.option.file_or_dir
    if config.option.capture == "no" or named and all(".py" in path for path in named):
        return 0
    most = min(8, torch.cuda.mem_get_info()[0] // 10**10) if torch.cuda.is_available() else 4
    return min(cores(), most) if min(cores(), most) > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file goes to one worker, which makes its fixtures once. Another --dist= than the default stays as it is."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if any(part in file for part in APART) else file
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if not config.option.markexpr and not torch.cuda.is_available():
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with `./run.sh test -m slow`, and where a GPU is"))


def write_shard(path: Path, tokens: np.ndarray, magic: int = train_gpt.SHARD_MAGIC, version: int = 1,
                count: int | None = None) -> Path:
    """A shard, or one with a wrong header."""
    header = np.zeros(train_gpt.HEADER_INTS, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def random_stream(seed: int, count: int, longest: int = 60) -> np.ndarray:
    """`count` tokens in documents of 1 to `longest` tokens after their BOS; the last one is cut."""
    draw, parts, total = np.random.default_rng(seed), [], 0
    while total < count:
        body = draw.zipf(1.3, draw.integers(1, longest)) % 500
        parts += [[train_gpt.BOS], body]
        total += 1 + len(body)
    return np.concatenate(parts)[:count].astype(np.uint16)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Five small training shards cut out of one stream, so that documents straddle them, and a validation shard."""
    folder = tmp_path_factory.mktemp("shards")
    for i, tokens in enumerate(np.split(random_stream(0, 8000, longest=40), 5)):
        write_shard(folder / f"train_{i:06d}.bin", tokens)
    write_shard(folder / "val_000000.bin", random_stream(1, 600))
    return folder


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory):
    """A run of the tiny configuration that nothing cuts off, with every checkpoint: test_log.Run."""
    from test_log import train
    return train(shards, tmp_path_factory.mktemp("whole"), save_every=2, keep=0)


def tiny_config(shards: Path, **changes) -> train_gpt.Config:
    settings = dict(preset="smoke", name="tiny", shape=TINY_SHAPE, stages=TINY_STAGES, steps=12, extension=2,
                    val_every=5, val_tokens=512, val_slice_tokens=32, final_window=24, log_every=1,
                    momentum_warmup=4, momentum_cooldown=2, train_files=f"{shards}/train_*.bin",
                    val_files=f"{shards}/val_*.bin")
    cfg = dataclasses.replace(train_gpt.Config(), **{**settings, **changes})
    train_gpt.check_config(cfg)
    return cfg


def run_trainer(*args: str, processes: int = 1, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """train_gpt.py as a user starts it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    return subprocess.run([sys.executable, *launch, "train_gpt.py", *args], cwd=ROOT, text=True, capture_output=True,
                          timeout=timeout, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment})


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The kernels' public functions take their references, as on a CPU without the interpreter."""
    monkeypatch.setattr(triton_kernels, "kernels_available", lambda device: False)
