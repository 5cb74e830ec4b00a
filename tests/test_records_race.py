"""records race: two copies of a script show no difference, a slower one is found, a failure gets one sentence."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_stream, write_shard

pytest.importorskip("scipy", reason="scipy, of requirements-dev.txt, is not installed")

import scipy.stats  # noqa: E402

from records import race, stats  # noqa: E402
from records.__main__ import main  # noqa: E402
from records.logs import read_log  # noqa: E402

# A trainer that takes no time: its log has a time and a loss that depend on seed, side and the constants below.
FAKE = '''
import json, os, pathlib, random, signal, sys, time, uuid
SLOWER, WORSE, FAULT, HARDWARE, KNOWN = 0, 0, "", "1x fake", ("preset", "steps", "train_files")
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
side, seed = pathlib.Path.cwd().name, int(given.get("seed", -1))
for key in given:
    if key not in (*KNOWN, "seed", "log_dir"):
        print(f"error: unknown option {key!r}: did you mean steps=...?")
        sys.exit(2)
if "fetch" in sys.argv:
    sys.exit(0)
if FAULT == "fails" and seed == 2:
    print("one\\ntwo\\nthree\\nfour", file=sys.stderr)
    sys.exit(7)
if FAULT in ("SIGINT", "SIGTERM") and seed == 2:
    os.kill(os.getppid(), getattr(signal, FAULT))
    time.sleep(float(given["steps"]))
    sys.exit(130)
draw = random.Random(f"{side}{seed}").gauss
ms, loss = round(50_000 + draw(0, 100)) + SLOWER, 3.3 + random.Random(seed).gauss(0, 0.01) + draw(0, 0.001) + WORSE
loss = float("nan") if FAULT == "nan" else loss
rule = "=" * 100
lines = [rule, "source: train_gpt.py", rule, pathlib.Path(__file__).read_text(), rule, "environment", rule,
         "python:3", f"hardware:{HARDWARE}", "config preset=smoke", f"config seed={seed}", "config steps=20"]
if "train_files" in given and FAULT != "deaf":
    lines.append(f"config train_files={given['train_files']}")
lines += [f"seed:{seed}", f"step:20/20 val_loss:{loss:.4f} train_time:{ms}ms step_avg:1ms"]
if FAULT != "unfinished":
    lines.append(json.dumps(dict(val_loss=loss, train_time_ms=ms, steps=20, seed=seed, hardware=HARDWARE)))
folder = pathlib.Path(given["log_dir"], "2026-01-01_fake")
folder.mkdir(parents=True)
if FAULT != "silent":
    (folder / f"{uuid.uuid4()}.txt").write_text("\\n".join(lines) + "\\n")
'''


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with an empty records folder, the current one, for one process."""
    (tmp_path / "records").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(race, "RECORDS", tmp_path / "records")
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that the tests start
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # for this one, in which CUDA may have begun
    monkeypatch.chdir(tmp_path)
    return tmp_path


def side(project: Path, name: str, **constants) -> str:
    """A folder with the fake, its constants changed."""
    text = FAKE
    for key, value in constants.items():
        text = text.replace("\ngiven =", f"\n{key} = {value!r}\ngiven =", 1)
    (project / name).mkdir()
    (project / name / "train_gpt.py").write_text(text)
    return name


def refused(capsys, *argv: str) -> tuple[str, str]:
    """The one sentence, and what was printed before."""
    assert main(["race", *argv]) == 2
    out, sentence = capsys.readouterr()
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence, out


def logs(project: Path, side: str) -> list:
    return [read_log(path) for path in sorted(project.glob(f"records/runs/race_*/{side}_*/*/*.txt"))]


def printed(out: str, name: str) -> list[float]:
    """Mean, half-width, low and high of a line of the summary."""
    line = next(line for line in out.splitlines() if line.startswith(name))
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line)]


def test_two_copies_of_one_script_give_intervals_that_cover_zero(project, capsys):
    copy = side(project, "one")
    shutil.copytree(copy, "two")
    assert main(["race", copy, "two", "-n", "6"]) == 0
    out = capsys.readouterr().out
    for name in ("time, s", "time, %", "val loss"):
        mean, half, low, high = printed(out, name)
        assert low < 0 < high and low == pytest.approx(mean - half, abs=0.0011)
    assert "settings: 0 differ" in out and "sources: equal" in out
    assert out.endswith("time: no difference shown, the interval covers zero\n"
                        "val loss: no difference shown, the interval covers zero\n")


