# Sourced by reproduce_table1.sh and reproduce_table2.sh, which set `table`, `script`, `all` (patterns of the rows),
# `extra` (overrides of every row) and `after ROW` (commands after the run of a row).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

print_only=false
if [[ "${1:-}" == --print ]]; then print_only=true; shift; fi
if [[ "${1:-}" == -* || ( $# == 0 && $print_only == false ) ]]; then sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

python=${PYTHON:-python}
if $print_only; then
    : "${GPUS:=8}"
    if [[ " $*" != *" data.root="* ]]; then set -- "$@" data.root=DATA; fi
    echo "GPU-hours are estimates: 6 x multiply-adds x images at 40 TFLOP/s"
fi
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if [[ ! $gpus =~ ^[0-9]+$ ]]; then echo "GPUS must be a number, got '$gpus'" >&2; exit 2; fi
launch=("$python")
if (( gpus > 1 )); then launch=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$gpus"); fi
if $print_only && (( gpus > 1 )); then launch=(torchrun --standalone "--nproc_per_node=$gpus"); fi

set -f  # find, not this shell, expands the patterns of ROWS
rows=()
for pattern in ${ROWS:-$all}; do
    mapfile -t files < <(find "$root/configs/experiment/$table" -name "$pattern.yaml" | sort)
    if (( ${#files[@]} == 0 )); then echo "ROWS: no row matches '$pattern'" >&2; exit 2; fi
    rows+=("${files[@]}")
done

# Print a command; unless --print was given, run it.
step() {
    echo "    $*"
    $print_only || "$@"
}

failed=0
for file in "${rows[@]}"; do
    row=$(basename "$file" .yaml)
    sed -n '2s/^# //p' "$file"
    if ! { step "${launch[@]}" "$root/$script" "experiment=$table/$row" "$@" "${extra[@]}" && after "$row"; }; then
        echo "$table/$row failed" >&2
        failed=1
    fi
done
exit $failed
