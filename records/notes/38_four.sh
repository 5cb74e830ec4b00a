# 38 of NOTES.md: on four GPUs, from the project's folder with data/corpus in place: cold, warm, warm; then on a GPU each
# a resume and fewer steps, two seeds, the suite (in the copy of the project $2), fewer steps. Output to the folder $1
stamp() { echo "$(cut -d' ' -f1 /proc/uptime) $*"; }
on() { gpu=$1; shift; CUDA_VISIBLE_DEVICES=$gpu taskset -c $((16 * gpu))-$((16 * gpu + 15)) "$@"; }
stamp cold; (time ./run.sh preset=corpus name=Again save_every=296 keep=0) > $1/cold.txt 2>&1
for seed in 1 2; do
    stamp warm $seed; (time ./run.sh preset=corpus name=Again seed=$seed) > $1/warm_$seed.txt 2>&1
done
stamp apart
(cd $2 && time on 2 ./run.sh test -n 14 -v; stamp suite) > $1/gpu_tests.txt 2>&1 &
(on 0 ./run.sh preset=corpus name=Resumed resume="$(echo records/runs/*_Again/*_step000296.pt)"
 on 0 ./run.sh preset=corpus name=Fewer steps=416 seed=2) > $1/resumed.txt 2>&1 &
on 1 ./run.sh preset=corpus name=One trials=2 > $1/one.txt 2>&1 &
on 3 ./run.sh preset=corpus name=Fewer steps=416 trials=2 > $1/fewer.txt 2>&1 &
wait; stamp done
