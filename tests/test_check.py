"""./run.sh check: a table of what there is, one remedy a line for what is missing."""
import subprocess
import sys

from conftest import ROOT, write_shard


def check(*args):
    return subprocess.run([sys.executable, "tests/check_machine.py", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


def test_too_few_shards_fail_the_check_with_a_remedy(shards):
    done = check("preset=smoke", f"train_files={shards}/train_*.bin", f"val_files={shards}/val_*.bin")
    assert done.returncode == 1, done.stderr
    rows = {line[5:24].strip(): line[:3] for line in done.stdout.splitlines() if line[:3] in ("ok ", "BAD")}
    assert {"python", "torch", "CUDA", "device", "head", "operations", "disk"} <= set(rows)
    assert rows["torch"] == "ok " and rows["training shards"] == "BAD"
    assert "remedy for training shards: the schedule of 80 steps needs about" in done.stdout


def test_enough_shards_pass_the_check(tmp_path):
    text = [50256, *[7] * 99] * 3000
    for name in ("train_0.bin", "val_0.bin"):
        write_shard(tmp_path / name, text)
    done = check("preset=smoke", f"train_files={tmp_path}/train_*.bin", f"val_files={tmp_path}/val_*.bin")
    assert done.returncode == 0 and "1 found, 1 needed" in done.stdout and "BAD" not in done.stdout, done.stdout


def test_an_unknown_option_is_refused():
    done = check("sede=1")
    assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr
