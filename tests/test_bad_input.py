"""A mistake or a misfortune ends in one sentence with the value and the remedy, a code that is not 0, and no loss."""
import errno
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_SHAPE, random_stream, run_trainer, tiny_config, write_shard

import runtime
import train_gpt

SMOKE = ("preset=smoke", "stop_after=1", "val_tokens=512", "val_slice_tokens=64")


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def globs(folder: Path) -> tuple[str, str]:
    return f"train_files={folder}/train_*.bin", f"val_files={folder}/val_*.bin"


def assert_one_sentence(stderr: str, *fragments: str) -> None:
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for fragment in fragments:
        assert fragment in stderr, (fragment, stderr)


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command line that must be refused: exit code 2, one sentence, no log, every file as it was."""
    def run(arguments, *fragments: str) -> str:
        before = contents(tmp_path)
        code = train_gpt.main([*arguments, f"log_dir={tmp_path}/logs"])
        out, stderr = capsys.readouterr()
        assert code == 2 and "val_loss" not in out
        assert_one_sentence(stderr, *fragments)
        assert contents(tmp_path) == before
        return stderr
    return run


########################################
#             Command line             #
########################################


def test_a_refused_command_line_prints_one_sentence_and_exits_with_2():
    done = run_trainer("preset=smoke", "stps=3")
    assert done.returncode == 2 and done.stdout == ""
    assert_one_sentence(done.stderr, "'stps'", "did you mean steps=")


@pytest.mark.parametrize("argument, value, remedy", [
    ("--seed=1", "'--seed'", "did you mean seed="),
    ("val_token=512", "'val_token'", "did you mean val_tokens="),
    ("trian_files=a", "'trian_files'", "did you mean train_files="),
    ("chekc", "'chekc'", "`python train_gpt.py help`"),
    ("qqqq=1", "'qqqq'", "`python train_gpt.py help`"),
    ("shape=1", "'shape'", ""),
])
def test_an_unknown_option_names_the_nearest(refused, argument, value, remedy):
    refused([argument], "unknown option", value, remedy)


@pytest.mark.parametrize("given, near", [("smok", "smoke"), ("Official", "official"), ("", "")])
def test_an_unknown_preset_names_the_nearest_and_lists_all(refused, given, near):
    refused([f"preset={given}"], f"unknown preset {given!r}", f"preset={near}", *train_gpt.PRESETS)


@pytest.mark.parametrize("text", ["ten", "1.5", "1e3", "", "nan"])
def test_a_whole_number_that_is_none_is_refused_with_an_example(refused, text):
    refused([f"steps={text}"], f"steps={text!r}", "not a whole number", "steps=1515")


@pytest.mark.parametrize("text", ["fast", "", "0,023"])
def test_a_number_that_is_none_is_refused_with_an_example(refused, text):
    refused([f"lr_normuon={text}"], f"lr_normuon={text!r}", "not a number", "lr_normuon=0.023")


@pytest.mark.parametrize("name", ["steps", "name", "lr_adam"])
def test_an_option_without_a_value_is_refused_with_an_example(refused, name):
    refused([name], f"{name!r} has no value", f"write {name}=")


@pytest.mark.parametrize("name, value, choices", [
    ("dtype", "float16", ("auto", "bfloat16", "float32", "float64")),
    ("fp8", "yes", ("auto", "on", "off")),
    ("kernels", "flash", ("auto", "library", "reference")),
    ("compile", "True", ("auto", "on", "off")),
])
def test_a_value_that_is_no_choice_is_refused_with_the_choices(refused, name, value, choices):
    refused([f"{name}={value}"], f"{name}={value!r}", *choices)


@pytest.mark.parametrize("name, value", [("kernels", "library"), ("fp8", "on")])
def test_a_choice_that_this_machine_cannot_make_is_refused_before_there_is_a_log(refused, shards, name, value):
    refused([*SMOKE, *globs(shards), f"{name}={value}"], f"{name}={value}", f"take {name}=auto")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["trials", "steps", "val_tokens", "val_slice_tokens", "log_every", "slices",
                                  "final_window"])
def test_what_must_be_positive_is_refused_at_zero_and_below(refused, name, value):
    refused([f"{name}={value}"], f"{name}={value} ", "at least 1")


@pytest.mark.parametrize("name", ["extension", "stop_after", "val_every", "seed", "momentum_warmup",
                                  "momentum_cooldown"])
def test_what_may_be_zero_is_refused_below(refused, name):
    refused([f"{name}=-1"], f"{name}=-1 ", "not be negative")


def test_a_seed_that_no_generator_takes_is_refused(refused, shards):
    refused([*SMOKE, *globs(shards), f"seed={2**64}"], f"seed={2**64}", "below")


@pytest.mark.parametrize("value", ["-1.0", "nan", "inf"])
@pytest.mark.parametrize("name, default", [("lr_normuon", 0.023), ("lr_adam", 0.008), ("lr_floor", 0.15)])
def test_a_learning_rate_that_is_negative_or_not_finite_is_refused(refused, name, default, value):
    refused([f"{name}={value}"], f"{name}={value} ", "finite number that is not negative", f"default is {default}")


@pytest.mark.parametrize("value", ["0.0", "-1.0", "1.5", "nan", "inf"])
def test_a_cooldown_outside_of_its_range_is_refused(refused, value):
    refused([f"cooldown={value}"], f"cooldown={value} ", "above 0 and at most 1")


@pytest.mark.parametrize("preset, slices, tokens", [("official", 24, 131_072), ("corpus", 24, 131_072),
                                                    ("smoke", 24, 1024), ("smoke", 1024, 1536)])
def test_a_batch_that_does_not_divide_into_the_slices_is_refused(refused, preset, slices, tokens):
    refused([f"preset={preset}", f"slices={slices}"], f"batch of {tokens} tokens", f"slices={slices}", "take slices=8")


@pytest.mark.parametrize("change", [{"window": "wide"}, {"reads": 1}, {"reads": 9}, {"mixes": 2}, {"mixes": -1}])
def test_a_layer_that_cannot_work_is_refused_with_its_row(change):
    layers = list(TINY_SHAPE.layers)
    layers[1] = layers[1]._replace(**change)
    with pytest.raises(train_gpt.UserError, match="layer 1 has .* a layer that is not before it: mend Layer"):
        tiny_config(Path("none"), shape=TINY_SHAPE._replace(layers=tuple(layers)))


def test_an_empty_log_folder_is_refused():
    with pytest.raises(train_gpt.UserError, match="log_dir= is empty: give a folder, for example log_dir=records/runs"):
        train_gpt.parse_options(["log_dir="])


def test_slices_that_eight_processes_cannot_share_are_refused(refused):
    refused(["slices=12"], "slices=12", "take 8, 16 or 32")


def test_validation_tokens_that_do_not_divide_are_refused_with_the_unit(refused):
    refused(["preset=smoke", "val_tokens=1000"], "val_tokens=1000", "val_slice_tokens=512", "multiple of 4096")


########################################
#                Shards                #
########################################

TOKENS = random_stream(2, 2000)


def with_token(token: int) -> np.ndarray:
    return np.concatenate((TOKENS[:-1], [token]))


DAMAGES = {
    "wrong magic": (lambda path: write_shard(path, TOKENS, magic=20240519),
                    ("begins with 20240519", str(train_gpt.SHARD_MAGIC), "make shards with data/")),
    "wrong version": (lambda path: write_shard(path, TOKENS, version=2),
                      ("version 2", "reads version 1", "make it again")),
    "truncated": (lambda path: write_shard(path, TOKENS, count=2010),
                  ("5024 bytes", "promises 5044", "fetch it again")),
    "too long": (lambda path: write_shard(path, TOKENS, count=1990),
                 ("5024 bytes", "promises 5004", "fetch it again")),
    "shorter than the header": (lambda path: path.write_bytes(bytes(100)), ("100 bytes", "fetch it again")),
    "empty": (lambda path: path.write_bytes(b""), ("0 bytes", "fetch it again")),
    "token id just out of range": (lambda path: write_shard(path, with_token(50257)),
                                   ("token id 50257", "ends at 50256", "tokenise it again")),
    "token id far out of range": (lambda path: write_shard(path, with_token(65535)),
                                  ("token id 65535", "ends at 50256", "tokenise it again")),
    "no document start": (lambda path: write_shard(path, np.full(2000, 7)), ("token 50256", "tokenise it again")),
    "no tokens": (lambda path: write_shard(path, TOKENS[:0]), ("token 50256", "tokenise it again")),
    "a folder": (lambda path: path.mkdir(), ("Is a directory", "glob")),
}


@pytest.mark.parametrize("damage, name", [
    (damage, name) for damage in DAMAGES for name in ("train_000000.bin", "train_000001.bin", "val_000000.bin")
    if not (damage in ("no document start", "no tokens") and name == "train_000001.bin")])  # the first's may run on
def test_a_damaged_shard_is_named_with_the_remedy(refused, tmp_path, name, damage):
    """The run needs both training shards: its one step takes 8 times 129 tokens, and the first holds 600."""
    write_shard(tmp_path / "train_000000.bin", TOKENS[:600])
    write_shard(tmp_path / "train_000001.bin", TOKENS)
    write_shard(tmp_path / "val_000000.bin", TOKENS)
    path = tmp_path / name
    path.unlink()
    break_it, fragments = DAMAGES[damage]
    break_it(path)
    refused([*SMOKE, *globs(tmp_path)], name, *fragments)


@pytest.mark.parametrize("what", ["train_files", "val_files"])
def test_a_glob_without_a_file_is_refused(refused, shards, tmp_path, what):
    missing = f"{tmp_path}/none_*.bin"
    refused([*SMOKE, *globs(shards), f"{what}={missing}"], f"{what}={missing!r}", "put more token shards there",
            f"name your own with {what}=")


@pytest.mark.parametrize("preset, remedy", [
    ("official", "data/cached_fineweb10B.py 9`"),
    ("smoke", "data/local_text.py`"),
    ("corpus", "data/README.md"),
])
def test_a_presets_missing_shards_are_refused_with_what_makes_them(refused, monkeypatch, tmp_path, preset, remedy):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    refused([f"preset={preset}"], "no shard matches train_files=", remedy)


def test_too_few_shards_of_the_official_track_are_refused_with_what_fetches_them(refused, monkeypatch, tmp_path):
    folder = tmp_path / "data/fineweb10B"
    folder.mkdir(parents=True)
    for i in range(1, 4):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", random_stream(i, 200_000))
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    stderr = refused([], "found 3", "stop_after=")
    needed = int(re.search(r"needs about (\d+) shards", stderr)[1])
    assert f" data/cached_fineweb10B.py {needed}`" in stderr and needed > 1000


def test_the_remedy_names_a_python_that_is_this_one(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    python = re.search(r"run `(\S+) data/", refused(["preset=smoke"]))[1]
    done = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == sys.prefix


def test_a_python_off_the_path_is_named_by_its_own_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    assert runtime.python_command() == sys.executable
    monkeypatch.setattr(runtime, "ROOT", Path(sys.executable).parents[1])
    assert runtime.python_command() == os.path.join("bin", os.path.basename(sys.executable))


@pytest.mark.parametrize("preset", ["smoke", "official"])
def test_too_few_shards_are_refused_with_the_number_needed_and_found(refused, shards, preset):
    stderr = refused([f"preset={preset}", *SMOKE[2:], *globs(shards)], "found 5", "stop_after=")
    needed = int(re.search(r"needs about (\d+) shards", stderr)[1])
    cfg = train_gpt.parse_options([f"preset={preset}"])
    tokens = sum(cfg.stages[train_gpt.stage_at(cfg, step)].tokens for step in range(cfg.last_step))
    assert tokens / 1600 <= needed <= 3 * tokens / 1600  # 1,600 tokens a shard, some lost where documents are cut


def test_as_many_shards_as_it_asks_for_are_enough(refused, tmp_path):
    stream = random_stream(3, 20_000)
    command = ["preset=smoke", "stop_after=8", *SMOKE[2:], *globs(tmp_path)]
    for i in range(2):
        write_shard(tmp_path / f"train_{i:06d}.bin", stream[1000 * i:1000 * i + 1000])
    needed = int(re.search(r"needs about (\d+) shards", refused(command, "found 2"))[1])
    for i in range(2, needed):
        write_shard(tmp_path / f"train_{i:06d}.bin", stream[1000 * i:1000 * i + 1000])
    cfg = train_gpt.parse_options(command)
    assert train_gpt.plan_run(cfg, train_gpt.find_shards(cfg, "train_files")).shards <= needed


def test_validation_shards_with_no_token_after_the_last_are_refused(refused, shards, tmp_path):
    write_shard(tmp_path / "val_000000.bin", TOKENS[:300])
    write_shard(tmp_path / "val_000001.bin", random_stream(4, 212))
    refused([*SMOKE, globs(shards)[0], globs(tmp_path)[1]], "val_tokens=512", "513", "hold 512", "lower val_tokens=")
    write_shard(tmp_path / "val_000001.bin", random_stream(4, 213))
    cfg = train_gpt.parse_options([*SMOKE, globs(tmp_path)[1]])
    assert len(train_gpt.read_validation(cfg, runtime.start_world(cfg)).slices) == 8


########################################
#              Processes               #
########################################

# What train_gpt.py does when it is started, on a tiny model, with a misfortune.
DRIVER = """
import inspect, os, signal, sys, textwrap, time
from pathlib import Path
import torch
import runtime
import train_gpt
from conftest import tiny_config

