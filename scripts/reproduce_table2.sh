#!/usr/bin/env bash
# Train the rows of Table 2, one after the other, and draw the 50,000 samples that each figure is made from.
#
#     python scripts/prepare_latents.py data.root=/data/imagenet out=/data/latents      once, on all GPUs by torchrun
#     scripts/reproduce_table2.sh --print                       the rows, what they cost, and their commands
#     scripts/reproduce_table2.sh data.root=/data/latents       run them on all GPUs of this machine
#     ROWS='dit_s_* sit_b_2_vca' SEED=1 OUT=outputs scripts/reproduce_table2.sh data.root=/data/latents
#
# Further arguments are config overrides of the training of every row. What was interrupted goes on where it stood; a row
# that fails does not stop the others, but makes the exit code 1. GPUS=n takes n GPUs. DECODER=FOLDER is the VAE in which
# the samples are decoded, where the hub is out of reach: sd-vae-ft-mse for DiT, sd-vae-ft-ema for SiT.
table=table2 script=train_gen.py
: "${SEED:=0}" "${OUT:=outputs}"
extra=("seed=$SEED" "out_dir=$OUT")
after() {
    local run="$OUT/table2-$1-seed$SEED" protocol=dit_table
    if [[ $1 == sit_* ]]; then protocol=sit_sde250; fi
    step "${launch[@]}" "$root/sample.py" "run=$run" "out=$run/samples" "protocol=$protocol" npz=true ${DECODER:+"decoder=$DECODER"}
}
source "$(dirname "$0")/reproduce_rows.sh"
