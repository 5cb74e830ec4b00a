"""A run that is cut off anywhere goes on from its last checkpoint to the same losses, bit for bit."""
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_stream, tiny_config, write_shard
from test_log import Watched, train

import runtime
import train_gpt
from runtime import UserError, read_checkpoint, write_checkpoint

DRIVER = """
import signal
import sys
from pathlib import Path
import runtime
import train_gpt
from conftest import tiny_config
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
runtime.speak_on_sigterm()
runtime.Watch.PATIENCE = runtime.Watch.STUCK = 6  # seconds, for a shorter test
options = dict(option.split("=", 1) for option in sys.argv[2:])
options = {key: int(value) if value.isdecimal() else value for key, value in options.items()}
cfg = tiny_config(Path(sys.argv[1]), **options)
train_gpt.parse_options = lambda argv: cfg
code = train_gpt.main([])
runtime.leave(code)
"""
LINE = re.compile(r"step:(\d+)/\d+ (train|val)_loss:(\S+) ")


def start(shards: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    launch = ["runtime.py", "launch", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    driver = shards.parent / "driver.py"
    driver.write_text(DRIVER)
    return subprocess.Popen([sys.executable, *launch, str(driver), str(shards), *options], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                                 "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))})


def losses(folder: Path) -> dict[tuple[int, str], set[str]]:
    """Of all logs of a folder: what they say of each step."""
    found = {}
    for log in folder.rglob("*.txt"):
        for line in log.read_text().splitlines():
            if match := LINE.match(line):
                found.setdefault((int(match[1]), match[2]), set()).add(match[3])
    return found


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step."""
    return max(folder.rglob("*.pt"), key=lambda path: (path.stem[-6:], path.stat().st_mtime), default=None)


def checkpoints(run) -> dict[int, Path]:
    return {int(path.stem[-6:]): path for path in run.logs[0].parent.glob("*.pt")}


def test_checkpoints_stand_beside_the_log_at_every_save_every_and_at_the_end(whole):
    assert sorted(checkpoints(whole)) == [2, 4, 6, 8, 10, 12, 14]
    assert all(path.name.startswith(f"{whole.logs[0].stem}_step") for path in checkpoints(whole).values())
    assert [line for line in whole.lines if line.startswith("checkpoint:")] == [
        f"checkpoint:{path.name}" for _, path in sorted(checkpoints(whole).items())]


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 8, 12])
def test_a_resumed_run_has_the_same_losses_and_ends_in_the_same_state_bit_for_bit(whole, shards, tmp_path, step):
    resumed = train(shards, tmp_path, save_every=2, resume=str(checkpoints(whole)[step]))
    for theirs, ours in zip(whole.losses, resumed.losses, strict=True):
        assert ours and ours == {k: v for k, v in theirs.items() if k >= step}
    first, second = (read_checkpoint(checkpoints(run)[14], train_gpt.SAVED)["state"] for run in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    result = resumed.results[0]
    assert (result["resumed_at"], result["tokens"]) == (step, whole.results[0]["tokens"])
    before = read_checkpoint(checkpoints(whole)[step], train_gpt.SAVED)["train_time"]
    assert result["train_time_ms"] > 1e3 * before and f"resumed:{checkpoints(whole)[step]} at step {step}, with its " \
        "settings" in resumed.lines


def test_the_newest_checkpoints_stay(shards, tmp_path):
    assert sorted(checkpoints(train(shards, tmp_path, save_every=4, keep=2))) == [12, 14]


@pytest.mark.parametrize("kills", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_many_points_ends_with_the_losses_of_one_that_was_not(shards, tmp_path, kills):
    """By SIGKILL and, once, SIGTERM; every third time while a checkpoint is being written."""
    draw, out = random.Random(0), tmp_path / "logs"
    options = ["save_every=2", "keep=0", f"steps={4 * kills}", "val_every=6"]
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "train_000000.bin", random_stream(0, 20_000, longest=40))
    write_shard(shards / "val_000000.bin", random_stream(1, 600))
    uncut = start(shards, *options, f"log_dir={tmp_path}/uncut")
    assert uncut.wait(120) == 0, uncut.stderr.read()
    for kill in range(kills):
        found = newest(out)
        run = start(shards, *options, f"log_dir={out}", *[f"resume={found}"] * bool(found))
        before, begin = {*out.rglob("*.pt*")}, time.time()
        while run.poll() is None and time.time() - begin < 120:
            new = [path for path in out.rglob("*.pt*") if path not in before]
            if kill % 3 == 0 and any(path.suffix == ".partial" for path in new) or len(new) > kill % 2:
                break
        time.sleep(draw.uniform(0, 0.02) * (kill % 3 > 0))
        assert run.poll() is None, f"kill {kill} came too late: {run.stderr.read()}"
        run.send_signal(signal.SIGTERM if kill == 4 else signal.SIGKILL)
        run.wait(60)
    last = start(shards, *options, f"log_dir={out}", f"resume={newest(out)}")
    assert last.wait(120) == 0, last.stderr.read()
    expected, seen = losses(tmp_path / "uncut"), losses(out)
    assert len(list(out.rglob("*.txt"))) == kills + 1 and seen == expected
    assert max(step for step, _ in seen) == 4 * kills + 2


@pytest.mark.parametrize("number, code, says", [(signal.SIGTERM, 143, "ended by SIGTERM"),
                                                (signal.SIGINT, 130, "interrupted in training")])
def test_a_run_that_is_told_to_end_says_where_to_go_on(shards, tmp_path, number, code, says):
    run = start(shards, "save_every=2", "keep=0", f"log_dir={tmp_path}")
    while run.poll() is None and not newest(tmp_path):
        time.sleep(0.05)
    run.send_signal(number)
    assert run.wait(60) == code
    error = run.stderr.read()
    assert re.fullmatch(rf"error: {says}.*; go on from its last checkpoint with resume=\S+\.pt\n", error), error
    assert Path(ROOT / re.search(r"resume=(\S+)", error)[1]).is_file() and not list(tmp_path.rglob("*.partial"))


def test_a_run_that_is_told_to_end_while_it_compiles_says_so(shards):
    """A compiler would wrap an Exception as a failure of its own, with a traceback."""
    def backend(graph, inputs):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    runtime.speak_on_sigterm()
    try:
        with pytest.raises(UserError, match="^ended by SIGTERM in training; the log so far is under") as told, \
                runtime.told(tiny_config(shards), runtime.World(0, 1, torch.device("cpu")),
                             SimpleNamespace(phase="training")):
            torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(3))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told.value.code == 143


@pytest.mark.parametrize("before, after", [(4, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_checkpoint_resumes_on_another_number_of_processes(shards, tmp_path, whole, before, after):
    first = start(shards, "save_every=2", "stop_after=6", f"log_dir={tmp_path}/first", "dtype=float64",
                  processes=before)
    assert first.wait(120) == 0, first.stderr.read()
    then = start(shards, f"log_dir={tmp_path}/then", "dtype=float64", f"resume={newest(tmp_path / 'first')}",
                 processes=after)
    assert then.wait(120) == 0, then.stderr.read()
    alone = start(shards, f"log_dir={tmp_path}/alone", "dtype=float64")
    assert alone.wait(120) == 0, alone.stderr.read()
    ours, theirs = losses(tmp_path / "then"), losses(tmp_path / "alone")
    assert ours and ours.items() <= theirs.items()


def refuse(shards: Path, *fragments: str, **changes) -> None:
    with pytest.raises(UserError) as error:
        cfg = tiny_config(shards, **changes)
        train_gpt.read_resume(cfg, torch.float32, train_gpt.plan_run(cfg, train_gpt.find_shards(cfg, "train_files")))
    for fragment in fragments:
        assert fragment in str(error.value), str(error.value)


def test_what_a_run_cannot_change_on_its_way_is_refused_with_both_values(whole, shards):
    path = str(checkpoints(whole)[4])
    refuse(shards, "was trained with seed=0, this run has seed=1", "give seed=0", resume=path, seed=1)
    refuse(shards, "was trained with steps=12, this run has steps=14", resume=path, steps=14)
    refuse(shards, "this run has slices=16", resume=path, slices=16)
    refuse(shards, "this run ends at 2", "raise stop_after=", resume=path, stop_after=2)
    refuse(shards, "profile=2 is before step 4", "raise it", resume=path, profile=2)
    refuse(shards, "save_every=3 is odd", "take save_every=4", save_every=3)
    refuse(shards, "stop_after=3 is odd", "take 4", save_every=2, stop_after=3)
    refuse(shards, "leave one out", resume=path, trials=2)


def test_other_shards_than_the_run_s_are_refused_by_name(whole, tmp_path):
    write_shard(tmp_path / "train_000000.bin", random_stream(5, 8000, longest=40))
    write_shard(tmp_path / "val_000000.bin", random_stream(1, 600))
    refuse(tmp_path, "train_000000.bin is not the one", resume=str(checkpoints(whole)[4]))


def test_another_learning_rate_is_taken_and_said(whole, shards, tmp_path):
    resumed = train(shards, tmp_path, resume=str(checkpoints(whole)[8]), lr_adam=0.001)
    assert any(line.endswith("at step 8, with lr_adam=0.001 (was 0.008)") for line in resumed.lines)


def test_a_missing_checkpoint_is_refused_with_the_newest_there(whole, shards):
    folder = whole.logs[0].parent
    refuse(shards, "there is no checkpoint", "the newest in that folder is", resume=str(folder / "nothing.pt"))


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path, seed):
    """Cut off, one byte changed anywhere, or other bytes altogether; never a traceback, and never taken for whole."""
    draw, path = random.Random(seed), tmp_path / "checkpoint.pt"
    contents = {"step": 4, "state": {"w": torch.arange(500.0)}}
    write_checkpoint(path, contents)
    data = bytearray(path.read_bytes())
    if seed % 3 == 0:
        data = data[:draw.randrange(len(data))]
    elif seed % 3 == 1:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        data = draw.randbytes(draw.randrange(3000))
    path.write_bytes(data)
    try:
        read = read_checkpoint(path, {"step": int, "state": dict})
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:  # padding, dates and other bytes that mean nothing
        assert read["step"] == 4 and torch.equal(read["state"]["w"], contents["state"]["w"])


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    for content in ([1, 2], {"format": 99}, {"format": 1, "step": "4"}):
        torch.save(content, path)
        with pytest.raises(UserError, match="cannot be used as a checkpoint"):
            read_checkpoint(path, {"step": int})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("note", "text")
    with pytest.raises(UserError, match="cannot be used as a checkpoint"):
        read_checkpoint(path, {})


@pytest.mark.parametrize("change", [
    lambda state: state.pop("small"), lambda state: state.update(more=torch.zeros(1)),
    lambda state: state.update({"head": torch.zeros(())}), lambda state: state.update({"head.count": torch.zeros(1)}),
    lambda state: state.update({"head": state["head"].double()}),
    lambda state: state.update({"head": state["head"][:, 1:]}),
    lambda state: state.update({"head": state["head"][:100]}),
    lambda state: state.update({"qk_bank": state["qk_bank"][:5]})])
def test_the_state_of_another_model_is_refused(shards, change):
    trainer = train_gpt.Trainer(tiny_config(shards), train_gpt.World(0, 1, torch.device("cpu")))
    trainer.reset(0)
    whole = trainer.save()
    trainer.load(whole)
    change(whole)
    with pytest.raises(UserError, match="of another model"):
        trainer.load(whole)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match="it is no file"):
        read_checkpoint(tmp_path / "pipe.pt", {})


def test_a_full_disk_costs_a_checkpoint_and_neither_the_run_nor_the_one_before(shards, tmp_path, monkeypatch):
    real, count = runtime.write_checkpoint, []

    def write(path, contents):
        count.append(path)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, contents)
    monkeypatch.setattr(runtime, "write_checkpoint", write)
    run = train(shards, tmp_path, save_every=4, keep=2)
    assert sorted(checkpoints(run)) == [12, 14] and run.results[0]["steps"] == 14
    assert any("none at step 8" in line and "No space left on device" in line for line in run.lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch, number):
    class Told(Exception):
        pass

    def tell(number, frame):
        raise Told

    def save(contents, file, real=torch.save):
        signal.raise_signal(number)
        real(contents, file)
    monkeypatch.setattr(torch, "save", save)
    before = signal.signal(number, tell)
    try:
        with pytest.raises(Told):
            write_checkpoint(tmp_path / "a.pt", {"w": torch.zeros(3)})
        assert signal.getsignal(number) is tell
    finally:
        signal.signal(number, before)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]
    checkpoints = runtime.Checkpoints(tmp_path / "run.txt", keep=1)
    before = signal.signal(number, tell)
    try:
        for step in (2, 4):
            with pytest.raises(Told):
                checkpoints.save(step, {})
    finally:
        signal.signal(number, before)
    assert checkpoints.newest.endswith("run_step000004.pt") and len(list(tmp_path.glob("run*"))) == 1
    assert torch.equal(read_checkpoint(tmp_path / "a.pt", {"w": torch.Tensor})["w"], torch.zeros(3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises((OSError, RuntimeError)):
        write_checkpoint(tmp_path / "a.pt", {"w": torch.zeros(10_000_000)})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def failing(monkeypatch, capsys):
    """Runs a trainer that bad input ends; gives what it says."""
    def run(trainer: type, cfg: train_gpt.Config) -> str:
        monkeypatch.setattr(train_gpt, "Trainer", trainer)
        monkeypatch.setattr(train_gpt, "parse_options", lambda argv: cfg)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert train_gpt.main([]) == 2
        return capsys.readouterr().err
    return run


def test_a_state_of_another_model_is_refused_before_the_warm_up(whole, shards, tmp_path, failing):
    contents = read_checkpoint(next(whole.logs[0].parent.glob("*_step000006.pt")), train_gpt.SAVED)
    del contents["state"]["small"], contents["format"]
    write_checkpoint(tmp_path / "other.pt", contents)

    class Cold(Watched):
        def warm_up(self, *arguments):
            raise AssertionError("compiles first")
    error = failing(Cold, tiny_config(shards, log_dir=str(tmp_path), resume=str(tmp_path / "other.pt")))
    assert re.fullmatch("error: the checkpoint is of another model, it differs in small: [^\n]*\n", error)
    assert "go on from" not in error


def test_a_run_that_diverges_says_where_to_go_on(shards, tmp_path, failing):
    class Diverging(Watched):
        def train_step(self, step, batches):
            return super().train_step(step, batches) * (float("nan") if step == 8 else 1)
    cfg = tiny_config(shards, log_dir=str(tmp_path), save_every=4)
    error = failing(Diverging, cfg)
    assert re.fullmatch(r"error: train_loss is nan at step 9: .*; go on from its last checkpoint with resume=\S+"
                        r"_step000008\.pt\n", error), error


def test_weights_that_are_not_finite_are_not_saved(shards, tmp_path, failing):
    class Destroyed(Watched):
        def train_step(self, step, batches):
            loss = super().train_step(step, batches)
            if step == 7:
                self.model.head.data[5, 3] = float("inf")
            return loss
    cfg = tiny_config(shards, log_dir=str(tmp_path), save_every=4, val_every=0)
    error = failing(Destroyed, cfg)
    assert re.fullmatch(r"error: head is nan at step 8: .*; go on from its last checkpoint with resume=\S+"
                        r"_step000004\.pt\n", error), error
    assert [path.name[-9:] for path in tmp_path.rglob("*.pt*")] == ["000004.pt"]


def test_resume_counts_from_the_current_folder_first(whole, shards, monkeypatch):
    path = next(whole.logs[0].parent.glob("*_step000006.pt"))
    cfg = tiny_config(shards, resume=path.name)
    plan = train_gpt.plan_run(cfg, train_gpt.find_shards(cfg, "train_files"))
    with pytest.raises(UserError, match="there is no checkpoint"):
        train_gpt.read_resume(cfg, torch.float32, plan)
    monkeypatch.chdir(path.parent)
    assert train_gpt.read_resume(cfg, torch.float32, plan)[0]["step"] == 6


def test_a_shard_damaged_after_the_check_is_named_before_it_trains(shards, tmp_path, failing):
    class Damaging(Watched):
        def warm_up(self, *arguments):
            super().warm_up(*arguments)
            path = tmp_path / "train_000003.bin"
            data = bytearray(path.read_bytes())
            data[2000] ^= 1
            path.write_bytes(data)
    for path in shards.glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cfg = tiny_config(tmp_path, log_dir=f"{tmp_path}/logs", save_every=2)
    error = failing(Damaging, cfg)
    assert error.count("\n") == 1 and "train_000003.bin is not what it was when it was checked" in error
    assert "go on from its last checkpoint" in error
