"""Where the seconds before the first step go: 37 of NOTES.md; from the project's folder, with run.sh's caches

    export TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/inductor TRITON_CACHE_DIR=$PWD/.cache/triton OMP_NUM_THREADS=1
    python runtime.py launch --standalone --nproc_per_node 4 records/notes/37_warm.py [profile] [option=value ...]

What rank 0 prints: seconds since its start at each point, the compiler's own times and counts, and with profile
Python's profile of the warm-up by function."""
import cProfile
import os
import pstats
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
started = int(Path("/proc/self/stat").read_text().rsplit(")")[1].split()[19]) / os.sysconf("SC_CLK_TCK")


def point(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.clock_gettime(time.CLOCK_BOOTTIME) - started:7.2f} s  {what}", flush=True)


point("python")
import torch  # noqa: E402

point("torch imported")
from torch._dynamo.utils import compile_times, counters  # noqa: E402

point("dynamo imported")
import runtime  # noqa: E402
import train_gpt as t  # noqa: E402

point("train_gpt imported")
arguments = [x for x in sys.argv[1:] if x != "profile"] or ["preset=corpus"]
cfg = t.parse_options(arguments)
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
trainer.reset(0)
runtime.device_sync(world.device)
point("weights drawn")


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


for method in ("slice_loss", "hidden", "token_losses", "evaluate_slice", "learn_slice", "train_step", "evaluate",
               "reset"):
    setattr(trainer, method, timed(method))
profile, begin = cProfile.Profile(), time.perf_counter()
run = profile.runcall if "profile" in sys.argv and world.rank == 0 else lambda function, *rest: function(*rest)
run(trainer.warm_up, plan, validation, console)
point(f"warm-up took {time.perf_counter() - begin:.1f} s")
if world.rank == 0:
    print(dict(counters["aot_autograd"]), dict(counters["inductor"]))
    print(compile_times(repr="str", aggregate=True))
    if "profile" in sys.argv:
        for order in ("cumtime", "tottime"):
            pstats.Stats(profile).sort_stats(order).print_stats(150)
world.barrier()
sys.stdout.flush()
os._exit(0)
