#!/bin/sh
# Context parallel: as fsdp2.sh, and neighbouring processes share each row of tokens, for rows that one cannot hold.
#
#   sh examples/scale/context.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of this machine; 8 without it.
# CP: how many share a row; 2 without it.
# CPU=1: on CPUs in place of GPUs, to try it on a small model (on_cpu.py).
set -eu
here="$(dirname "$0")"
script="$here/../../train.py"
cp="${CP:-2}" processes="${PROCESSES:-8}"
if [ "${CPU:-0}" = 1 ]; then script="$here/on_cpu.py"; fi
exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$here/fsdp2.yaml" --num_processes "$processes" \
    "$script" --parallelism_config "{\"cp_size\": $cp, \"dp_shard_size\": $((processes / cp))}" "$@"
