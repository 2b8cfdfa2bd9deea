#!/usr/bin/env bash
# Train the ten rows of Table 1, one after the other, and print the expected accuracy of each.
#
#     scripts/reproduce_table1.sh --print                       print the rows, their costs and commands
#     scripts/reproduce_table1.sh data.root=/data/imagenet      run them on all GPUs of this machine
#     ROWS='deit_* swin_tiny_vca' scripts/reproduce_table1.sh data.root=/data/imagenet trainer.micro_batch_size=64
#
# Other arguments are config overrides of every row. An interrupted row is resumed, a finished one is evaluated again. A
# row that fails does not stop the others; the exit code is then 1. GPUS=n uses n GPUs.
table=table1 script=train_cls.py extra=() all='*'
after() { :; }
source "$(dirname "$0")/reproduce_rows.sh"
