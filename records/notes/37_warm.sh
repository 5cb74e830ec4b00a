# 37 of NOTES.md: 37_warm.py on four GPUs with made-up shards, every stage: cold, then three times warm
mkdir -p data/corpus
python3 - <<'E'
import numpy as np
for name, count in (("train_000001", 62_000_000), ("train_000002", 62_000_000), ("val_000000", 10_485_761)):
    tokens = np.random.default_rng(0).integers(0, 50256, count).astype("<u2")
    tokens[::600] = 50256
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, count
    open(f"data/corpus/corpus_{name}.bin", "wb").write(header.tobytes() + tokens.tobytes())
E
export TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/inductor TRITON_CACHE_DIR=$PWD/.cache/triton OMP_NUM_THREADS=1
for run in cold warm_1 warm_2; do
    (time python3 runtime.py launch --standalone --nproc_per_node 4 records/notes/37_warm.py preset=corpus) \
        > $OUT/$run.txt 2>&1
done
(time ./run.sh preset=corpus name=Warm stop_after=410) > $OUT/run.txt 2>&1
