#!/usr/bin/env bash
# Training under DeepSpeed's launcher: launch/deepspeed.sh NPROC CONFIG [key=value ...] [--resume]
# Several machines: HOSTFILE=FILE (lines "HOST slots=N"), NPROC on each of them; further options of
# the launcher in DEEPSPEED_OPTIONS.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: [HOSTFILE=FILE] launch/deepspeed.sh NPROC CONFIG [key=value ...] [--resume]" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
nproc=$1
shift
# One thread a process unless told otherwise: ranks on one CPU must not fight for cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
hosts=()
if [ -n "${HOSTFILE:-}" ]; then hosts=(--hostfile "$HOSTFILE"); fi
# shellcheck disable=SC2086
exec "${PYTHON:-python3}" -m deepspeed.launcher.runner "${hosts[@]}" --num_gpus "$nproc" \
  --no_local_rank ${DEEPSPEED_OPTIONS:-} --module train "$@" engine=deepspeed
