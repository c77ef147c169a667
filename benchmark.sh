#!/usr/bin/env bash
# Runs a script on environments x seeds, on this machine or on a Slurm cluster; started again it goes on.
set -euo pipefail

usage() {
  cat <<'END'
./benchmark.sh SCRIPT --env-ids ENV... --seeds SEED... [OPTIONS] [-- FLAGS OF THE SCRIPT]
./benchmark.sh --summary RUNS_DIR

    ./benchmark.sh dqn_atari.py --env-ids ALE/Pong-v5 ALE/Breakout-v5 --seeds 1 2 3 -- --total-timesteps 1000000

Every environment and seed is a run of its own, RUNS_DIR/ENV__SCRIPT__SEED. Start the same command again after a crash,
a reboot or Ctrl-C: it goes on with what is unfinished and leaves the rest alone. Other flags of the script make other
runs: give them a --runs-dir of their own.

  --runs-dir DIR        folder of the runs (default: runs)
  --workers N           runs at a time (default: one for each GPU, or else for each core)
  --dry-run             print the command of every run, nothing else
  --summary DIR         tables and learning curves of the runs in DIR, into DIR/summary

  --slurm               hand the runs to Slurm as one job array instead, requeued when a node fails or preempts
  --partition NAME      Slurm's partition
  --gpus-per-task N     GPUs of a run
  --cpus-per-task N     cores of a run (default: 1)
  --time HH:MM:SS       time limit of a run

PYTHON=... in front names the interpreter (default: python), OMP_NUM_THREADS=... the threads of a run (default: the
runs at a time share the cores).
END
}

fail() {
  echo "benchmark.sh: error: $1" >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
script="" runs_dir=runs workers="" dry_run="" slurm="" only_slurm=""
partition="" gpus_per_task="" cpus_per_task=1 time_limit=""
env_ids=() seeds=() flags=()

if [[ $# -eq 0 || $1 == --help || $1 == -h ]]; then
  usage
  exit 0
fi
if [[ $1 == --summary ]]; then
  [[ $# -le 2 && -d ${2-} ]] || fail "--summary ${*:2}: no such folder"
  command -v "$python" >/dev/null || fail "$python: no such program; name the interpreter with PYTHON=... in front"
  exec "$python" "$here/results/summary.py" "$2"
fi

[[ $1 == -* ]] || { script=$1 && shift; }
while [[ $# -gt 0 ]]; do
  option=$1 && shift
  case $option in
  --env-ids) while [[ $# -gt 0 && $1 != --* ]]; do env_ids+=("$1") && shift; done ;;
  --seeds) while [[ $# -gt 0 && $1 != --* ]]; do seeds+=("$1") && shift; done ;;
  --dry-run) dry_run=1 ;;
  --slurm) slurm=1 ;;
  --)
    flags=("$@")
    break
    ;;
  --runs-dir | --workers | --partition | --gpus-per-task | --cpus-per-task | --time)
    [[ $# -gt 0 && -n $1 && $1 != -* ]] || fail "$option: give a value"
    case $option in
    --runs-dir) runs_dir=$1 ;;
    --workers) workers=$1 ;;
    --partition) partition=$1 only_slurm=$option ;;
    --gpus-per-task) gpus_per_task=$1 only_slurm=$option ;;
    --cpus-per-task) cpus_per_task=$1 only_slurm=$option ;;
    --time) time_limit=$1 only_slurm=$option ;;
    esac
    shift
    ;;
  *) fail "$option: no such option; ./benchmark.sh --help lists them (flags of the script come after --)" ;;
  esac
done

