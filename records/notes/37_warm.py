"""Where the seconds before the first step go: 37 of NOTES.md; from the project's folder, with run.sh's caches

    export TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/inductor TRITON_CACHE_DIR=$PWD/.cache/triton OMP_NUM_THREADS=1
    python runtime.py launch --standalone --nproc_per_node 4 records/notes/37_warm.py [option=value ...]

What rank 0 prints: seconds since its start at each point; the compiler's own times and counts; where its main thread
was, looked at every 10 ms: by function with what it calls, and by line."""
import collections
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
started = int(Path("/proc/self/stat").read_text().rsplit(")")[1].split()[19]) / os.sysconf("SC_CLK_TCK")
within, at, main = collections.Counter(), collections.Counter(), threading.main_thread().ident


def look() -> None:
    while True:
        begin, seen = time.perf_counter(), set()
        frame = leaf = sys._current_frames()[main]
        while frame is not None:
            seen.add((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        time.sleep(0.01)
        passed = time.perf_counter() - begin
        within.update(dict.fromkeys(seen, passed))
        at[leaf.f_code.co_filename, f"{leaf.f_lineno} {leaf.f_code.co_name}"] += passed


def point(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.clock_gettime(time.CLOCK_BOOTTIME) - started:7.2f} s  {what}", flush=True)


point("python")
threading.Thread(target=look, daemon=True).start()
import torch  # noqa: E402

point("torch imported")
import runtime  # noqa: E402
import train_gpt as t  # noqa: E402

point("train_gpt imported")
cfg = t.parse_options(sys.argv[1:] or ["preset=corpus"])
world = runtime.start_world(cfg)
plan, validation = t.plan_run(cfg, t.find_shards(cfg, "train_files")), t.read_validation(cfg, world)
point("shards checked")
world = runtime.connect(world)
runtime.device_sync(world.device)
point("connected")
trainer, console = t.Trainer(cfg, world), t.Console(cfg.last_step, plan.tokens, cfg.log_every, world.rank)
runtime.device_sync(world.device)
point("model and optimizer")
trainer.describe(plan)
point("described")


def timed(name: str):
    function = getattr(trainer, name)

    def call(*arguments, **options):
        begin = time.perf_counter()
        result = function(*arguments, **options)
        if not (world.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            runtime.device_sync(world.device)
        point(f"{name} took {time.perf_counter() - begin:.2f}")
        return result
    return call


for method in ("slice_loss", "hidden", "learn_slice", "train_step", "evaluate", "reset"):
    setattr(trainer, method, timed(method))
trainer.warm_up(plan, validation, console)
trainer.reset(0)
world.barrier()
point("ready for the first step")
if world.rank == 0:
    from torch._dynamo.utils import compile_times, counters
    print(dict(counters["aot_autograd"]), dict(counters["inductor"]))
    print(compile_times(repr="str", aggregate=True))
    for counter, most in ((within, 220), (at, 60)):
        print(f"{sum(at.values()):.1f} s looked at")
        for (file, place), seconds in counter.most_common(most):
            print(f"{seconds:7.2f}  {file.partition('site-packages/')[2] or file} {place}")
world.barrier()
sys.stdout.flush()
os._exit(0)
