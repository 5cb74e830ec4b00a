"""What a run needs around its mathematics: errors as sentences, checkpoints, processes and the watch over them, log,
clock and console. Knows nothing of the model.

    python runtime.py launch --nproc_per_node=4 train_gpt.py    torchrun, with one sentence in place of its report
"""
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent  # paths count from here


class UserError(Exception):
    """What the user can mend: one sentence with the value and the remedy, printed without a traceback; and the exit
    code, 2: input that is the same for all processes, 3: out of memory, 4: another process is gone, 130 and 143:
    ended by SIGINT and SIGTERM."""

    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code


def fail(sentence: str, code: int, everywhere: bool = False) -> int:
    """Prints one sentence and returns code. Of several processes with the same trouble the first speaks: the others
    wait, and torchrun ends them when it has gone; `everywhere`: the trouble is this process's own."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank and not everywhere:
        time.sleep(10 + rank)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


def leave(code: int) -> None:
    """Ends this process without waiting for the others, who may never answer; torchrun ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speak_on_sigterm() -> None:
    """A process alone ends with a sentence; of several, torchrun ends those that wait, and speaks for them."""
    def end(number, frame):  # no Exception, which a compiler would take for its own failure
        raise KeyboardInterrupt("ended by SIGTERM", 143)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        signal.signal(signal.SIGTERM, end)


# ==================== Options ====================

