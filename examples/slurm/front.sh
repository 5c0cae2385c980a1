# shellcheck shell=bash disable=SC2034
# Sourced by submit.sh and chain.sh, which run where one types sbatch: their common options, and the site's settings.

parse_front() { # ARGUMENTS: sets dry_run, nodes, ranks, sbatch_words and rest (from the first argument on that is no option)
  local gpus=""
  dry_run="" nodes="" sbatch_words=() rest=()
  while (($#)); do
    case $1 in
      --dry-run | --dry_run) dry_run=yes ;;
      --nodes | --gpus)
        (($# > 1)) || refuse "$1 needs a number"
        if [[ $1 == --nodes ]]; then nodes=$2; else gpus=$2; fi
        shift
        ;;
      --nodes=*) nodes=${1#*=} ;;
      --gpus=*) gpus=${1#*=} ;;
      --*=*) sbatch_words+=("$1") ;;
      -*) refuse "$1: options of sbatch are given as --name=value here" ;;
      *) break ;;
    esac
    shift
  done
  rest=("$@")
  [[ -n $nodes ]] || refuse "--nodes N is missing"
  ranks=${gpus:-${LONGVILA_RANKS_PER_NODE:-}}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || refuse "--gpus G, the GPUs of a node, is missing (without GPUs: LONGVILA_RANKS_PER_NODE=G)"
  sbatch_words=(--nodes="$nodes" ${gpus:+--gpus-per-node="$gpus"} "${sbatch_words[@]}")
}

refuse() {
  echo "error: $*" >&2
  exit 1
}

load_front_site() { # the same file that the job reads; it may export SBATCH_ACCOUNT, SBATCH_PARTITION, ... which sbatch reads
  local site=${LONGVILA_SITE:-$root/examples/slurm/site.sh}
  if [[ -e $site ]]; then
    # shellcheck source=/dev/null
    source "$site"
  elif [[ -n ${LONGVILA_SITE:-} ]]; then
    refuse "LONGVILA_SITE=$site does not exist; correct the path, or unset it to use examples/slurm/site.sh"
  fi
  PYTHON=${LONGVILA_PYTHON:-python}
  export LONGVILA_ROOT=$root PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

show_command() { # WORDS: as one can type them
  printf '$'
  printf ' %q' "$@"
  printf '\n'
}
