"""A process that is killed, stopped, stuck or cut off ends the whole run soon, by name; and the run goes on after."""
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from conftest import ROOT, random_stream, write_shard
from test_resume import DRIVER, losses, newest, start

import runtime

STUCK = """
import os, time
def stuck(trainer, step, batches, real=train_gpt.Trainer.train_step):
    if step == 6 and os.environ["RANK"] == "1":
        time.sleep(300)
    return real(trainer, step, batches)
train_gpt.Trainer.train_step = stuck
"""


def children(run: subprocess.Popen) -> list[int]:
    return [int(child) for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def process_of(run: subprocess.Popen, rank: int) -> int:
    """Process id of a rank among the launcher's children."""
    for child in children(run):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise LookupError(rank)


def wait_for(condition, run: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), run.stderr.read() if run.poll() is not None else "too late"


def end_of(run: subprocess.Popen, seconds: float = 60) -> str:
    """Its errors; it has to end within the time."""
    begin = time.monotonic()
    try:
        _, error = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for child in children(run):  # one that is stopped would hold the pipe open
            os.kill(child, signal.SIGKILL)
        run.kill()
        pytest.fail(f"still running after {seconds} s: {run.communicate()[1]}")
    assert run.returncode != 0 and time.monotonic() - begin < seconds
    assert "Traceback" not in error, error
    return "\n".join(line for line in error.splitlines() if line.startswith("error: "))


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number, says", [
    (signal.SIGKILL, "rank 1 was killed (SIGKILL)"), (signal.SIGSTOP, "rank 1 gave no sign of life for 6 s")])
def test_a_rank_that_is_killed_or_stopped_ends_the_run_by_name_and_it_goes_on(shards, tmp_path, number, says):
    options = ["save_every=2", "keep=0", f"log_dir={tmp_path}"]
    run = start(shards, *options, processes=2)
    wait_for(lambda: newest(tmp_path), run)
    os.kill(process_of(run, 1), number)
    error = end_of(run, 30)  # torchrun by itself would wait as long for a process that is stopped
    assert says in error and "resume=" in error, error
    last = start(shards, *options, f"resume={newest(tmp_path)}", processes=2)
    assert last.wait(120) == 0, last.stderr.read()
    found = losses(tmp_path)
    assert max(found)[0] == 14 and all(len(values) == 1 for values in found.values())


