# 38 of NOTES.md: on four GPUs, from the project's folder with data/corpus in place: cold, warm, warm; then on parts of
# them at once a resume on one GPU, a seed on one, fewer steps on two. Seconds of each to the results' folder, $1
stamp() { echo "$(cut -d' ' -f1 /proc/uptime) $*"; }
stamp cold; (time ./run.sh preset=corpus name=Again save_every=296 keep=0) > $1/cold.txt 2>&1
for seed in 1 2; do
    stamp warm $seed; (time ./run.sh preset=corpus name=Again seed=$seed) > $1/warm_$seed.txt 2>&1
done
stamp apart
CUDA_VISIBLE_DEVICES=0 taskset -c 0-15 ./run.sh preset=corpus name=Resumed \
    resume="$(echo records/runs/*_Again/*_step000296.pt)" > $1/resumed.txt 2>&1 &
CUDA_VISIBLE_DEVICES=1 taskset -c 16-31 ./run.sh preset=corpus name=One > $1/one.txt 2>&1 &
CUDA_VISIBLE_DEVICES=2,3 taskset -c 32-63 ./run.sh preset=corpus name=Fewer steps=416 trials=2 > $1/fewer.txt 2>&1 &
wait; stamp done