@pytest.mark.parametrize("slower, worse", [("A", "B"), ("B", "A")])
def test_a_slower_and_a_worse_side_are_found_with_sign_and_size(project, capsys, slower, worse):
    for name in "AB":
        side(project, f"the_{name}", SLOWER=1000 * (name == slower), WORSE=0.02 * (name == worse))
    assert main(["race", "the_A", "the_B", "-n", "5"]) == 0
    out, sign = capsys.readouterr().out, 1 if slower == "B" else -1
    assert printed(out, "time, s")[0] == pytest.approx(sign, abs=0.2) and "sources: different" in out
    assert printed(out, "time, %")[0] == pytest.approx(2 * sign, abs=0.4)
    assert printed(out, "val loss")[0] == pytest.approx(-0.02 * sign, abs=0.002)
    assert re.search(rf"^{worse} is faster by \d\.\d+ s ± 0\.\d+ s a run$", out, re.M)
    assert re.search(rf"^{slower} has the lower val loss, by 0\.0\d+ ± 0\.00\d+$", out, re.M)


def test_the_pairs_run_in_turn_on_the_project_s_data_with_common_seeds(project, capsys):
    for name in ("one", "two"):
        side(project, name)
    assert main(["race", "one", "-n", "3", "two", "seed=7", "train_files=my/*.bin"]) == 0
    a, b = logs(project, "A"), logs(project, "B")
    assert [log.seed for log in a] == [log.seed for log in b] == [7, 8, 9]
    times = [log.path.stat().st_mtime_ns for pair in zip(a, b, strict=True) for log in pair]
    assert times == sorted(times)
    assert {log.config["train_files"] for log in a + b} == {f"{project}/my/*.bin"}
    folder, = project.glob("records/runs/race_*")
    assert (folder / "A/data").resolve() == (folder / "B/data").resolve() == project / "data"
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+ ", line)]
    for row, one, two in zip(rows, a, b, strict=True):
        ms = one.train_time_ms, two.train_time_ms
        assert row == [str(one.seed), *(f"{x / 1e3:.3f}" for x in ms), f"{(ms[1] - ms[0]) / 1e3:+.3f}",
                       f"{one.val_loss:.5f}", f"{two.val_loss:.5f}", f"{two.val_loss - one.val_loss:+.5f}"]