def knob(default, doc: str):
    """A field of a dataclass of options: given as key=value, listed by print_help."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def option_fields(table: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(table) if "doc" in f.metadata}


def parse_arguments(argv: list[str], table: type, program: str) -> dict:
    """key=value arguments to the values of a table's knobs, those alone that are given. Raises UserError."""
    fields, given = option_fields(table), {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if key not in fields:
            near = difflib.get_close_matches(key.lstrip("-"), fields, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}=...?" if near else f"`python {program} help` lists them all"
            raise UserError(f"unknown option {key!r}: {hint}")
        if not equals:
            raise UserError(f"option {key!r} has no value: write {key}={fields[key].default}")
        kind = fields[key].type
        try:
            given[key] = kind(text.replace("_", "")) if kind in (int, float) else text
        except ValueError:
            article = "a whole number" if kind is int else "a number"
            raise UserError(f"{key}={text!r} is not {article}: give for example {key}={fields[key].default}") from None
    return given


def print_help(text: str, table: type) -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into head
    print(text)
    for name, field in option_fields(table).items():
        print(f"  {name + '=' + str(field.default):<50} {field.metadata['doc']}")


# ==================== Checkpoints ====================

FORMAT = 1


@contextlib.contextmanager
def undisturbed():
    """SIGINT and SIGTERM wait until what is inside is done: a writer in C++ would make another error of theirs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def write_checkpoint(path: Path, contents: dict) -> None:
    """Writes plain values and CPU tensors beside `path` and renames, so that there is a whole file of that name or
    none. Raises OSError or, from PyTorch's writer, RuntimeError; the part written is then removed."""
    part = path.with_name(path.name + ".partial")
    try:
        with undisturbed(), open(part, "wb") as file:
            torch.save({"format": FORMAT, **contents}, file)  # a zip file: a CRC-32 for each tensor and for the rest
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def find(path: str) -> Path:
    """The file that an option names, from the current folder if it is there, else from the project's."""
    return Path(path) if os.path.isfile(path) else ROOT / path


def read_checkpoint(path: Path, needs: dict[str, type]) -> dict:
    """What write_checkpoint wrote, its tensors mapped to memory, not read yet. No code in the file runs. Raises
    UserError for a file that is none, is damaged, or has not the entries of `needs`, each of its type."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would keep us waiting
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise ValueError(f"it has not the format {FORMAT} of this version")
        for name, kind in needs.items():
            if not isinstance(contents.get(name), kind):
                raise ValueError(f"its {name} is a {type(contents.get(name)).__name__}, not a {kind.__name__}")
            if name == "state" and not all(isinstance(entry, torch.Tensor) for entry in contents[name].values()):
                raise ValueError("its state holds what is no tensor")
        return contents
    except FileNotFoundError:
        near = sorted(path.parent.glob("*.pt"), key=lambda p: p.stat().st_mtime)[-1:] if path.parent.is_dir() else []
        raise UserError(f"there is no checkpoint {path}: " + (f"the newest in that folder is {near[0]}" if near else
                        "save_every= makes them, beside the log")) from None
    except Exception as error:  # the archive's, the unpickler's, the file system's: whatever is wrong with the file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be used as a checkpoint ({reason}): take an earlier one, or train anew") \
            from None


def plain(value):
    """Tables as plain dictionaries and tuples, which a checkpoint can hold."""
    if hasattr(value, "_asdict"):
        return {name: plain(entry) for name, entry in value._asdict().items()}
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


class Checkpoints:
    """The checkpoints of one run, beside its log and named after it; the newest `keep` stay, 0 keeps all. Only rank 0
    has a log and writes. resumed: the checkpoint that the run began with."""

    def __init__(self, log: Path | None, keep: int, resumed: str = ""):
        self.log, self.keep, self.resumed, self.written = log, keep, resumed, []

    @property
    def newest(self) -> str:
        """For the sentence of a run that ends: where to go on; "" where nothing was saved."""
        path = os.path.relpath(self.written[-1]) if self.written else self.resumed
        return f"go on from its last checkpoint with resume={path}" if path else ""

    def save(self, step: int, contents: dict) -> str:
        """Writes one and removes what is too old; returns a line for the log. A disk that is full ends no run."""
        if self.log is None:
            return ""
        path = self.log.with_name(f"{self.log.stem}_step{step:06d}.pt")
        with undisturbed():  # so that a run which is told to end names this one
            try:
                write_checkpoint(path, contents)
            except (OSError, RuntimeError) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
                return f"checkpoint: none at step {step}, it could not be written ({reason}): free some space"
            self.written.append(path)
            while self.keep and len(self.written) > self.keep:
                with contextlib.suppress(OSError):
                    self.written.pop(0).unlink()
            return f"checkpoint:{path.name}"


def peak_host_mib() -> float:
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def expected_memory(cfg, held: list[torch.Tensor]) -> int:
    """Peak MiB of training on a GPU with our kernels. held: weights, their gradients and optimizer state; the tokens of
    a slice take 4 bytes a logit and 33.5 a channel and layer, as in the corpus runs of 2026-11-28."""
    shape, tokens = cfg.shape, max(stage.tokens for stage in cfg.stages) // cfg.slices
    slice_bytes = tokens * (4 * shape.vocab + 33.5 * shape.dim * len(shape.layers))
    return round((sum(tensor.numel() * tensor.element_size() for tensor in held) + slice_bytes) / 2**20)


@contextlib.contextmanager
def told(cfg, world, trainer=None, checkpoints: Checkpoints | None = None):
    """What stops a run, as one sentence with where it was and how to go on. Raises UserError."""
    phase = lambda: trainer.phase if trainer else "making the model and its optimizer"  # noqa: E731
    hint = lambda: f"; {checkpoints.newest}" if checkpoints and checkpoints.newest else ""  # noqa: E731
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}{hint()}", error.code) from None
    except KeyboardInterrupt as error:
        how, code = error.args or ("interrupted", 130)
        raise UserError(f"{how} in {phase()}; the log so far is under {cfg.log_dir}{hint()}", code) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            raise UserError(out_of_memory(cfg, world.device, phase()) + hint(), 3) from None
        if world.size > 1 and re.search("gloo|nccl|connection|peer", str(error), re.I):
            world.watch.wait_for_verdict()
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"rank {world.rank} lost another process in {phase()} ({reason}): see what the others "
                            "print", 4) from None
        raise


def out_of_memory(cfg, device: torch.device, phase: str) -> str:
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else peak_host_mib()
    remedy = {"training": f"double slices= (now {cfg.slices}), which halves the tokens of a micro-batch; tokens a step "
                          "and learning rates stay",
              "validation": f"halve val_slice_tokens= (now {cfg.val_slice_tokens}), the tokens of a forward pass"}
    return (f"out of {'GPU ' * cuda}memory in {phase} (peak {peak:,.0f} MiB): "
            + remedy.get(phase, "take more GPUs with NPROC=, which share the optimizer's state"))


# ==================== Several processes ====================

class Watch:
    """Ends this process when another process of the run is gone: killed, stopped, stuck or cut off from it.

    A thread of each process counts up once a second in the rendezvous store, and reads the others' counts. A process
    whose count stands still is gone; where the store itself does not answer, this process is cut off. The count goes
    on where only the main thread is stuck. For that each process tells how many pieces of work it has begun: if all
    stand still for much longer than any piece took, the one that has begun the fewest keeps the others waiting.
    Seconds in which this process itself stood still (some compilers let no thread run) count for nobody."""
    PATIENCE = 40  # seconds without a count; 20 ended a run on 4 GPUs in its cold compilation
    STUCK, SLOW = 40, 20  # seconds, and times the longest piece of work so far, without a new piece: the longer of both

    def __init__(self, store, rank: int, size: int):
        self.store, self.rank, self.size = store.clone(), rank, size  # clone: a connection of its own
        self.store.set_timeout(datetime.timedelta(seconds=self.PATIENCE))
        self.begun, self.state, self.longest, self.last = 0, "busy", 0.0, time.monotonic()
        self.awake, self.answered, self.counts, self.changed, self.lock = 0.0, 0.0, {}, {}, threading.Lock()
        self.found, self.ended = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.exchange, self.judge)]
        self.publish(0)

    def start(self) -> None:
        for thread in self.threads:
            thread.start()
        atexit.register(self.end)

    def begin(self) -> None:
        """The main thread begins a piece of work: a forward pass, a collective."""
        now = time.monotonic()
        if self.state == "work":
            self.longest = max(self.longest, now - self.last)
        self.begun, self.last = self.begun + 1, now

    @contextlib.contextmanager
    def busy(self):
        """Work of unknown length: compilation, writing. No process is then taken for stuck while it counts."""
        state, self.state = self.state, "busy"
        yield
        self.state, self.last = state, time.monotonic()

    def working(self) -> None:
        """From here on pieces of work are alike, but where `busy` says otherwise."""
        self.state, self.last = "work", time.monotonic()

    def end(self) -> None:
        """This process has no more to do with the others."""
        self.state = "done"
        self.ended.set()
        for thread in self.threads:
            thread.join(self.PATIENCE)
        with contextlib.suppress(Exception):
            self.publish(-1)

    def publish(self, count: int) -> None:
        self.store.set(f"watch/{self.rank}", f"{count} {self.begun} {self.state}")

    def exchange(self) -> None:
        keys, count = [f"watch/{rank}" for rank in range(self.size)], 0
        while not self.ended.wait(1):
            count += 1
            with contextlib.suppress(Exception):  # the store is gone: `judge` sees that it does not answer
                self.publish(count)
                counts = [value.decode().split() for value in self.store.multi_get(keys)]
                with self.lock:
                    now = self.answered = self.awake
                    for rank, (tick, begun, state) in enumerate(counts):
                        for key, value in (("tick", tick), ("begun", begun)):
                            if self.counts.get((rank, key)) != value:
                                self.counts[rank, key], self.changed[rank, key] = value, now
                        self.counts[rank, "state"] = state

    def verdict(self) -> str | None:
        """Who is gone and how; None if nobody is."""
        with self.lock:
            silence, others = self.awake - self.answered, [r for r in range(self.size) if (r, "tick") in self.counts]
            if silence > self.PATIENCE:
                return (f"rank {self.rank} has had no answer from the run's store, on the first node, for "
                        f"{silence:.0f} s: that node or the network between is gone")
            alive = [rank for rank in others if self.counts[rank, "state"] != "done"]
            for rank in alive:  # as of the last answer
                if self.answered - self.changed[rank, "tick"] > self.PATIENCE:
                    return f"rank {rank} gave no sign of life for {self.PATIENCE} s: it was killed, stopped or cut off"
            still = min((self.answered - self.changed[rank, "begun"] for rank in alive), default=0)
            limit = max(self.STUCK, self.SLOW * self.longest)
            if still > limit and all(self.counts[rank, "state"] == "work" for rank in alive):
                begun = {rank: int(self.counts[rank, "begun"]) for rank in alive}
                slow = [str(rank) for rank in alive if begun[rank] == min(begun.values())]
                if len(slow) < len(alive):
                    return (f"rank {', '.join(slow)} has been stuck for {still:.0f} s, in work that took "
                            f"{self.longest:.1f} s at most before, and the others wait for it")

    def judge(self) -> None:
        now = time.monotonic()
        while not self.ended.wait(1):
            before, now = now, time.monotonic()
            self.awake += min(now - before, 2)
            if sentence := self.verdict():
                self.found.set()
                leave(fail(f"{sentence}; the run ends; if it had save_every=, go on from its newest checkpoint with "
                           "resume=", 4, everywhere=True))

    def wait_for_verdict(self) -> None:
        """For a main thread whose collective failed, mostly as another process is gone; returns if none is found."""
        time.sleep(self.PATIENCE + 5)
        if self.found.is_set():
            time.sleep(60)  # judge is about to end this process


DONE = SimpleNamespace(wait=lambda: None)  # the handle of a collective among one process
ALONE = SimpleNamespace(begin=lambda: None, working=lambda: None, busy=contextlib.nullcontext)


class World(NamedTuple):
    """The processes of a run, and collectives that are no-ops when there is one; each gives a handle to wait on."""
    rank: int
    size: int
    device: torch.device
    watch: Watch | SimpleNamespace = ALONE

    def reduce_scatter(self, full: Tensor):
        """Sum over processes; each gets its share of the first dimension."""
        if self.size == 1:
            return full, DONE
        self.watch.begin()
        share = torch.empty_like(full[:full.size(0) // self.size])
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name before 2.13
        return share, call(share, full.contiguous(), async_op=True)

    def all_reduce(self, full: Tensor):
        self.watch.begin()
        return full, DONE if self.size == 1 else dist.all_reduce(full, async_op=True)

    def all_gather(self, full: Tensor):
        """Every process's share of `full` to all, in place."""
        if self.size == 1:
            return DONE
        self.watch.begin()
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return call(full, self.share(full), async_op=True)

    def share(self, full: Tensor) -> Tensor:
        return full.chunk(self.size)[self.rank]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start_world(cfg) -> World:
    """This process's place among the others. Raises UserError."""
    given = {key: os.environ.get(key, default) for key, default in
             (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))}
    if not all(text.isdecimal() for text in given.values()) or int(given["WORLD_SIZE"]) < 1:
        raise UserError(f"the environment has {given}: unset these, or start the run through ./run.sh")
    rank, local_rank, size = map(int, given.values())
    if cfg.slices % size or size & (size - 1):
        raise UserError(f"{size} processes cannot share the {cfg.slices} slices of a step evenly: start 1, 2, 4 or 8, "
                        "for example NPROC=4 ./run.sh; 16 take slices=16")
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if gpus and here > gpus:
        raise UserError(f"{here} processes of this node need a GPU each, {gpus} found: start at most {gpus} processes "
                        f"a node, for example NPROC={1 << (gpus.bit_length() - 1)} ./run.sh")
    if gpus and here > 1:  # each process has its GPU as number 0: so what one has compiled, all find in the cache
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank].strip() if visible else str(local_rank)
    number = local_rank if torch.cuda.device_count() > 1 else 0  # more: the driver had begun, and goes by the old list
    return World(rank, size, torch.device("cuda", number) if gpus else torch.device("cpu"))


