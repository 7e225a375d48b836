#!/bin/sh
# Tensor parallel: all processes share each layer, the output head by its vocabulary, and read the same pairs.
#
#   sh examples/scale/tensor.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of this machine; 8 without it.
# CPU=1: on CPUs in place of GPUs, to try it on a small model (on_cpu.py).
set -eu
here="$(dirname "$0")"
script="$here/../../train.py"
processes="${PROCESSES:-8}"
if [ "${CPU:-0}" = 1 ]; then script="$here/on_cpu.py"; fi
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
    "$script" --tp_size "$processes" "$@"