def test_the_summary_is_student_s_on_the_differences(project, capsys):
    for name in ("one", "two"):
        side(project, name)
    assert main(["race", "one", "two", "-n", "4"]) == 0
    out, a, b = capsys.readouterr().out, logs(project, "A"), logs(project, "B")
    times, losses = (np.array([[get(log) for log in each] for each in (a, b)])
                     for get in (lambda log: log.train_time_ms / 1e3, lambda log: log.val_loss))
    for name, values, digits in (("time, s", times[1] - times[0], 3), ("val loss", losses[1] - losses[0], 5),
                                 ("time, %", 100 * (times[1] - times[0]) / times[0], 3)):
        low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert printed(out, name) == pytest.approx([values.mean(), (high - low) / 2, low, high], abs=0.51 * 10**-digits)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_interval_is_student_s(n):
    values = np.random.default_rng(n).normal(0.3, 2, n)
    mean, half = stats.interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(expected), rel=1e-9)
    assert stats.interval(np.zeros(n)) == (0, 0)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.5, 1, (4000, 4))
    covered = np.mean([abs(mean - 0.5) <= half for mean, half in map(stats.interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_a_side_that_fails_is_named_with_its_last_words_and_the_pairs_before_count(project, capsys):
    side(project, "one")
    side(project, "two", FAULT="fails")
    sentence, out = refused(capsys, "one", "two", "-n", "4")
    assert "B failed with seed 2, exit code 7: two / three / four; 2 of 4 pairs are complete" in sentence
    folder, = project.glob("records/runs/race_*")
    assert os.path.relpath(folder) in sentence
    assert len(logs(project, "A")) == 3 and len(logs(project, "B")) == 2
    assert "2 pairs: mean of B - A" in out and len(printed(out, "time, s")) == 4


def test_one_complete_pair_has_no_interval(project, capsys):
    side(project, "one")
    side(project, "two", FAULT="fails")
    sentence, out = refused(capsys, "one", "two", "-n", "3", "seed=1")
    assert "1 of 3 pairs are complete" in sentence and out.endswith("\none pair: no interval\n") and "nan" not in out


@pytest.fixture
def interruptible():
    """Ctrl-C means what it does in a terminal; tests started in the background ignore it otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("seconds", [0, 60])
def test_an_interrupted_race_gives_what_its_pairs_say(project, capsys, monkeypatch, interruptible, seconds):
    """Whether the run ends by itself, as the trainer does, or must be ended."""
    monkeypatch.setattr(race, "PATIENCE", 0.2)
    side(project, "one", FAULT="SIGINT")
    side(project, "two")
    begin = time.monotonic()
    sentence, out = refused(capsys, "one", "two", "-n", "4", f"steps={seconds}")
    assert time.monotonic() - begin < 40, "the run was waited for to its end"
    assert "interrupted in A with seed 2; 2 of 4 pairs are complete" in sentence and "2 pairs: mean of B - A" in out


def test_a_terminated_race_ends_its_run_at_once_and_gives_what_its_pairs_say(project, capsys):
    before = signal.getsignal(signal.SIGTERM)
    side(project, "one", FAULT="SIGTERM")
    side(project, "two")
    begin = time.monotonic()
    sentence, out = refused(capsys, "one", "two", "-n", "4", "steps=60")
    assert time.monotonic() - begin < race.PATIENCE, "the run was waited for"
    assert "interrupted in A with seed 2; 2 of 4 pairs are complete" in sentence and "2 pairs: mean of B - A" in out
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("constants, words", [
    (dict(FAULT="unfinished"), "B ended without a result: records/runs/race_"),
    (dict(FAULT="silent"), "B wrote 0 logs into records/runs/race_"),
    (dict(FAULT="nan"), "the run diverged"),
    (dict(FAULT="deaf"), "B does not know the setting train_files"),
    (dict(HARDWARE="1x other"), "differ in hardware, 1x fake and 1x other"),
    (dict(KNOWN=("preset",)), "B failed before the first pair, exit code 2: unknown option 'train_files'"),
])
def test_runs_that_cannot_be_compared_are_refused(project, capsys, constants, words):
    side(project, "one")
    side(project, "two", **constants)
    sentence, out = refused(capsys, "one", "two", "-n", "2", "train_files=x")
    assert words in sentence and "0 of 2 pairs are complete" in sentence and "interval" not in out


@pytest.mark.parametrize("argv, words", [
    (["one", "one"], "-n needs a number of pairs from 2 on"),
    (["one", "one", "-n"], "not nothing"),
    (["one", "one", "-n", "1"], "for an interval, not 1"),
    (["one", "one", "-n", "two"], "not two"),
    (["one", "-n", "2"], "two folders, not 1"),
    (["one", "one", "one", "-n", "2"], "two folders, not 3"),
    (["one", "one", "-n", "2", "--cold"], "unknown option --cold"),
    (["one", "one", "-n", "2", "seed=x"], "seed='x' is not a whole number"),
    (["one", "one", "-n", "2", "trials=2"], "trials= is not for a race"),
    (["one", "one", "-n", "2", "log_dir=x"], "log_dir= is not for a race"),
    (["one", "onne", "-n", "2"], "onne is no folder with a train_gpt.py: did you mean one?"),
    (["one/train_gpt.py", "one", "-n", "2"], "did you mean one?"),
])
def test_bad_arguments_get_one_sentence_and_leave_nothing(project, capsys, argv, words):
    side(project, "one")
    sentence, out = refused(capsys, *argv)
    assert words in sentence and out == "" and not (project / "records/runs").exists()


def test_several_processes_start_through_torch_s_launcher(project, capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "4")
    launch, words, environment = race.launcher({"preset": "corpus"})
    assert launch[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert words == ["preset=corpus"]
    monkeypatch.setenv("NPROC", "3")
    side(project, "one")
    assert "NPROC=3: give 1, 2, 4 or 8" in refused(capsys, "one", "one", "-n", "2")[0]


def test_a_side_starts_as_run_sh_would_start_it(project, monkeypatch):
    """Without a GPU: the smoke preset unless one is given, and run.sh's CPU settings; what the user has set stays."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    _, words, environment = race.launcher({"steps": "3"})
    assert words == ["preset=smoke", "steps=3"] and race.launcher({"preset": "corpus"})[1] == ["preset=corpus"]
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE" and environment["PATH"] == os.environ["PATH"]
    script = (ROOT / "run.sh").read_text()
    for name in ("OMP_WAIT_POLICY", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
        value = race.launcher({})[2][name]
        assert re.search(rf'\b{name}="\$\{{{name}:-{value}\}}"', script), name
    assert environment["TRITON_CACHE_DIR"] == f"{project}/.cache/triton"


def test_two_copies_of_the_trainer_have_equal_losses(project, capsys):
    """The real one, from an extract's kind of folder without data; two steps of the smoke preset on a CPU."""
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "x"],
                   cwd=project, check=True)  # which describes no copy
    for name in ("one", "two"):
        (project / name).mkdir()
        for script in ("train_gpt.py", "triton_kernels.py", "runtime.py"):
            shutil.copy(ROOT / script, project / name)
    shutil.copy(ROOT / "data/gpt2_tokens.npz", project / "data")
    write_shard(project / "data/train_0.bin", random_stream(0, 20_000))
    write_shard(project / "data/val_0.bin", random_stream(1, 2000))
    code = main(["race", "one", "two", "-n", "2", "preset=smoke", "stop_after=2", "val_every=0", "val_tokens=512",
                 "val_slice_tokens=64", "train_files=data/train_*.bin", "val_files=data/val_*.bin"])
    out, error = capsys.readouterr()
    assert code == 0, error
    assert printed(out, "val loss") == [0, 0, 0, 0]
    assert "val loss: no difference shown, the interval covers zero" in out
    log = logs(project, "B")[1]
    assert log.seed == 1 and log.result["steps"] == 2 and log.environment["git"].startswith("no commit here")
    assert json.loads(log.path.read_text().splitlines()[-1])["val_loss"] == logs(project, "A")[1].val_loss
