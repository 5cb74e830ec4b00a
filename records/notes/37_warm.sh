# 37 of NOTES.md: 37_warm.py on four GPUs with made-up shards, one stage, by the number of compile workers a process
mkdir -p data/corpus
python3 - <<'E'
import numpy as np
for name, count in (("train_000001", 19_000_000), ("val_000000", 10_485_761)):
    tokens = np.random.default_rng(0).integers(0, 50256, count).astype("<u2")
    tokens[::600] = 50256
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, count
    open(f"data/corpus/corpus_{name}.bin", "wb").write(header.tobytes() + tokens.tobytes())
E
export TORCHINDUCTOR_CACHE_DIR=$PWD/.cache/inductor TRITON_CACHE_DIR=$PWD/.cache/triton OMP_NUM_THREADS=1
four="python3 runtime.py launch --standalone --nproc_per_node 4 records/notes/37_warm.py"
one="preset=corpus stop_after=140"
for i in 1 2; do (time python3 -c "import torch; print(torch.cuda.device_count())"); done > $OUT/start.txt 2>&1
for i in 1 2; do (time python3 train_gpt.py fetch $one); done >> $OUT/start.txt 2>&1
(time $four $one) > $OUT/cold.txt 2>&1
(time $four $one) > $OUT/warm.txt 2>&1
(export TORCHINDUCTOR_COMPILE_THREADS=16; time $four $one) > $OUT/warm_16.txt 2>&1
(export TORCHINDUCTOR_COMPILE_THREADS=1; time $four $one) > $OUT/warm_1.txt 2>&1
(time $four $one) > $OUT/warm_again.txt 2>&1
(time $four profile $one) > $OUT/warm_profile.txt 2>&1
(time python3 records/notes/37_warm.py $one) > $OUT/warm_one_gpu.txt 2>&1
grep -h "real" $OUT/*.txt
