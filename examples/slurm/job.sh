# shellcheck shell=bash disable=SC2034
# Sourced by the *.sbatch files and agent.sh, inside a job, and by front.sh: the site's settings, where Python runs, and how to hear signals.
#
# Settings, from the environment or from site.sh beside this file (LONGVILA_SITE names another); README.md explains each:
#   LONGVILA_PYTHON LONGVILA_SUBMIT_PYTHON LONGVILA_RANKS_PER_NODE LONGVILA_CPUS_PER_RANK LONGVILA_CONTAINER LONGVILA_CONTAINER_RUNTIME
#   LONGVILA_CONTAINER_MOUNTS LONGVILA_SRUN LONGVILA_MAX_RESTARTS LONGVILA_NODE_WAIT_S

say() { printf '[%(%F %T)T job %s start %s] %s\n' -1 "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"; }

fail() {
  say "error: $*" >&2
  exit 1
}

read_site() { # sets PYTHON and exports where the package is
  local site=${LONGVILA_SITE:-$root/examples/slurm/site.sh} options=$-
  if [[ -e $site ]]; then
    set +eu # `module load` and conda's activation use unset names
    # shellcheck source=/dev/null
    source "$site"
    [[ $options != *e* ]] || set -e
    [[ $options != *u* ]] || set -u
  elif [[ -n ${LONGVILA_SITE:-} ]]; then
    fail "LONGVILA_SITE=$site does not exist; correct the path, or unset it to use examples/slurm/site.sh"
  fi
  PYTHON=${LONGVILA_PYTHON:-python}
  export PYTHON PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} LONGVILA_ROOT=$root
}

find_container() { # sets inside, what stands in front of a command to reach Python, and adds to step_options what srun needs for it
  inside=()
  [[ -n ${LONGVILA_CONTAINER:-} ]] || return 0
  local mounts=${LONGVILA_CONTAINER_MOUNTS:-$root:$root,$PWD:$PWD}
  case ${LONGVILA_CONTAINER_RUNTIME:-apptainer} in
    apptainer | singularity) inside=("${LONGVILA_CONTAINER_RUNTIME:-apptainer}" exec --nv --pwd "$PWD" --bind "$mounts" "$LONGVILA_CONTAINER") ;;
    enroot) step_options+=(--container-image="$LONGVILA_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    *) fail "LONGVILA_CONTAINER_RUNTIME=$LONGVILA_CONTAINER_RUNTIME must be apptainer, singularity or enroot (Slurm's pyxis plugin)" ;;
  esac
}

load_site() { # in a job: sets PYTHON, inside and step_options, exports what the agents read
  read_site
  read -ra step_options <<<"${LONGVILA_SRUN:-}"
  [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && step_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it since Slurm 22.05
  find_container
}

on_one_node() { # COMMAND...: on the first node, in the container if there is one
  if [[ ${LONGVILA_CONTAINER_RUNTIME:-} == enroot && -n ${LONGVILA_CONTAINER:-} ]]; then
    srun --overlap --nodes=1 --ntasks=1 "${step_options[@]}" "$@"
  else
    "${inside[@]}" "$@"
  fi
}

find_ranks() { # sets RANKS, the processes of one node: its GPUs, as in front.sh
  RANKS=${SLURM_GPUS_ON_NODE:-${LONGVILA_RANKS_PER_NODE:-}}
  [[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "the job has no GPUs (sbatch --gpus-per-node=N) and LONGVILA_RANKS_PER_NODE='$RANKS' is no number of ranks"
  export RANKS
  ((${SLURM_CPUS_ON_NODE:-$RANKS} >= RANKS)) ||
    say "warning: $SLURM_CPUS_ON_NODE CPUs for the $RANKS ranks of a node, which decode video; submit.sh asks for more, or" \
      "sbatch --cpus-per-task=$((RANKS * ${LONGVILA_CPUS_PER_RANK:-8}))"
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

job_field() { # NAME [SECONDS]: of scontrol's description of this job; nothing if Slurm does not answer for so long (a minute)
  local facts value until=$((SECONDS + ${2:-60}))
  until facts=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null); do
    ((SECONDS < until)) || return 0
    sleep 5
  done
  value=$(sed -nE "s/^(.*[[:space:]])?$1=//p" <<<"$facts" | head -n1)
  [[ $1 == StdOut ]] || value=${value%%[[:space:]]*} # a path, alone in its line, may hold spaces
  echo "$value"
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

run_to_end() { # ASK COMMAND...: a command in the background; ASK is called once this shell has got a signal. Sets child, its pid, and status
  local ask=$1 before ask_at=0
  "${@:2}" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    if [[ -n $stop ]] && ((SECONDS >= ask_at)); then
      "$ask" # again and again: a rank that is still starting has nobody to hear it
      ask_at=$((SECONDS + 5))
    fi
    sleep 1 &
    wait $! || true
  done
  while :; do # a signal interrupts `wait`, which then says nothing about the command
    before=$signals
    wait "$child"
    status=$?
    ((signals == before)) && break
  done
}

asked_s="" # when the ranks were asked to stop, in seconds since this shell began
ask_step() { # the ranks through their agents; without --batch this shell gets none of it
  [[ -n $asked_s ]] || say "got $stop: asking all ranks to stop after their step and save"
  # Fails without a step. While Slurm ends the job itself, and tells the agents, scancel would try for a minute and a half: into the next start.
  timeout 4 scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null || true
  [[ -z $asked_s ]] || return 0
  asked_s=$SECONDS
  # Said at once: after a lost node this shell is killed before srun has ended.
  came_back && say "Slurm has queued the job again: it waits until enough nodes are healthy (squeue says why)"
}

run_step() { # COMMAND...: an srun to its end; a signal that this shell got goes to the ranks. Sets status
  run_to_end ask_step "$@"
}
