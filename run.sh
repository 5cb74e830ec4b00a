#!/usr/bin/env bash
# ./run.sh [key=value ...]   train: on 8, 4, 2 or 1 GPUs, whatever there is, or the smoke preset on a CPU
# ./run.sh records/ladder/04_Muon/train_gpt.py [key=value ...]   the same with another script, here a rung of the ladder
# ./run.sh check             what this machine has, and one remedy a line for what a run would miss
# ./run.sh test              install what the tests need and run them
#
# NPROC=n                    processes on this node (default: the largest of 8, 4, 2, 1 that the GPUs allow)
# NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several nodes: run this on each of them
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}" 2>/dev/null) || self=${BASH_SOURCE[0]}
CDPATH='' cd "$(dirname "$self")"

# A stable place for compiled graphs and kernels, so that the second run starts fast.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$PWD/.cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/.cache/triton}"

# On a CPU: threads that wait asleep and memory that is kept; a busy machine is many times faster (NOTES.md, 6).
cpu_settings() {
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
}

say() { echo "run.sh: $*" >&2; }
die() { echo "error: $*" >&2; exit 2; }

# has PYTHON MODULE...: the requirements import there, torch is 2.11 or newer, and the other modules import too; sets
# gpus, since each start of PyTorch takes seconds.
has() {
    local python=$1; shift
    command -v "$python" >/dev/null 2>&1 || return 1
    gpus=$("$python" - "$@" 2>/dev/null <<'PY'
import importlib, sys
modules = ["numpy", "huggingface_hub", "tqdm", "torch"] + ["triton"] * sys.platform.startswith("linux")
for name in modules + sys.argv[1:]:
    importlib.import_module(name)
import torch
print(f"\ngpus:{torch.cuda.device_count()}")
sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
PY
    ) || { gpus=; return 1; }
    gpus=${gpus##*gpus:} gpus=${gpus%%$'\n'*}
}

# find_python REQUIREMENTS MODULE...: sets PYTHON to the active Python, or to .venv with the requirements installed.
find_python() {
    local requirements=$1; shift
    gpus=
    for PYTHON in python python3 "$PWD/.venv/bin/python"; do
        if has "$PYTHON" "$@"; then return; fi
    done
    local base
    base=$(command -v python3 || command -v python) || die "no Python found: install Python 3.11 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$base" --version) is too old for the pinned requirements: install Python 3.11 or newer"
    say "this Python has not all of $requirements: installing it into .venv (once, some minutes)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear .venv ||
        die "could not make .venv: see above; this folder must be writable, and Python's venv module installed (on" \
            "Debian and Ubuntu: apt install python3-venv)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
        die "could not install $requirements: see pip's message above, check the network and the disk, run this again"
    PYTHON="$PWD/.venv/bin/python"
}

if [ "${1:-}" = test ]; then
    shift
    find_python requirements-dev.txt pytest
    if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
        "$PYTHON" -m ruff check --no-cache --select E,F,I,UP,B --line-length 120 .
    else
        say "ruff is not installed here: the style check is left out"
    fi
    if "$PYTHON" -c 'import scipy' >/dev/null 2>&1; then
        "$PYTHON" -m records check
        "$PYTHON" -m records table --check
    else
        say "scipy is not installed here: the check of the records is left out"
    fi
    cpu_settings
    if "$PYTHON" -c 'import xdist' >/dev/null 2>&1; then
        set -- -n auto "$@"  # how many workers: tests/conftest.py; a later -n wins
    else
        say "pytest-xdist is not installed here: the tests run one after another"
    fi
    exec "$PYTHON" -m pytest -o testpaths=tests "$@"
fi

# What was asked for, before anything is installed or started.
script=train_gpt.py check=
case "${1:-}" in
    evaluate.py | sample.py) die "$1 is no trainer: run it by itself, python $1 ckpt=..." ;;
    *.py) script=$1; shift; [ -f "$script" ] || die "no script $script here: give a path from this folder, for example" \
        records/ladder/04_Muon/train_gpt.py ;;
    */*) [ ! -f "$1/train_gpt.py" ] || die "$1 is a folder: give its script, ${1%/}/train_gpt.py" ;;
esac
case "${1:-}" in
    check) check=1; shift ;;
    help | --help | -h) find_python requirements.txt; exec "$PYTHON" "$script" "$@" ;;
esac
nodes=${NNODES:-1}
for setting in NNODES="$nodes" NPROC="${NPROC:-1}"; do
    [[ "${setting#*=}" =~ ^(1|2|4|8|16|32)$ ]] || die "$setting: give 1, 2, 4 or 8, for a step's 8 slices to be shared" \
        "evenly; or 16 or 32 with as many slices="
done
if [ "$nodes" -gt 1 ]; then
    [[ "${NODE_RANK:-}" =~ ^(0|[1-9][0-9]?)$ && "$NODE_RANK" -lt "$nodes" ]] ||
        die "NNODES=$nodes needs NODE_RANK (now '${NODE_RANK:-}'): give the number of this node, 0 to $((nodes - 1))"
    [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$nodes needs MASTER_ADDR: give the address of node 0"
    [[ "${MASTER_PORT:-29500}" =~ ^[0-9]{1,5}$ ]] || die "MASTER_PORT=$MASTER_PORT: give a port of node 0 that is free"
fi

find_python requirements.txt
gpus=${gpus:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
if [ "$gpus" -eq 0 ]; then cpu_settings; fi
if [ "$gpus" -eq 0 ] && [[ " $*" != *" preset="* ]]; then
    say "no GPU: taking the smoke preset, a small model of the same code, on the CPU"
    set -- preset=smoke "$@"
fi
nproc=1
for n in 8 4 2; do
    if [ "$gpus" -ge "$n" ]; then nproc=$n; break; fi
done
nproc=${NPROC:-$nproc}
slices=8
for option in "$@"; do  # what is no number of slices, the trainer refuses
    if [[ "$option" =~ ^slices=([1-9][0-9]{0,8})$ ]]; then slices=${BASH_REMATCH[1]}; fi
done
fewer="NPROC=$((slices / nodes)) or fewer"
[ "$nodes" -le "$slices" ] || fewer="fewer nodes"
[ "$((nodes * nproc))" -le "$slices" ] || die "$nodes nodes of $nproc processes are more than a step's $slices slices:" \
    "give $fewer, or slices=$((nodes * nproc))"

launch=("$PYTHON")
if [ "$nodes" -gt 1 ]; then
    launch+=(runtime.py launch --nnodes "$nodes" --nproc_per_node "$nproc" --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
elif [ "$nproc" -gt 1 ]; then
    launch+=(runtime.py launch --standalone --nproc_per_node "$nproc")
fi
if [ "${#launch[@]}" -gt 1 ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi

if [ -n "$check" ]; then
    code=0
    "$PYTHON" tests/check_machine.py "$@" || code=$?
    if [ "$code" -ne 2 ]; then "${launch[@]}" tests/check_machine.py all-reduce "$@" || code=1; fi
    exit "$code"
fi
"$PYTHON" "$script" fetch "$@"  # checks the options and makes the preset's missing shards
exec "${launch[@]}" "$script" "$@"
