#!/bin/sh
# DeepSpeed ZeRO: STAGE=2 shares out gradients and moments, STAGE=3 the weights too. Wants pip install deepspeed.
#
#   sh examples/scale/zero.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of this machine; 8 without it.
# STAGE: 2 or 3; 3 without it (zero3.yaml).
# CPU=1: on CPUs in place of GPUs, to try it on a small model (on_cpu.py).
set -eu
here="$(dirname "$0")"
script="$here/../../train.py"
if [ "${CPU:-0}" = 1 ]; then script="$here/on_cpu.py"; fi
exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$here/zero${STAGE:-3}.yaml" \
    --num_processes "${PROCESSES:-8}" "$script" "$@"