misfortune, shards, out, rank = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(os.environ["RANK"])
train_step = train_gpt.Trainer.train_step

def unlucky_step(trainer, step, batches):
    if misfortune != "slow start" and step == 2 and rank == 1:
        (out / "struck").touch()
        if misfortune == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return train_step(trainer, step, batches)

train_gpt.Trainer.train_step = unlucky_step
train_gpt.parse_options = lambda argv: tiny_config(shards, log_dir=str(out / "logs"))
if misfortune == "slow start":
    (out / "struck").touch()
    time.sleep(2 * (rank == 0))
exec(textwrap.dedent(inspect.getsource(train_gpt).partition('if __name__ == "__main__":')[2]), vars(train_gpt))
"""


def run_unlucky(misfortune: str, processes: int, shards: Path, out: Path) -> tuple[subprocess.CompletedProcess, float]:
    """torchrun with the misfortune; the result and the seconds from the misfortune until all processes are gone: a
    process that lives keeps the pipes open that subprocess.run reads to their end."""
    (out / "driver.py").write_text(DRIVER)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           str(processes), str(out / "driver.py"), misfortune, str(shards), str(out)],
                          cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))})
    return done, time.time() - (out / "struck").stat().st_mtime


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("damage", [lambda data: None, lambda data: data[:-300], lambda data: b"", lambda data: b"text",
                                    lambda data: data.replace(b"prefix.npy", b"suffix.npy")])
def test_damaged_token_tables_are_refused_with_the_remedy(refused, shards, tmp_path, damage):
    data = damage((ROOT / "data" / "gpt2_tokens.npz").read_bytes())
    if data is not None:
        (tmp_path / "tables.npz").write_bytes(data)
    refused([*SMOKE, *globs(shards), f"token_tables={tmp_path}/tables.npz"], f"token_tables='{tmp_path}/tables.npz'",
            "restore the file, or make it with `python data/gpt2_tokens.py`")


@pytest.mark.parametrize("processes", [3, 16])
def test_processes_that_cannot_share_the_slices_are_refused(refused, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    refused(SMOKE, f"{processes} processes cannot share the 8 slices", "start 1, 2, 4 or 8", "NPROC=4 ./run.sh")


def test_three_processes_print_one_sentence_and_are_gone():
    begin = time.time()
    done = run_trainer("preset=smoke", processes=3, OMP_NUM_THREADS="1")
    assert done.returncode != 0 and time.time() - begin < 30
    assert len(error_lines(done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr.partition("error: ")[0]


def test_the_sentence_is_printed_once_even_if_process_0_is_late(shards, tmp_path):
    done, seconds = run_unlucky("slow start", 3, shards, tmp_path)
    assert done.returncode != 0 and seconds < 30
    assert len(error_lines(done.stderr)) == 1, done.stderr
    assert "3 processes cannot share the 8 slices" in error_lines(done.stderr)[0]
    assert "Traceback" not in done.stderr.partition("error: ")[0]


def test_more_processes_than_gpus_are_refused_on_every_process(monkeypatch, capsys):
    """On all of them, so that the one that speaks is among them and none begins to wait for the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(train_gpt.UserError, match=r"2 found: start at most 2 .* NPROC=2 \./run\.sh"):
            runtime.start_world(tiny_config(Path("none")))


