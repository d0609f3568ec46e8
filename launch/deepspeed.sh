#!/usr/bin/env bash
# Training on 1 to N nodes under DeepSpeed's launcher, which reaches the nodes by ssh. docs/launch.md.
usage='usage: launch/deepspeed.sh NPROC|HOSTFILE CONFIG [key=value ...] [--resume | --resume-or-start | --resume-from NAME]
NPROC: that many ranks on this machine. HOSTFILE: lines "host slots=N", run on one of the hosts or
beside them; pdsh and passwordless ssh to every host are needed. From the environment:
  MASTER_ADDR         address of the first host (default: what its "hostname -I" says)
  MASTER_PORT=29500
  SSH_PORT            of the hosts, where it is not 22 (PDSH_SSH_ARGS_APPEND: further ssh options)
  DEEPSPEED_ARGS      more for the launcher, e.g. "--include worker-0@worker-1"
  PREFLIGHT=1         0: start without the checks;  PREFLIGHT_ARGS: e.g. "--max-clock-skew 5"'
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "$usage" >&2
  exit 2
fi
where=$1
shift
if [[ $where =~ ^0+$ ]]; then # to DeepSpeed's launcher 0 means all that there are
  echo "error: NPROC=$where must be how many ranks there are on this machine, 1 or more" >&2
  exit 2
fi
if [[ ! $where =~ ^[0-9]+$ ]]; then
  if [ ! -r "$where" ] || [ -d "$where" ]; then
    echo "error: no hostfile $where; give one, or a number of ranks for this machine" >&2
    exit 2
  fi
  # What DeepSpeed's launcher would end on in a traceback, or start no rank for.
  wrong=$(awk '/^[[:space:]]*(#|$)/ {next} {hosts++}
    !/^[[:space:]]*[^[:space:]]+[[:space:]]+slots=0*[1-9]/ {print "line " NR " is not \"host slots=N\""; exit}
    seen[$1]++ {print "line " NR " has " $1 " again"; exit}
    END {if (!hosts) print "there is no host in it"}' "$where")
  if [ -n "$wrong" ]; then
    echo "error: hostfile $where: $wrong" >&2
    exit 2
  fi
  if ! command -v pdsh >/dev/null; then
    echo "error: DeepSpeed's launcher needs pdsh to reach the hosts of $where; install it here" >&2
    exit 2
  fi
  where=$(realpath "$where")
fi
# The code is found from any folder, and in no other one; paths are of where the command was given.
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
options=(--master_port "${MASTER_PORT:-29500}" --no_local_rank --log_level error)
checks=()
if [[ $where =~ ^[0-9]+$ ]]; then
  options+=(--hostfile /dev/null/none --num_gpus "$where")
else
  options+=(--hostfile "$where" --no_ssh_check --force_multi)
  options+=(${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${SSH_PORT:+--ssh_port "$SSH_PORT"})
  if [ -z "${DEEPSPEED_ARGS:-}" ]; then # with a filter the hosts in use are not the file's
    checks=(--hosts "$(awk '/^[^#[:space:]]+[[:space:]]+slots=/ {print $1}' "$where" | paste -sd,)")
  fi
fi
read -ra more <<<"${DEEPSPEED_ARGS:-}"
read -ra more_checks <<<"${PREFLIGHT_ARGS:-}"

# What ssh does not carry to the hosts, the launcher does from this file.
carried=$(mktemp)
trap 'rm -f "$carried"' EXIT
env | grep -E '^(OMP_NUM_THREADS|MKL_NUM_THREADS|(NCCL|GLOO|TORCH|CUDA|DS|UCX)_[A-Z0-9_]+)=' >"$carried"
export DS_ENV_FILE=$carried

child=''
forward() { # with ssh the launcher itself stops the ranks; on one machine its child does
  if [[ $where =~ ^[0-9]+$ ]]; then
    pkill -TERM -P "$child" || true
  else
    kill -TERM "$child" || true
  fi
}
trap forward INT TERM
launcher() {
  "$python" -m deepspeed.launcher.runner "${options[@]}" "${more[@]}" --module "$@" &
  child=$!
  local status=0
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the ranks
    status=0
    wait "$child" || status=$?
  done
  return "$status"
}
if [ "${PREFLIGHT:-1}" != 0 ]; then
  launcher launch.preflight "$@" "${checks[@]}" "${more_checks[@]}"
fi
launcher train "$@"
