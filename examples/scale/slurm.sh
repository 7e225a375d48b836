#!/bin/bash
#SBATCH --job-name=dpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
# Slurm: one launcher a node. Two minutes before its time is over the job is told, and saves the step that is running;
# submit it again as it was, and it goes on from there.
#
#   sbatch examples/scale/slurm.sh --data_path PAIRS --ref_weight MODEL --output_dir OUT
#
# PROCESSES: one for each GPU of a node; 8 without it. OUT is on a file system that all nodes see.
# TP: how many processes share each layer; 1 without it, which is DDP.
# CPU=1 and SRUN= (empty): one node's part with bash, on CPUs, to try it.
set -eu
here="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/../.." && pwd)}/examples/scale"
script="$here/../../train.py"
nodes="${SLURM_NNODES:-1}"
first="localhost"
if [ "$nodes" -gt 1 ]; then first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"; fi
if [ "${TP:-1}" -gt 1 ]; then set -- "$@" --tp_size "$TP"; fi
if [ "${CPU:-0}" = 1 ] && [ "${TP:-1}" -gt 1 ]; then script="$here/on_cpu.py"
elif [ "${CPU:-0}" = 1 ]; then set -- "$@" --use_cpu true; fi
# shellcheck disable=SC2086  # SRUN may be empty
exec ${SRUN-srun --kill-on-bad-exit=1} "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" \
    --nproc_per_node "${PROCESSES:-8}" --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29400}" \
    --rdzv_id "${SLURM_JOB_ID:-0}" "$script" --resume_from_checkpoint latest "$@"
