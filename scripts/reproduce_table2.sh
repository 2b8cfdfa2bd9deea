#!/usr/bin/env bash
# Train the rows of Table 2, one after the other, and generate 50,000 samples for each.
#
#     python scripts/prepare_latents.py data.root=/data/imagenet out=/data/latents      once; on several GPUs by torchrun
#     scripts/reproduce_table2.sh --print data.root=/data/latents     print the rows, their costs and commands
#     scripts/reproduce_table2.sh data.root=/data/latents       run them on all GPUs of this machine
#     ROWS='dit_s_* sit_b_2_vca' SEED=1 OUT=outputs scripts/reproduce_table2.sh data.root=/data/latents
#
# Other arguments are config overrides of every run. Interrupted runs and sample folders are resumed. A row that fails
# does not stop the others; the exit code is then 1. GPUS=n uses n GPUs. Without access to the hub, set VAES=FOLDER, which
# contains sd-vae-ft-ema/ and sd-vae-ft-mse/, the decoders of SiT and DiT. REFERENCE=FILE.npz, such as ADM's
# VIRTUAL_imagenet256_labeled.npz, also evaluates the samples; then run `scripts/table.py OUT`. The rows at 512 px need
# their own cache and reference: ROWS='dit_s_2_512_*' scripts/reproduce_table2.sh data.root=/data/latents-512
table=table2 script=train_gen.py all='?it_?_?_softmax ?it_?_?_vca'
for argument in "$@"; do
    if [[ $argument == seed=* || $argument == out_dir=* ]]; then
        echo "$argument: set SEED=... and OUT=... before the command instead" >&2; exit 2
    fi
done
: "${SEED:=0}" "${OUT:=outputs}"
if [[ -n ${REFERENCE:-} && ! -f $REFERENCE ]]; then echo "REFERENCE: not a file: $REFERENCE" >&2; exit 2; fi
extra=("seed=$SEED" "out_dir=$OUT")
if [[ -n ${VAES:-} ]]; then
    for vae in sd-vae-ft-ema sd-vae-ft-mse; do
        if [[ ! -f $VAES/$vae/config.json ]]; then echo "VAES: no config.json in $VAES/$vae" >&2; exit 2; fi
    done
    extra+=("autoencoder.source=$VAES/sd-vae-ft-ema")
fi
after() {
    local run="$OUT/table2-$1-seed$SEED" protocol=dit_table vae=sd-vae-ft-mse
    if [[ $1 == sit_* ]]; then protocol=sit_sde250 vae=sd-vae-ft-ema; fi
    step "${launch[@]}" "$root/sample.py" "run=$run" "out=$run/$protocol" "protocol=$protocol" npz=true ${VAES:+"decoder=$VAES/$vae"} &&
        if [[ -n ${REFERENCE:-} ]]; then
            step "${launch[@]}" "$root/eval_fid.py" "samples=$run/$protocol" "reference=$REFERENCE"
        fi
}
source "$(dirname "$0")/reproduce_rows.sh"
