#!/usr/bin/env bash
# Data-parallel training on one machine: launch/torchrun.sh NPROC CONFIG [key=value ...] [--resume]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/torchrun.sh NPROC CONFIG [key=value ...] [--resume]" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
nproc=$1
shift
# One thread a process unless told otherwise: ranks on one CPU must not fight for cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node "$nproc" -m train "$@"
