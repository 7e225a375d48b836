#!/bin/sh
# DDP: every process holds the whole model, and reads pairs of its own.
#
#   sh examples/scale/ddp.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of this machine; 8 without it.
# CPU=1: on CPUs in place of GPUs, to try it on a small model.
set -eu
here="$(dirname "$0")"
script="$here/../../train.py"
if [ "${CPU:-0}" = 1 ]; then set -- "$@" --use_cpu true; fi
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "${PROCESSES:-8}" "$script" "$@"
