#!/usr/bin/env bash
# Train the ten rows of Table 1, one after the other, and print what each should reach.
#
#     scripts/reproduce_table1.sh --print                       the rows, what they cost, and their commands
#     scripts/reproduce_table1.sh data.root=/data/imagenet      run them on all GPUs of this machine
#     ROWS='deit_tiny_*' scripts/reproduce_table1.sh data.root=/data/imagenet trainer.micro_batch=64
#
# Further arguments are config overrides for every row. A row that was interrupted goes on where it stood, a finished
# one is evaluated again; a row that fails does not stop the others, but makes the exit code 1.
set -uo pipefail
cd "$(dirname "$0")/.."

print_only=false
if [[ "${1:-}" == --print ]]; then print_only=true; shift; fi
if [[ "${1:-}" == -* || ( $# == 0 && $print_only == false ) ]]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

python=${PYTHON:-python}
gpus=${GPUS:-$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 1)}
launch=("$python")
if (( gpus > 1 )); then launch=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$gpus"); fi

failed=0
for file in configs/experiment/table1/${ROWS:-*}.yaml; do
    if [[ ! -e $file ]]; then echo "no such row: ROWS='${ROWS:-}'" >&2; exit 2; fi
    row=$(basename "$file" .yaml)
    command=("${launch[@]}" train_cls.py "experiment=table1/$row" "$@")
    sed -n '2s/^# //p' "$file"
    echo "    ${command[*]}"
    if ! $print_only && ! "${command[@]}"; then
        echo "table1/$row failed" >&2
        failed=1
    fi
done
exit $failed
