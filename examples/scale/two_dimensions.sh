#!/bin/sh
# Two dimensions: neighbours share each layer (tensor parallel), and FSDP2 shards over the groups of them.
#
#   sh examples/scale/two_dimensions.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of this machine; 8 without it.
# TP: how many share a layer; 2 without it.
# CPU=1: on CPUs in place of GPUs, to try it on a small model (on_cpu.py).
set -eu
here="$(dirname "$0")"
script="$here/../../train.py"
if [ "${CPU:-0}" = 1 ]; then script="$here/on_cpu.py"; fi
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "${PROCESSES:-8}" \
    "$script" --tp_size "${TP:-2}" "$@"