ARRIVAL = 300  # seconds in which all processes have to come, which import PyTorch at unlike speeds


def connect(world: World) -> World:
    """Joins the process group; after the checks of the input, so that a mistake costs no GPU time. The world returned
    watches over the other processes."""
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(world.device)
    if world.size == 1:
        return world
    store, *_ = next(dist.rendezvous("env://"))
    store.set(f"here/{world.rank}", "")
    try:
        store.wait([f"here/{rank}" for rank in range(world.size)], datetime.timedelta(seconds=ARRIVAL))
    except dist.DistError:
        late = ", ".join(str(rank) for rank in range(world.size) if not store.check([f"here/{rank}"]))
        raise UserError(f"rank {late} has not come within {ARRIVAL} s: it was stopped, or its node is cut off; mend "
                        "that and start again", 4) from None
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=world.rank, world_size=world.size,
                            device_id=world.device if cuda else None,
                            timeout=datetime.timedelta(minutes=30))  # ranks may compile at unlike speeds
    watch = Watch(store, world.rank, world.size)
    world.barrier()
    watch.start()
    return world._replace(watch=watch)


def launch(argv: list[str]) -> int:
    """torchrun, whose report of a failed process becomes one sentence, or none where the process gave its own."""
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost store costs a thousand lines of C++ frames
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")  # seconds from SIGTERM to SIGKILL for the others
    for function in (PContext.close, LocalElasticAgent._shutdown):  # which take 30 where a rank has failed
        if list(inspect.signature(function).parameters)[-1] == "timeout":
            function.__defaults__ = (*function.__defaults__[:-1], 10)
    try:
        run.main(argv)
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode or 1
        sentence = f"rank {rank} was killed ({failure.signal_name()}): the run ends"
        if failure.exitcode == -signal.SIGKILL:
            sentence += "; if nobody killed it, the machine's memory ran out"
        print(f"error: {sentence}; if the run had save_every=, go on from its newest checkpoint with resume=",
              file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    except (SignalException, KeyboardInterrupt) as error:
        print("error: interrupted; logs and checkpoints are complete up to here", file=sys.stderr, flush=True)
        return 128 + getattr(error, "sigval", signal.SIGINT)


# ==================== Log, clock, console ====================

class Log:
    """One text file a run; only rank 0 writes. A write that fails (a full disk) is kept and tried again with the
    next line, so that what was measured is not lost while the run goes on."""

    def __init__(self, path: Path | None):
        self.path, self.unwritten, self.failed = path, "", False
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(path, "x", buffering=1, encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write the log {os.path.relpath(path, ROOT)}: {error.strerror}; "
                                "name a writable folder with log_dir=") from None

    def write(self, text: str) -> None:
        if self.path is not None:
            self.unwritten += text + "\n"
            self.flush()

    def flush(self) -> None:
        try:
            if self.file.closed:
                self.file = open(self.path, "a", buffering=1, encoding="utf-8")
            self.file.write(self.unwritten)
            self.file.flush()
            self.unwritten = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.close()  # drops what Python still buffers; the lines are in `unwritten`
            if not self.failed:
                tqdm.write(f"warning: cannot write the log ({error.strerror}): its lines are kept in memory until "
                           "there is space", file=sys.stderr)
            self.failed = True

    def close(self) -> None:
        """Raises UserError if lines are still unwritten; they are printed first, so nothing is lost."""
        if self.path is None:
            return
        self.flush()
        if self.unwritten:
            print(self.unwritten, end="", flush=True)
            raise UserError(f"the log {os.path.relpath(self.path, ROOT)} could not be completed (disk full?): its "
                            "last lines are printed above; free some space")
        self.file.close()


def new_log(cfg, world: World) -> Log:
    folder = ROOT / cfg.log_dir / f"{datetime.date.today():%Y-%m-%d}_{cfg.name}"
    return Log(None if world.rank else folder / f"{uuid.uuid4()}.txt")


def shell(*command: str) -> str:
    """Output of a command, or a word why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else f"({command[0]}: exit {done.returncode})"
    except (OSError, subprocess.TimeoutExpired):
        return f"({command[0]}: not available)"


def python_command() -> str:
    """How to start this Python from the root: by name where the PATH leads to it, else by its path."""
    own = Path(sys.executable)
    named = (name for name in ("python", "python3") if Path(shutil.which(name) or "/").parent == own.parent)
    return next(named, os.path.relpath(own, ROOT) if own.is_relative_to(ROOT) else str(own))


def file_hash(name: str) -> str:
    return hashlib.sha256((ROOT / name).read_bytes()).hexdigest()


def gpu_description(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def product_rate(device: torch.device) -> float:
    """TFLOP/s of an 8192-cubed product of random bfloat16 matrices: machines of one name differ."""
    from torch.utils.benchmark import Timer  # which warns on a machine without CUDA
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * 8192**3 / Timer("a @ b", globals={"a": a, "b": b}).timeit(30).mean / 1e12


def device_sync(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_initialized():  # the check of the shards comes before any GPU is touched
        torch.cuda.synchronize(device)


class Clock:
    """The training clock and the named regions outside it, all in seconds, read with the device idle."""

    def __init__(self, device: torch.device):
        self.device, self.trained, self.started, self.untimed = device, 0.0, None, {}

    def start(self) -> None:
        device_sync(self.device)
        self.started = time.perf_counter()

    def stop(self) -> None:
        device_sync(self.device)
        self.trained += time.perf_counter() - self.started
        self.started = None

    def read(self) -> float:
        """Training time so far, without waiting for the device."""
        return self.trained + (time.perf_counter() - self.started if self.started is not None else 0.0)

    @contextlib.contextmanager
    def region(self, name: str):
        """Time outside the training clock, added up under a name."""
        device_sync(self.device)
        begin = time.perf_counter()
        yield
        device_sync(self.device)
        self.untimed[name] = self.untimed.get(name, 0.0) + time.perf_counter() - begin


REGIONS = {  # of a profile: the first whose pattern a kernel's (on a CPU an operator's) name has
    "communication": "nccl|c10d|gloo|all_reduce|reduce_scatter|all_gather", "copies": "memcpy|memset",
    "loss": "_loss_|cross_entropy|log_softmax", "attention": "attention|attn|flash|fmha",
    "optimizer": "adam|normuon|orthogonal|symmetric|lerp|foreach|rsub_sqrt",
    "GEMM": "gemm|matmul|nvjet|splitk|relu_square|bmm|::mm|addmm|linear", "norms and other elementwise": ""}


class Profile:
    """Two steps (one with Adam, one without) under PyTorch's profiler: a Chrome trace beside the log, and a table of
    time by region. To start, stop and write is outside the clock; validations and checkpoints around the steps are
    not profiled. The profiler slows what it watches."""

    def __init__(self, log: Log, first: int, clock: Clock, watch):
        self.log, self.clock, self.watch, self.profiler = log, clock, watch, None
        self.steps = (first, first + 2) if first and log.path else ()

    def begin(self, step: int) -> None:
        if step in self.steps[:1]:
            with self.clock.region("profile"), self.watch.busy():
                self.profiler = torch.profiler.profile()
                self.profiler.start()
            self.since = time.perf_counter()
            self.log.write(f"profile: from step {step}")

    def end(self, step: int) -> None:
        if self.profiler and step in self.steps[1:]:
            seconds, path = time.perf_counter() - self.since, self.log.path.with_suffix(".trace.json")
            with self.clock.region("profile"), self.watch.busy():
                self.profiler.stop()
                self.profiler.export_chrome_trace(str(path))
                self.log.write("\n".join([f"profile: up to step {step}, trace {path.name}", *region_table(
                    self.profiler.events(), seconds, self.clock.device.type == "cuda")]))


def region_table(events, seconds: float, cuda: bool) -> list[str]:
    """Lines of time by region. events: the profiler's; on a GPU kernels, on a CPU operators without their children."""
    totals, spans = dict.fromkeys(REGIONS, 0.0), []
    for event in events:
        if (event.device_type == torch.autograd.DeviceType.CUDA) == cuda:
            region = next(name for name, pattern in REGIONS.items() if re.search(pattern, event.name, re.I))
            totals[region] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            spans.append((event.time_range.start, event.time_range.end))
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):  # kernels of several streams overlap
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
    rows = [*totals.items(), ("idle", max(0.0, seconds - busy / 1e6))]
    return [f"profile: {name:<28} {1e3 * value:9.1f} ms {100 * value / seconds:5.1f} %" for name, value in rows]


