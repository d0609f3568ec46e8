#!/usr/bin/env bash
# Training on 1 to N nodes under torchrun's agent; the same command on every node. docs/launch.md.
usage='usage: launch/torchrun.sh NPROC CONFIG [key=value ...] [--resume | --resume-or-start | --resume-from NAME]
NPROC ranks on each node. From the environment:
  NNODES=1            nodes, or MIN:MAX for an elastic job
  NODE_RANK           0 on the node that hosts the rendezvous, 1, 2, ... on the others
  MASTER_ADDR, MASTER_PORT=29400, or RDZV_ENDPOINT=host:port    where node 0 is
  NODE_ADDR           this node'"'"'s address, where its host name does not resolve on the others
  MAX_RESTARTS=0      how often ranks that failed are started again (needs --resume-or-start)
  RDZV_TIMEOUT=600    seconds to wait for the other nodes
  RDZV_ID=hope        a name for the job, where several share an endpoint
  PREFLIGHT=1         0: start without the checks;  PREFLIGHT_ARGS: e.g. "--max-clock-skew 5"'
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "$usage" >&2
  exit 2
fi
# The code is found from any folder, and in no other one; paths are of where the command was given.
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
nproc=$1
shift
must_be() { # NAME VALUE PATTERN WORDS
  if [[ ! $2 =~ ^$3$ ]]; then
    echo "error: $1=$2 must be $4" >&2
    exit 2
  fi
}
count='[1-9][0-9]*'
must_be NPROC "$nproc" "($count|auto|cpu|gpu|xpu)" 'how many ranks there are on each node, 1 or more'
must_be NNODES "${NNODES:-1}" "$count(:$count)?" 'a number of nodes, or MIN:MAX'
must_be NODE_RANK "${NODE_RANK:-0}" '[0-9]+' 'the number of this node, from 0'
must_be MASTER_PORT "${MASTER_PORT:-29400}" '[0-9]{1,5}' 'a port'
must_be MAX_RESTARTS "${MAX_RESTARTS:-0}" '[0-9]+' 'a number of restarts, 0 or more'
must_be RDZV_TIMEOUT "${RDZV_TIMEOUT:-600}" "$count" 'whole seconds'
if [ "${MAX_RESTARTS:-0}" != 0 ] && [[ " $* " != *" --resume-or-start "* ]]; then
  echo "error: MAX_RESTARTS=$MAX_RESTARTS needs --resume-or-start: a restart goes on from a checkpoint" >&2
  exit 2
fi
# One thread a process unless told otherwise: ranks on one CPU must not fight for cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# How long ranks may take over a last checkpoint after SIGTERM; torchrun's own 30 s are too few.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

options=(--nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}")
if [ "${NNODES:-1}" = 1 ]; then
  options+=(--standalone)
else
  endpoint=${RDZV_ENDPOINT:-${MASTER_ADDR:+$MASTER_ADDR:${MASTER_PORT:-29400}}}
  if [ -z "$endpoint" ]; then
    echo "error: NNODES=$NNODES needs MASTER_ADDR (or RDZV_ENDPOINT), the address of node 0" >&2
    exit 2
  fi
  conf="join_timeout=${RDZV_TIMEOUT:-600},read_timeout=${RDZV_TIMEOUT:-600}"
  if [ -n "${NODE_RANK:-}" ]; then
    conf+=",is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)"
    options+=(--this-node "$NODE_RANK")
  fi
  options+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$endpoint"
    --rdzv-id "${RDZV_ID:-hope}" --rdzv-conf "$conf")
  if [ -n "${NODE_ADDR:-}" ]; then
    options+=(--local-addr "$NODE_ADDR")
  fi
fi
if [ "${PREFLIGHT:-1}" = 0 ]; then
  options+=(--no-preflight)
elif [ -n "${PREFLIGHT_ARGS:-}" ]; then
  options+=("--preflight-args=$PREFLIGHT_ARGS")
fi
exec "${PYTHON:-python3}" -m launch.agent "${options[@]}" -m train "$@"
