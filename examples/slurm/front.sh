# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by submit.sh and chain.sh, which run where one types sbatch: their common options, and the site's settings.

# shellcheck source=examples/slurm/job.sh
source "$root/examples/slurm/job.sh"

fail() {
  echo "error: $*" >&2
  exit 1
}

LEAD_S=600 # train.sbatch: --signal=B:USR1@600

parse_front() { # ARGUMENTS: sets dry_run, nodes, ranks, sbatch_words and rest (from the first argument on that is no option)
  local gpus=""
  dry_run="" nodes="" sbatch_words=() rest=()
  while (($#)); do
    case $1 in
      --dry-run | --dry_run) dry_run=yes ;;
      --nodes | --gpus)
        (($# > 1)) || fail "$1 needs a number"
        if [[ $1 == --nodes ]]; then nodes=$2; else gpus=$2; fi
        shift
        ;;
      --nodes=*) nodes=${1#*=} ;;
      --gpus=*) gpus=${1#*=} ;;
      --*=* | --exclusive | --contiguous | --hold | --no-requeue | --overcommit | --oversubscribe | --reboot | --spread-job | --use-min-nodes)
        sbatch_words+=("$1")
        ;;
      -*) fail "$1: options of sbatch are given as --name=value here" ;;
      *) break ;;
    esac
    shift
  done
  rest=("$@")
  [[ -n $nodes ]] || fail "--nodes N is missing"
  ranks=${gpus##*:} # --gpus h100:8
  ranks=${ranks:-${LONGVILA_RANKS_PER_NODE:-}}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "--gpus G or TYPE:G, the GPUs of a node, is missing (without GPUs: LONGVILA_RANKS_PER_NODE=G)"
  check_time_limit
  # By itself sbatch gives the task of a node one CPU and, on many sites, the memory that comes with one CPU.
  has_option --cpus-per-task --cpus-per-gpu || sbatch_words=(--cpus-per-task="$((ranks * ${LONGVILA_CPUS_PER_RANK:-8}))" "${sbatch_words[@]}")
  has_option --mem --mem-per-cpu --mem-per-gpu || [[ -n ${SBATCH_MEM_PER_NODE:-}${SBATCH_MEM_PER_CPU:-}${SBATCH_MEM_PER_GPU:-} ]] ||
    sbatch_words=(--mem=0 "${sbatch_words[@]}")
  sbatch_words=(--nodes="$nodes" ${gpus:+--gpus-per-node="$gpus"} "${sbatch_words[@]}")
}

has_option() { # NAMES: whether one of them is among the options of sbatch
  local name word
  for name; do
    for word in "${sbatch_words[@]}"; do [[ $word != "$name="* ]] || return 0; done
  done
  return 1
}

check_time_limit() { # a job that is asked to stop as soon as it starts would train one step per start, for ever
  local limit=${SBATCH_TIMELIMIT:-} word seconds
  for word in "${sbatch_words[@]}"; do [[ $word != --time=* ]] || limit=${word#*=}; done
  has_option --signal || [[ -n ${SBATCH_SIGNAL:-} ]] && return 0
  seconds=$(seconds_of "$limit")
  [[ -z $seconds || $seconds == 0 ]] || ((seconds > LEAD_S + 120)) ||
    fail "a time limit of $limit ($seconds s) leaves no time to train: the ranks are asked to save $LEAD_S s before it; use --time of more" \
      "than $(((LEAD_S + 120) / 60)) minutes, or a shorter --signal=B:USR1@SECONDS (a save, one step and a minute)"
}

seconds_of() { # LIMIT as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. 0 is no limit. Nothing for UNLIMITED, none, and what is not of these
  local days=0 clock=$1 parts
  [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 0
  if [[ $1 == *-* ]]; then
    days=${1%%-*} clock=${1#*-}
    IFS=: read -ra parts <<<"$clock:0:0"
  else
    IFS=: read -ra parts <<<"$clock"
    case ${#parts[@]} in
      1) parts=(0 "${parts[0]}" 0) ;;
      2) parts=(0 "${parts[@]}") ;;
    esac
  fi
  echo $((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}

load_front() { # sets python, the words that start it here. The site's file may export SBATCH_ACCOUNT, ... which sbatch reads
  local step_options=() inside
  read_site
  if [[ -n ${LONGVILA_SUBMIT_PYTHON:-} ]]; then
    python=("$LONGVILA_SUBMIT_PYTHON")
    return
  fi
  find_container
  ((!${#step_options[@]})) || fail "LONGVILA_PYTHON is inside of a container that only a job can enter; set LONGVILA_SUBMIT_PYTHON to a Python with" \
    "this package's requirements on this machine (torch and GPUs are not needed)"
  python=("${inside[@]}" "$PYTHON")
}

show_command() { # WORDS: as one can type them
  printf '$'
  printf ' %q' "$@"
  printf '\n'
}
