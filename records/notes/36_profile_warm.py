"""Where a warm-up's seconds go: 36 of NOTES.md; from the project's folder, with run.sh's caches

    TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/inductor TRITON_CACHE_DIR=$PWD/.cache/triton \\
    python records/notes/36_profile_warm.py [option=value ...]

One process. Python's profile by function, and the compiler's own times and counts."""
import cProfile
import pstats
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from torch._dynamo.utils import compile_times, counters  # noqa: E402

import runtime  # noqa: E402
import train_gpt as t  # noqa: E402

cfg = t.parse_options(sys.argv[1:] or ["preset=corpus"])
world = runtime.connect(runtime.start_world(cfg))
plan, validation = t.plan_run(cfg, t.find_shards(cfg, "train_files")), t.read_validation(cfg, world)
trainer, console = t.Trainer(cfg, world), t.Console(cfg.last_step, plan.tokens, cfg.log_every, 0)
trainer.reset(0)
profile, begin = cProfile.Profile(), time.perf_counter()
profile.runcall(trainer.warm_up, plan, validation, console)
print(f"warm-up {time.perf_counter() - begin:.1f} s under the profiler", dict(counters["aot_autograd"]))
print(compile_times(repr="str", aggregate=True))
for order in ("cumtime", "tottime"):
    pstats.Stats(profile).sort_stats(order).print_stats(120)
