# shellcheck shell=bash disable=SC2034
# Sourced by the *.sbatch files, inside a job: the site's settings, where Python runs, and a step that hears signals.
#
# Settings, from the environment or from site.sh beside this file (LONGVILA_SITE names another); README.md explains each:
#   LONGVILA_PYTHON LONGVILA_RANKS_PER_NODE LONGVILA_CONTAINER LONGVILA_CONTAINER_RUNTIME LONGVILA_CONTAINER_MOUNTS LONGVILA_SRUN
#   LONGVILA_MAX_RESTARTS LONGVILA_NODE_WAIT_S

say() { printf '[%(%F %T)T job %s start %s] %s\n' -1 "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"; }

fail() {
  say "error: $*" >&2
  exit 1
}

load_site() { # sets PYTHON, inside and step_options, exports what the agents read
  local site=${LONGVILA_SITE:-$root/examples/slurm/site.sh}
  if [[ -e $site ]]; then
    # shellcheck source=/dev/null
    source "$site"
  elif [[ -n ${LONGVILA_SITE:-} ]]; then
    fail "LONGVILA_SITE=$site does not exist; correct the path, or unset it to use examples/slurm/site.sh"
  fi
  PYTHON=${LONGVILA_PYTHON:-python}
  export PYTHON PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} LONGVILA_ROOT=$root
  inside=()       # in front of a command: where Python lives
  step_options=() # of srun
  read -ra step_options <<<"${LONGVILA_SRUN:-}"
  [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && step_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it since Slurm 22.05
  [[ -n ${LONGVILA_CONTAINER:-} ]] || return 0
  local mounts=${LONGVILA_CONTAINER_MOUNTS:-$root:$root,$PWD:$PWD}
  case ${LONGVILA_CONTAINER_RUNTIME:-apptainer} in
    apptainer | singularity) inside=("${LONGVILA_CONTAINER_RUNTIME:-apptainer}" exec --nv --pwd "$PWD" --bind "$mounts" "$LONGVILA_CONTAINER") ;;
    enroot) step_options+=(--container-image="$LONGVILA_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    *) fail "LONGVILA_CONTAINER_RUNTIME=$LONGVILA_CONTAINER_RUNTIME must be apptainer, singularity or enroot (Slurm's pyxis plugin)" ;;
  esac
}

on_one_node() { # COMMAND...: on the first node, in the container if there is one
  if [[ ${LONGVILA_CONTAINER_RUNTIME:-} == enroot && -n ${LONGVILA_CONTAINER:-} ]]; then
    srun --overlap --nodes=1 --ntasks=1 "${step_options[@]}" "$@"
  else
    "${inside[@]}" "$@"
  fi
}

find_ranks() { # sets RANKS, the processes of one node
  RANKS=${LONGVILA_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  [[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "the job has no GPUs (sbatch --gpus-per-node=N) and LONGVILA_RANKS_PER_NODE='$RANKS' is no number of ranks"
  export RANKS
}

find_master() { # TRY: sets MASTER_ADDR and MASTER_PORT
  local name
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
  MASTER_ADDR=$name
  if ! getent hosts "$name" >/dev/null; then # a node whose name only Slurm knows
    MASTER_ADDR=$(scontrol show node -o "$name" | grep -oP '\bNodeAddr=\K\S+')
  fi
  # Below the ports that the kernel hands out (32768 on); ten in a row for each job, so that a try never meets what is left of the one before.
  MASTER_PORT=$((12000 + (SLURM_JOB_ID * 10 + $1 % 10) % 20000))
  while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done # somebody else listens there
  export MASTER_ADDR MASTER_PORT
}

job_field() { # NAME: of scontrol's description of this job; nothing if Slurm does not answer for a minute
  local facts _
  for _ in 1 2 3 4 5 6; do
    if facts=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null); then
      grep -oP "\b$1=\K\S+" <<<"$facts" | head -n1
      return
    fi
    sleep 10
  done
}

came_back() { # whether Slurm has queued this job again; while it clears the nodes it calls every job COMPLETING
  local restarts
  restarts=$(job_field Restarts)
  ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0}))
}

# A signal to this shell is only noted: a command inside a trap would run in the middle of another one.
signals=0
stop=""
listen() {
  trap 'stop=USR1; signals=$((signals + 1))' USR1
  trap 'stop=TERM; signals=$((signals + 1))' TERM
}

run_step() { # COMMAND...: an srun to its end; a signal that this shell got goes to the ranks. Sets status
  local step before tell_at=0
  "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    if [[ -n $stop ]] && ((SECONDS >= tell_at)); then
      # Again and again: a rank that is still starting has nobody to hear it. Without --batch this shell gets none of them.
      if ((!tell_at)); then
        say "got $stop: asking all ranks to stop after their step and save"
        # Said at once: after a lost node this shell is killed before srun has ended.
        came_back && say "Slurm has queued the job again: it waits until enough nodes are healthy (squeue says why)"
      fi
      scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null || true # no step yet, or none any more
      tell_at=$((SECONDS + 5))
    fi
    sleep 1 &
    wait $! || true
  done
  while :; do # a signal interrupts `wait`, which then says nothing about the step
    before=$signals
    wait "$step"
    status=$?
    ((signals == before)) && break
  done
}