def start_reading(world, loss: torch.Tensor):
    """Sums the loss over processes and starts its way to the host, so that no step waits for it."""
    loss = loss.clone()
    world.all_reduce(loss)[1].wait()
    if world.device.type != "cuda":
        return loss, None
    host = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
    return host, torch.cuda.current_stream(world.device).record_event()


def finish_log(log: Log, clock: Clock, console: "Console", result: dict) -> None:
    for name, seconds in clock.untimed.items():
        log.write(f"untimed:{name} {seconds:.1f}s")
    log.write(f"peak memory:{result['peak_memory_allocated_mib']} MiB allocated, "
              f"{result['peak_memory_reserved_mib']} MiB reserved")
    log.write(f"tokens:{result['tokens']}")
    log.write(json.dumps(result))
    log.close()
    if log.path is not None:
        console.say(f"val_loss {result['val_loss']:.4f} after {result['train_time_ms'] / 1e3:.1f} s of training\n"
                    f"log: {os.path.relpath(log.path, ROOT)}")


class Console:
    """What rank 0 shows: a tqdm bar on a terminal, a plain line now and then elsewhere; by tokens, as steps grow."""

    def __init__(self, last_step: int, tokens: int, log_every: int, rank: int):
        self.last_step, self.tokens, self.quiet = last_step, tokens, rank != 0
        self.bar, self.every = None, max(log_every, last_step // 20)

    def say(self, text: str) -> None:
        if self.quiet:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough; the run and its log go on
            sys.stdout, self.quiet = open(os.devnull, "w"), True

    def start(self, tokens: int, seconds: float) -> None:
        self.before, self.loss = (tokens, seconds), "..."  # of a run that goes on: perhaps another machine's
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(total=self.tokens, initial=tokens, unit="tok", unit_scale=True, dynamic_ncols=True)

    def step(self, step: int, tokens: int, seconds: float) -> None:
        """After step number `step` (from 1), `tokens` tokens and `seconds` of training."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"step {step}/{self.last_step}, loss {self.loss}", refresh=False)
            self.bar.update(tokens - self.bar.n)
        elif not self.quiet and step % self.every == 0:
            rate = (tokens - self.before[0]) / max(seconds - self.before[1], 1e-9)
            self.say(f"step {step}/{self.last_step}  train_loss {self.loss}  {rate:,.0f} tok/s  "
                     f"{seconds:.1f} s, about {(self.tokens - tokens) / rate:.0f} s left")

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


if __name__ == "__main__":
    if sys.argv[1:2] != ["launch"]:
        sys.exit(f"error: runtime.py has no command {' '.join(sys.argv[1:])!r}: write `python runtime.py launch ...`")
    sys.exit(launch(sys.argv[2:]))