@linux
def test_a_rank_that_is_stuck_ends_the_run_by_name(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("test_resume.DRIVER", DRIVER.replace("code = ", STUCK + "code = "))
    error = end_of(start(shards, f"log_dir={tmp_path}", processes=2), 120)
    assert re.search("rank 1 has been stuck for [0-9]+ s", error), error


@linux
def test_a_rank_that_does_not_come_is_named(shards, tmp_path, monkeypatch):
    late = "import os, time, runtime\nruntime.ARRIVAL = 3\nif os.environ['RANK'] == '1':\n    time.sleep(100)\n"
    monkeypatch.setattr("test_resume.DRIVER", late + DRIVER)
    error = end_of(start(shards, f"log_dir={tmp_path}", processes=2))
    assert "rank 1 has not come within 3 s" in error, error


def test_a_process_that_stood_still_itself_takes_nobody_for_gone(monkeypatch):
    """As under a compiler that lets no other thread run: the first seconds after it are no reason to end the run."""
    said = []
    monkeypatch.setattr(runtime, "leave", said.append)
    monkeypatch.setattr(runtime.Watch, "PATIENCE", 6)  # twice the 3 s that one standstill can count for
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = runtime.Watch(store, 0, 2)
    try:
        for count in range(12):
            store.set("watch/1", f"{count} 0 busy")
            if count == 0:
                watch.start()
            if count == 5:
                ctypes.PyDLL(None).sleep(9)  # with Python's lock
                assert watch.verdict() is None
            time.sleep(0.5)
        assert not said
        end = time.monotonic() + 60
        while not said and time.monotonic() < end:  # the other's count stands still from here on
            time.sleep(0.5)
        assert said and "rank 1 gave no sign of life" in watch.verdict()
    finally:
        watch.ended.set()  # its threads would end the tests' process later


def test_a_store_that_is_silent_makes_no_rank_silent(monkeypatch):
    """What the others did since the last answer is not known: a node that is cut off says so and names no other."""
    monkeypatch.setattr(runtime.Watch, "PATIENCE", 3)
    watch = runtime.Watch(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 1, 2)
    watch.counts = {(0, "tick"): "9", (0, "begun"): "4", (0, "state"): "work"}
    watch.changed = {(0, "tick"): 96.0, (0, "begun"): 96.0}
    store, rank = "rank 1 has had no answer from the run's store", "rank 0 gave no sign of life"
    for awake, answered, verdict in ((100.0, 98.0, None), (102.0, 98.0, store), (100.0, 99.5, rank)):
        watch.awake, watch.answered = awake, answered
        assert (watch.verdict() or "").startswith(verdict or "") and bool(watch.verdict()) == bool(verdict)


@pytest.mark.slow
def test_sixteen_processes_train_as_one_does(shards, tmp_path):
    for processes in (1, 16):
        run = start(shards, "slices=16", "dtype=float64", "val_slice_tokens=32", f"log_dir={tmp_path}/{processes}",
                    processes=processes)
        assert run.wait(300) == 0, run.stderr.read()
    assert losses(tmp_path / "1") and losses(tmp_path / "1") == losses(tmp_path / "16")


class Nodes(NamedTuple):
    enter: list[list[str]]      # the command by which each node's own runs there
    interfaces: list[str]       # of its network
    address: str                # of the first
    cut_off: Callable           # the second, of which this takes the launcher; with True, back on
    stopped: bool = False       # by stopping its processes, which say nothing until they go on


def stop_all(launcher: subprocess.Popen, on: bool = False) -> None:
    for process in (*children(launcher), launcher.pid) if launcher.poll() is None else ():
        os.kill(process, signal.SIGCONT if on else signal.SIGSTOP)


@pytest.fixture
def nodes():
    """Two network namespaces with addresses of their own and a wire between them; where a machine allows none, two
    launchers on one address."""
    def ip(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *command], capture_output=True, text=True)
    names, wires = [f"trainer{os.getpid()}{k}" for k in "ab"], ["wire0", "wire1"]
    try:
        if not shutil.which("ip") or any(ip("netns", "add", name).returncode for name in names) or ip(
                "link", "add", wires[0], "netns", names[0], "type", "veth", "peer", "name", wires[1], "netns",
                names[1]).returncode:
            warnings.warn("no network namespaces here: two launchers on one address take their place", stacklevel=1)
            yield Nodes([[], []], ["lo", "lo"], "127.0.0.1", stop_all, True)
            return
        for k, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", wires[k])
            for device in ("lo", wires[k]):
                ip("-n", name, "link", "set", device, "up")
        yield Nodes([["ip", "netns", "exec", name] for name in names], wires, "10.77.0.1",
                    lambda _, on=False: ip("-n", names[1], "link", "set", wires[1], "up" if on else "down"))
    finally:
        for name in names if shutil.which("ip") else ():
            ip("netns", "del", name)


def start_nodes(nodes: Nodes, shards: Path, port: int, *options: str) -> list[subprocess.Popen]:
    driver = shards / "driver.py"
    driver.write_text(DRIVER)
    return [subprocess.Popen(
        [*enter, sys.executable, "runtime.py", "launch", "--nnodes", "2", "--nproc_per_node", "2", "--node_rank",
         str(k), "--master_addr", nodes.address, "--master_port", str(port), str(driver), str(shards), *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface,
             "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))})
        for k, (enter, interface) in enumerate(zip(nodes.enter, nodes.interfaces, strict=True))]


@linux
def test_two_nodes_train_as_one_and_a_node_that_is_cut_off_ends_the_run_which_goes_on(nodes, tmp_path):
    write_shard(tmp_path / "train_000000.bin", random_stream(0, 20_000, longest=40))
    write_shard(tmp_path / "val_000000.bin", random_stream(1, 600))
    options = ["save_every=2", "keep=0", "steps=24", "dtype=float64"]
    cut = start_nodes(nodes, tmp_path, 29517, *options, f"log_dir={tmp_path}/nodes")
    wait_for(lambda: newest(tmp_path / "nodes"), cut[0])
    nodes.cut_off(cut[1])
    begin = time.monotonic()
    errors = [end_of(cut[0])]
    if nodes.stopped:
        nodes.cut_off(cut[1], on=True)
    errors.append(end_of(cut[1]))
    assert time.monotonic() - begin < 60 and all("resume=" in error for error in errors), errors
    assert re.search("rank [23] gave no sign of life", errors[0]) and "no answer from the run's store" in errors[1]
    nodes.cut_off(cut[1], on=True)
    for node in start_nodes(nodes, tmp_path, 29518, *options, f"log_dir={tmp_path}/nodes",
                            f"resume={newest(tmp_path / 'nodes')}"):
        assert node.wait(120) == 0, node.stderr.read()
    alone = start(tmp_path, *options, f"log_dir={tmp_path}/alone")
    assert alone.wait(120) == 0, alone.stderr.read()
    assert losses(tmp_path / "nodes") == losses(tmp_path / "alone") and max(losses(tmp_path / "alone"))[0] == 26
