#!/usr/bin/env bash
# Train the ten rows of Table 1, one after the other, and print what each should reach.
#
#     scripts/reproduce_table1.sh --print                       the rows, what they cost, and their commands
#     scripts/reproduce_table1.sh data.root=/data/imagenet      run them on all GPUs of this machine
#     ROWS='deit_* swin_tiny_vca' scripts/reproduce_table1.sh data.root=/data/imagenet trainer.micro_batch_size=64
#
# Further arguments are config overrides for every row. A row that was interrupted goes on where it stood, a finished
# one is evaluated again; a row that fails does not stop the others, but makes the exit code 1. GPUS=n takes n GPUs.
table=table1 script=train_cls.py extra=() all='*'
after() { :; }
source "$(dirname "$0")/reproduce_rows.sh"
