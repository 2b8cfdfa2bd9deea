#!/usr/bin/env bash
# Train the ten rows of Table 1, one after the other, and print what each should reach.
#
#     scripts/reproduce_table1.sh --print                       the rows, what they cost, and their commands
#     scripts/reproduce_table1.sh data.root=/data/imagenet      run them on all GPUs of this machine
#     ROWS='deit_* swin_tiny_vca' scripts/reproduce_table1.sh data.root=/data/imagenet trainer.micro_batch=64
#
# Further arguments are config overrides for every row. A row that was interrupted goes on where it stood, a finished
# one is evaluated again; a row that fails does not stop the others, but makes the exit code 1. GPUS=n takes n GPUs.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

print_only=false
if [[ "${1:-}" == --print ]]; then print_only=true; shift; fi
if [[ "${1:-}" == -* || ( $# == 0 && $print_only == false ) ]]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if [[ ! $gpus =~ ^[0-9]+$ ]]; then echo "GPUS must be a number, got '$gpus'" >&2; exit 2; fi
launch=("$python")
if (( gpus > 1 )); then launch=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$gpus"); fi

set -f  # the patterns of ROWS are for find, not for this shell
rows=()
for pattern in ${ROWS:-*}; do
    mapfile -t found < <(find "$root/configs/experiment/table1" -name "$pattern.yaml" | sort)
    if (( ${#found[@]} == 0 )); then echo "ROWS: no row is called '$pattern'" >&2; exit 2; fi
    rows+=("${found[@]}")
done

failed=0
for file in "${rows[@]}"; do
    row=$(basename "$file" .yaml)
    command=("${launch[@]}" "$root/train_cls.py" "experiment=table1/$row" "$@")
    sed -n '2s/^# //p' "$file"
    echo "    ${command[*]}"
    if ! $print_only && ! "${command[@]}"; then
        echo "table1/$row failed" >&2
        failed=1
    fi
done
exit $failed