[[ -n $script ]] || fail "give a script, such as dqn_atari.py, as the first argument"
[[ -f $script ]] || fail "$script: no such script"
[[ ${#env_ids[@]} -gt 0 ]] || fail "--env-ids: give one environment or more"
[[ ${#seeds[@]} -gt 0 ]] || fail "--seeds: give one seed or more"
for seed in "${seeds[@]}"; do
  [[ $seed =~ ^(0|[1-9][0-9]{0,17})$ ]] || fail "--seeds $seed: a seed is a whole number, not negative"
done
[[ -z $workers ]] || is_count "$workers" || fail "--workers $workers: must be a number greater than 0"
is_count "$cpus_per_task" || fail "--cpus-per-task $cpus_per_task: must be a number greater than 0"
[[ -z $gpus_per_task ]] || is_count "$gpus_per_task" || fail "--gpus-per-task $gpus_per_task: must be a number greater than 0"
for flag in ${flags[@]+"${flags[@]}"}; do
  flag=${flag%%=*}
  case ${flag//_/-} in
  --seed | --env-id | --dataset | --run-name | --runs-dir | --resume | --no-resume)
    fail "-- $flag: the sweep sets this flag for each run"
    ;;
  --evaluate | --units | --help | -h) fail "-- $flag: a sweep only trains, once for each environment and seed" ;;
  esac
done
[[ -n $slurm || -z $only_slurm ]] || fail "$only_slurm: is for --slurm"
existing=$runs_dir
while [[ ! -e $existing ]]; do existing=$(dirname "$existing"); done
[[ -d $existing && -w $existing ]] || fail "--runs-dir $runs_dir: $existing is no folder that can be written to"

# The list: a name and a command for each run.
environment_flag=--env-id
grep -q '^    env_id: ' "$script" || environment_flag=--dataset # regression
algorithm=$(basename "$script" .py)
names=() commands=()
declare -A taken=()
for env_id in "${env_ids[@]}"; do
  for seed in "${seeds[@]}"; do
    name="${env_id//[^A-Za-z0-9._-]/-}__${algorithm}__$seed"
    [[ -z ${taken[$name]-} ]] || fail "$env_id, seed $seed: a second run that would be called $name"
    taken[$name]=1
    names+=("$name")
    printf -v command '%q ' "$python" "$script" "$environment_flag" "$env_id" --seed "$seed" \
      --run-name "$name" --runs-dir "$runs_dir" --resume ${flags[@]+"${flags[@]}"}
    commands+=("${command% }")
  done
done
total=${#names[@]}

if [[ -n $dry_run ]]; then
  printf '%s\n' "${commands[@]}"
  exit 0
fi

command -v "$python" >/dev/null || fail "$python: no such program; name the interpreter with PYTHON=... in front"
[[ -z $slurm ]] || command -v sbatch >/dev/null ||
  fail "--slurm: there is no sbatch here; leave --slurm out to run on this machine"
logs=$runs_dir/logs
printf -v given '%q ' ${flags[@]+"${flags[@]}"}
for name in "${names[@]}"; do
  [[ ! -d $runs_dir/$name || ! -e $logs/$name.flags ]] || { read -r started <"$logs/$name.flags" && [[ "$started " == "$given" ]]; } ||
    fail "$name was started with other flags (see $logs/$name.flags); give the same, or another --runs-dir"
done
mkdir -p "$logs" 2>/dev/null || fail "--runs-dir $runs_dir: cannot make the folder $logs"
for name in "${names[@]}"; do echo "${given% }" >"$logs/$name.flags"; done

is_finished() { [[ -e $runs_dir/${names[$1]}/result.json ]]; }

if [[ -n $slurm ]]; then
  unfinished=()
  for ((i = 0; i < total; i++)); do is_finished "$i" || unfinished+=("${commands[i]}"); done
  [[ ${#unfinished[@]} -gt 0 ]] || { echo "all $total runs are finished" && exit 0; }
  list=$logs/${algorithm}__$(date +%s)__$$.list
  printf '%s\n' "${unfinished[@]}" >"$list"
  options=(--array="0-$((${#unfinished[@]} - 1))" --ntasks=1 --requeue --job-name="$algorithm")
  options+=(--output="$logs/slurm-%A_%a.log")
  options+=(--open-mode=append --cpus-per-task="$cpus_per_task" --chdir="$PWD")
  [[ -z $partition ]] || options+=(--partition="$partition")
  [[ -z $gpus_per_task ]] || options+=(--gpus-per-task="$gpus_per_task")
  [[ -z $time_limit ]] || options+=(--time="$time_limit")
  [[ -z $workers ]] || options[0]+="%$workers"
  # The task becomes the run itself, so that Slurm's signals reach it and it writes a checkpoint.
  sbatch "${options[@]}" <<END
#!/usr/bin/env bash
export OMP_NUM_THREADS=\$SLURM_CPUS_PER_TASK
eval "exec \$(sed -n "\$((SLURM_ARRAY_TASK_ID + 1))p" $(printf %q "$list"))"
END
  echo "${#unfinished[@]} runs; ./benchmark.sh --summary $(printf %q "$runs_dir") tells how far they are"
  exit 0
fi

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which would obey them
visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)} || visible=""
IFS=, read -ra gpus <<<"$visible"
threads=${OMP_NUM_THREADS-}
is_count "$threads" || threads=""
[[ -n $workers ]] || workers=$((${#gpus[@]} > 0 ? ${#gpus[@]} : cores / ${threads:-1}))
workers=$((workers < total ? workers : total))
workers=$((workers > 0 ? workers : 1))
[[ -n $threads ]] || threads=$((cores / workers > 0 ? cores / workers : 1))
export OMP_NUM_THREADS=$threads

pids=() running=() began=() # of the runs under way, by worker: process, number in the list, second
next=0 finished=0 failed=0 skipped=0 spent=0

# However the sweep ends, its runs end with it, each with a checkpoint.
end_runs() {
  [[ ${BASHPID-$$} == "$$" ]] || exit # a child just forked may hear the signal too, and a second one kills the runs
  trap '' INT TERM HUP
  # shellcheck disable=SC2046
  kill -TERM $(jobs -p) 2>/dev/null || true
  wait
}
stop() {
  [[ ${BASHPID-$$} == "$$" ]] || exit 130
  printf '\nstopping ...\n' >&2 || true
  end_runs
  echo "stopped; the same command goes on" >&2 || true
  exit 130
}
trap end_runs EXIT
trap stop INT TERM HUP

progress() {
  local left="-" under_way=0 seconds
  seconds=$((finished > 0 ? spent * (total - skipped - finished - failed) / finished : 0))
  for ((worker = 0; worker < workers; worker++)); do
    [[ -n ${pids[worker]-} ]] || continue
    under_way=$((under_way + 1)) seconds=$((seconds - SECONDS + began[worker]))
  done
  if [[ $finished -gt 0 ]]; then
    seconds=$((seconds > 0 ? seconds / workers : 0))
    printf -v left '%d:%02d h' $((seconds / 3600)) $((seconds / 60 % 60))
  fi
  local line="$((finished + skipped))/$total done, $under_way running, $failed failed, $left left"
  if [[ -t 1 ]]; then
    printf '\r%s\033[K' "$line"
  elif [[ $line != "${last_line-}" ]]; then
    echo "$line"
  fi
  last_line=$line
}

while :; do
  for ((worker = 0; worker < workers; worker++)); do
    if [[ -n ${pids[worker]-} ]]; then
      kill -0 "${pids[worker]}" 2>/dev/null && continue
      status=0
      wait "${pids[worker]}" || status=$?
      pids[worker]=""
      if [[ $status -eq 0 ]] && is_finished "${running[worker]}"; then
        finished=$((finished + 1)) spent=$((spent + SECONDS - began[worker]))
      else
        failed=$((failed + 1))
        name=${names[running[worker]]}
        printf '\n%s failed with status %d; the end of %s:\n' "$name" "$status" "$logs/$name.log" >&2
        tail -n 12 "$logs/$name.log" >&2 || true
      fi
    fi
    while [[ $next -lt $total ]] && is_finished $next; do
      next=$((next + 1)) skipped=$((skipped + 1))
    done
    if [[ $next -lt $total ]]; then
      [[ ${#gpus[@]} -eq 0 ]] || export CUDA_VISIBLE_DEVICES=${gpus[worker % ${#gpus[@]}]}
      { trap '' HUP && eval "exec ${commands[next]}"; } >>"$logs/${names[next]}.log" 2>&1 </dev/null &
      pids[worker]=$! running[worker]=$next began[worker]=$SECONDS next=$((next + 1))
    fi
  done
  progress
  [[ -n $(printf %s ${pids[@]+"${pids[@]}"}) ]] || break
  sleep 0.5 &
  wait $! || true # a trap is served at once
done
[[ ! -t 1 ]] || echo

"$python" "$here/results/summary.py" "$runs_dir" || failed=$((failed > 0 ? failed : -1))
[[ $failed -ge 0 ]] || exit 1
if [[ $failed -gt 0 ]]; then
  echo "$failed of $total runs failed; the same command tries them again" >&2
  exit 1
fi