def test_each_of_several_processes_sees_its_own_gpu_as_number_0(monkeypatch):
    """What is compiled names the number: with one for all, each process finds in the cache what another compiled."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(
        (os.environ["CUDA_VISIBLE_DEVICES"] or "0,1,2,3").split(",")))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for visible, expected in (("", "0123"), ("7,GPU-5, 3,1", ("7", "GPU-5", "3", "1"))):
        for rank, own in enumerate(expected):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            world = runtime.start_world(tiny_config(Path("none")))
            assert world.device == torch.device("cuda", 0) and os.environ["CUDA_VISIBLE_DEVICES"] == own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # a driver that has begun goes by the list it found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert runtime.start_world(tiny_config(Path("none"))).device == torch.device("cuda", 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,8")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    runtime.start_world(tiny_config(Path("none")))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6,7,8"  # one process has what it was given


def test_run_sh_refuses_a_number_of_processes_that_is_none():
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(["./run.sh"], cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "PATH": path, "NPROC": "abc"})
    assert done.returncode != 0 and done.stdout == ""
    assert len(error_lines(done.stderr)) == 1 and "NPROC=abc" in error_lines(done.stderr)[0]
    assert "give 1, 2, 4 or 8" in done.stderr and "Traceback" not in done.stderr


def test_a_killed_process_takes_the_other_with_it(shards, tmp_path):
    done, seconds = run_unlucky("killed", 2, shards, tmp_path)
    assert done.returncode != 0 and seconds < 30
    assert "step:1/14 train_loss:" in read_log(tmp_path)


def test_one_process_out_of_memory_speaks_and_takes_the_other_with_it(shards, tmp_path):
    done, seconds = run_unlucky("out of memory", 2, shards, tmp_path)
    assert done.returncode != 0 and seconds < 30
    sentences = error_lines(done.stderr)
    assert len(sentences) == 1 and "double slices= (now 8)" in sentences[0]
    assert "Traceback" not in done.stderr.partition("error: ")[0]
    assert "step:1/14 train_loss:" in read_log(tmp_path)


########################################
#           Memory and disk            #
########################################


def read_log(folder: Path) -> str:
    path, = (folder / "logs").rglob("*.txt")
    return path.read_text()


@pytest.fixture
def tiny_run(monkeypatch, shards, tmp_path, capsys):
    """Trains the tiny configuration in this process; the exit code and what it printed."""
    def run(**changes) -> tuple[int, str, str]:
        cfg = tiny_config(shards, log_dir=f"{tmp_path}/logs", **{"stop_after": 4, "val_every": 0, **changes})
        monkeypatch.setattr(train_gpt, "parse_options", lambda argv: cfg)
        return train_gpt.main([]), *capsys.readouterr()
    return run


@pytest.mark.parametrize("method, remedy", [("train_step", "double slices= (now 8)"),
                                            ("evaluate", "halve val_slice_tokens= (now 32)")])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")])
def test_out_of_memory_names_phase_and_setting(tiny_run, monkeypatch, tmp_path, method, remedy, error):
    real = getattr(train_gpt.Trainer, method)

    def unlucky(trainer, step, data):
        result = real(trainer, step, data)
        if step == 2:  # warm-up does not run it
            raise error
        return result
    monkeypatch.setattr(train_gpt.Trainer, method, unlucky)
    code, _, stderr = tiny_run(val_every=2)
    phase = "training" if method == "train_step" else "validation"
    assert code == 3
    assert_one_sentence(stderr, f"out of memory in {phase} (peak ", remedy)
    log = read_log(tmp_path).splitlines()
    assert log[-1].startswith("step:2/14 ") and "seed:0" in log


@pytest.mark.parametrize("function, phase, remedy", [("slice_loss", "training", "double slices= (now 8)"),
                                                     ("token_losses", "validation", "halve val_slice_tokens=")])
def test_out_of_memory_while_it_compiles_names_phase_and_setting(tiny_run, monkeypatch, function, phase, remedy):
    def unlucky(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(train_gpt, function, unlucky)
    monkeypatch.setattr(train_gpt, "compiler", lambda on: lambda function: function)  # of no consequence here
    monkeypatch.setattr(train_gpt.Trainer, "train_step", None)  # the first pass of a compiled run does without
    code, _, stderr = tiny_run(compile="on")
    assert code == 3
    assert_one_sentence(stderr, f"out of memory in {phase} (peak ", remedy)


def test_a_run_that_diverges_stops_with_the_rates_to_lower_and_keeps_the_log(tiny_run, tmp_path):
    code, _, stderr = tiny_run(lr_normuon=1e38, lr_adam=1e38)
    assert code == 2
    assert_one_sentence(stderr, "train_loss is nan at step", "lr_normuon= (now 1e+38)", "lr_adam= (now 1e+38)")
    assert re.fullmatch(r"step:\d/14 train_loss:nan train_time:\d+ms", read_log(tmp_path).splitlines()[-1])


def test_a_log_folder_that_cannot_be_made_is_refused_before_the_training(shards, tmp_path, capsys):
    obstacle = tmp_path / "results"
    obstacle.write_text("kept")
    assert train_gpt.main([*SMOKE, *globs(shards), f"log_dir={obstacle}"]) == 2
    out, stderr = capsys.readouterr()
    assert out == ""
    assert_one_sentence(stderr, "cannot write the log", str(os.path.relpath(obstacle, ROOT)), "Not a directory",
                        "log_dir=")
    assert contents(tmp_path) == {obstacle: b"kept"}


def full_disk(monkeypatch, opens: float, openable: bool = True) -> None:
    """The log is on a full disk for its first `opens` openings; it may be that only the first succeeds at all."""
    count = itertools.count()

    def open_log(path, mode, **how):
        opened = next(count)
        if opened and not openable:
            raise OSError(errno.ESTALE, "Stale file handle")
        return open("/dev/full" if opened < opens else path, "w" if mode == "x" else mode, **how)
    monkeypatch.setattr(runtime, "open", open_log, raising=False)


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@needs_full
@pytest.mark.parametrize("openable", [True, False])
def test_a_full_disk_stops_no_run_and_the_unwritten_lines_are_printed(tiny_run, monkeypatch, openable):
    full_disk(monkeypatch, math.inf, openable)
    code, out, stderr = tiny_run()
    assert code != 0
    warning, sentence = stderr.splitlines()
    assert warning.startswith("warning: cannot write the log (No space left on device)")
    assert_one_sentence(sentence + "\n", "the log", ".txt could not be completed", "free some space")
    assert (ROOT / "train_gpt.py").read_text() in out
    assert re.findall(r"^step:(\d+)/14 train_loss:\d+\.\d{4} train_time:\d+ms$", out, re.M) == ["1", "2", "3", "4"]
    result = json.loads(out.rstrip().splitlines()[-1])
    assert result["steps"] == 4 and result["val_loss"] > 0


@needs_full
@pytest.mark.parametrize("opens", [3, 30])
def test_a_disk_that_has_space_again_gets_every_line_once(tiny_run, monkeypatch, tmp_path, opens):
    full_disk(monkeypatch, opens)
    code, out, stderr = tiny_run()
    assert code == 0 and out.rstrip().splitlines()[-1].startswith("log: ")
    assert stderr.startswith("warning: ") and stderr.count("\n") == 1
    log = read_log(tmp_path)
    assert log.startswith("=" * 100 + "\nsource: train_gpt.py\n")
    steps = [line.split()[:2] for line in log.splitlines() if line.startswith("step:") and "train_loss" in line]
    assert [step for step, _ in steps] == [f"step:{step}/14" for step in range(1, 5)]
    assert json.loads(log.splitlines()[-1])["steps"] == 4


@needs_full
def test_a_disk_that_has_space_at_the_very_end_gets_a_log_that_ends_as_every_log(monkeypatch, tmp_path):
    full_disk(monkeypatch, opens=1)
    log = train_gpt.Log(tmp_path / "log.txt")
    log.write("line")
    monkeypatch.undo()
    log.close()
    assert (tmp_path / "log.txt").read_text() == "line\n"


@pytest.mark.parametrize("environment, fragment", [
    ({"NNODES": "abc"}, "NNODES=abc"), ({"NNODES": "2"}, "NODE_RANK"), ({"NPROC": "3"}, "NPROC=3"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "localhost"}, "(now '2')"),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
    ({"NNODES": "4", "NPROC": "4", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}, "NPROC=2 or fewer"),
])
def test_run_sh_refuses_processes_that_cannot_share_the_slices(environment, fragment):
    done = subprocess.run(["./run.sh"], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                               "CUDA_VISIBLE_DEVICES": "", **environment})
    assert done.returncode == 2 and "error: " in done.stderr and fragment in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_run_sh_finds_the_gpus_in_one_start_of_a_python_whatever_else_it_prints(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/starts"\necho hello\n'
                                     f'"{sys.executable}" "$@"\n'
                                     'code=$?\necho goodbye\nexit $code\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["./run.sh", "no_such=1"], cwd=ROOT, capture_output=True, text=True, timeout=120, env={
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "gpus": "7"})
    assert done.returncode == 2 and "unknown option" in done.stderr, done.stderr
    assert done.stderr.startswith("run.sh: no GPU: taking the smoke preset")
    assert (tmp_path / "starts").read_text().split() == ["-", "train_gpt.py"]


@pytest.mark.parametrize("argument, says", [
    ("records/ladder/04_Muon", "give its script, records/ladder/04_Muon/train_gpt.py"),
    ("records/04.py", "no script records/04.py here"), ("evaluate.py", "python evaluate.py ckpt=")])
def test_run_sh_says_which_script_it_takes(argument, says):
    done = subprocess.run(["./run.sh", argument], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and says in done.stderr


def test_run_sh_helps_whatever_else_was_asked_for_and_from_wherever_it_is_linked(tmp_path):
    (tmp_path / "train").symlink_to(ROOT / "run.sh")
    done = subprocess.run([tmp_path / "train", "help"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                               "NNODES": "3", "NPROC": "2"})
    assert done.returncode == 0 and done.stdout.count("preset=") == 2 and done.stderr == "", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "\udcff", "a\nb", "x" * 101])
def test_a_name_that_cannot_name_a_folder_is_refused(refused, name):
    refused([f"name={name}"], repr(name), "letters and digits")


def test_an_environment_that_is_no_launchers_is_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    refused(["preset=smoke"], "abc", "./run.sh")
