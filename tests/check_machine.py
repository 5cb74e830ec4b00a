"""What this machine has, what that switches, and what a run would miss: ./run.sh check [key=value ...]."""
import glob
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime  # noqa: E402
import train_gpt  # noqa: E402
from train_gpt import Config, UserError, World  # noqa: E402


def software_rows(world: World):
    """(what, found, remedy or '') for Python, torch and, with a GPU, CUDA, driver and Triton."""
    new_enough = sys.version_info >= (3, 11)
    yield "python", platform.python_version(), "" if new_enough else "install Python 3.11 or newer"
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    yield "torch", torch.__version__, "" if version >= (2, 11) else "pip install -r requirements.txt"
    if world.device.type != "cuda":
        yield "CUDA", "no GPU: the smoke preset runs on the CPU", ""
        return
    yield "CUDA", str(torch.version.cuda), ""
    drivers = runtime.shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield "driver", drivers.split("\n")[0], ""
    triton = importlib.util.find_spec("triton")
    yield ("triton", importlib.import_module("triton").__version__ if triton else "absent: plain PyTorch takes the "
           "kernels' place", "" if triton else "pip install -r requirements.txt")


def hardware_rows(cfg: Config, world: World):
    yield "device", f"{torch.cuda.device_count() or 1}x {runtime.gpu_description(world.device)}", ""
    capability = torch.cuda.get_device_capability(world.device) if world.device.type == "cuda" else (0, 0)
    dtype = train_gpt.choose_dtype(cfg, capability)
    name = str(dtype).removeprefix("torch.")
    for what, choose, shown in (("head", train_gpt.choose_fp8, lambda fp8: "fp8" if fp8 else name),
                                ("operations", train_gpt.choose_kernels, lambda pair: ", ".join(
                                    f"{operation} {kind}" for operation, kind in pair[1].items()))):
        try:
            yield what, shown(choose(cfg, capability, dtype)), ""
        except UserError as error:
            yield what, "not possible here", str(error)
    try:
        *_, kinds, fp8 = train_gpt.choose(cfg, world.device)
        yield "MLP", "fp8" if train_gpt.fp8_mlp(fp8, kinds) else name, ""
    except UserError:  # said above
        pass
    yield "other matrices", name, ""


def disk_rows():
    free = shutil.disk_usage(train_gpt.ROOT).free / 2**30
    yield "disk", f"{free:.1f} GiB free", "" if free > 1 else "free at least 1 GiB for logs and the compile cache"


def data_rows(cfg: Config, world: World):
    try:
        files = train_gpt.find_shards(cfg, "train_files")
        yield "training shards", f"{len(files)} found, {train_gpt.plan_run(cfg, files).shards} needed", ""
    except UserError as error:
        missing = train_gpt.own_shards(cfg) and not glob.glob(cfg.train_files, root_dir=train_gpt.ROOT)
        if missing:
            yield "shards", f"none yet: ./run.sh makes them first ({cfg.fetch})", ""
            return
        yield "training shards", "too few or broken", str(error)
    try:
        train_gpt.read_validation(cfg, world)
        yield "validation tokens", f"{cfg.val_tokens:,}", ""
    except UserError as error:
        yield "validation tokens", "too few or broken", str(error)


def all_reduce_row(world: World):
    """A 1 MB all-reduce over the processes of this run, the mean of 20 after 5."""
    if world.size == 1:
        yield "all-reduce", "one process, none needed", ""
        return
    runtime.connect(world)
    data = torch.ones(2**18, device=world.device)
    for i in range(25):
        if i == 5:
            runtime.device_sync(world.device)
            begin = time.perf_counter()
        dist.all_reduce(data)
    runtime.device_sync(world.device)
    seconds = (time.perf_counter() - begin) / 20
    dist.destroy_process_group()
    yield "all-reduce", f"1 MB in {1e6 * seconds:.0f} us, {data.nbytes / seconds / 1e9:.2f} GB/s", ""


def main(argv: list[str]) -> int:
    """Prints the table, or with `all-reduce` in front its last row; returns 1 if a run would miss something, 2 for bad
    input."""
    collective = argv[:1] == ["all-reduce"]
    try:
        cfg = train_gpt.parse_options(argv[collective:])
        world = runtime.start_world(cfg)
    except UserError as error:
        return runtime.fail(str(error), 2)
    rows = list(all_reduce_row(world)) if collective else [
        *software_rows(world), *hardware_rows(cfg, world), *disk_rows(), *data_rows(cfg, world)]
    if world.rank == 0:
        for what, found, remedy in rows:
            print(f"{'ok ' if not remedy else 'BAD'}  {what:<18} {found}")
        for what, _, remedy in rows:
            if remedy:
                print(f"remedy for {what}: {remedy}")
    return int(any(remedy for _, _, remedy in rows))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
