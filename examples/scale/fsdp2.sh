#!/bin/sh
# FSDP2: every process holds a part of each weight, its gradient and its moments, and gathers a layer at a time.
# Checkpoints are in shards (fsdp2.yaml), the model at the end is whole.
#
#   sh examples/scale/fsdp2.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of this machine; 8 without it.
# CPU=1: on CPUs in place of GPUs, to try it on a small model (on_cpu.py).
set -eu
here="$(dirname "$0")"
script="$here/../../train.py"
if [ "${CPU:-0}" = 1 ]; then script="$here/on_cpu.py"; fi
exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$here/fsdp2.yaml" \
    --num_processes "${PROCESSES:-8}" "$script" "$@"
