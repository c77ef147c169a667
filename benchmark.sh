#!/usr/bin/env bash
# Runs a script on environments x seeds, on this machine or on a Slurm cluster; started again it goes on.
set -euo pipefail

usage() {
  cat <<'END'
./benchmark.sh SCRIPT --env-ids ENV... --seeds SEED... [OPTIONS] [-- FLAGS OF THE SCRIPT]
./benchmark.sh --summary RUNS_DIR

    ./benchmark.sh dqn_atari.py --env-ids ALE/Pong-v5 ALE/Breakout-v5 --seeds 1 2 3 -- --total-timesteps 1000000
    ./benchmark.sh mlp_regression.py --env-ids sine circle --seeds 1 2 3
    ./benchmark.sh mlp_regression.py --env-ids houses.csv --seeds 1 2 3 -- --target price

Every environment and seed is a run of its own, RUNS_DIR/ENV__SCRIPT__SEED. Start the same command again after a crash,
a reboot or Ctrl-C: it goes on with what is unfinished. Other flags of the script make other runs: give them a
--runs-dir of their own.

  --runs-dir DIR        folder of the runs (default: runs)
  --workers N           runs at a time (default: one for each GPU, for a script on the CPU for each core)
  --dry-run             print the command of every run, nothing else
  --summary DIR         tables and learning curves of the runs in DIR, into DIR/summary
  --slurm               hand the runs to Slurm as one job array instead, requeued when a node fails or preempts
  --sbatch "OPTIONS"    of sbatch, for each run: --sbatch "--partition=gpu --gpus=1 --cpus-per-task=4 --time=12:00:00"

PYTHON=... in front names the interpreter (default: python), OMP_NUM_THREADS=... the threads of a run (default: the
runs at a time share the cores; on Slurm always those of --cpus-per-task).
END
}

fail() {
  echo "benchmark.sh: error: $1" >&2
  exit 2
}

here=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
script="" runs_dir=runs workers="" dry_run="" slurm=""
env_ids=() seeds=() flags=() sbatch_options=()

[[ $# -gt 0 && $1 != --help && $1 != -h ]] || { usage && exit 0; }
[[ -f $here/results/summary.py ]] || fail "$here/results/summary.py is missing: benchmark.sh wants it beside itself"
command -v "$python" >/dev/null || fail "$python: no such program; name the interpreter with PYTHON=... in front"
if [[ $1 == --summary ]]; then
  [[ $# -eq 2 && -d ${2-} ]] || fail "--summary ${*:2}: give one folder that exists"
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
  --sbatch) [[ -n ${1-} ]] || fail "--sbatch: give options of sbatch, in quotes" && read -ra words <<<"${1//$'\n'/ }" &&
    sbatch_options+=("${words[@]}") && shift ;;
  --runs-dir) [[ -n ${1-} && $1 != -* ]] || fail "--runs-dir: give a folder" && runs_dir=$1 && shift ;;
  --workers) [[ ${1-} =~ ^[1-9][0-9]{0,5}$ ]] || fail "--workers ${1-}: give a number from 1 on" && workers=$1 && shift ;;
  --) flags=("$@") && break ;;
  --help | -h) usage && exit 0 ;;
  *) fail "$option: no option here; the script comes first and its own flags after -- (./benchmark.sh --help)" ;;
  esac
done

[[ -n $script ]] || fail "give a script, such as dqn_atari.py, as the first argument"
[[ -f $script ]] || fail "$script: no such script"
[[ ${#env_ids[@]} -gt 0 ]] || fail "--env-ids: give one environment or more"
[[ ${#seeds[@]} -gt 0 ]] || fail "--seeds: give one seed or more"
[[ -n $slurm || ${#sbatch_options[@]} -eq 0 ]] || fail "--sbatch: is for --slurm"
for flag in ${flags[@]+"${flags[@]}"}; do
  flag=${flag%%=*}
  case ${flag//_/-} in
  --seed | --env-id | --dataset | --data | --run-name | --runs-dir | --resume | --no-resume | --evaluate | --help | -h)
    fail "-- $flag: the sweep trains, and sets environment, seed and folder of each run" ;;
  esac
done

algorithm=$(basename "$script" .py)
names=() commands=()
for env_id in "${env_ids[@]}"; do
  environment=(--env-id "$env_id") subject=$env_id
  grep -q '^    env_id: ' "$script" || environment=(--dataset "$env_id") # regression
  [[ ${environment[0]}$env_id != --dataset*.[cC][sS][vV] ]] || { environment=(--data "$env_id") && subject=$(basename -- "${env_id%.*}"); }
  subject=$(LC_ALL=C && printf %s "${subject//[^A-Za-z0-9._-]/-}") # the same name in every locale
  for seed in "${seeds[@]}"; do
    [[ $seed =~ ^(0|[1-9][0-9]{0,17})$ ]] || fail "--seeds $seed: a seed is a whole number, not negative, without leading zeros"
    names+=("${subject}__${algorithm}__$seed")
    printf -v command '%q ' "$python" "$script" "${environment[@]}" --seed "$seed" --run-name "${names[${#names[@]} - 1]}" \
      --runs-dir "$runs_dir" --resume ${flags[@]+"${flags[@]}"}
    commands+=("${command% }")
  done
done
twice=$(printf '%s\n' "${names[@]}" | sort | uniq -d)
[[ -z $twice ]] || fail "two runs would be called ${twice%%$'\n'*}"
[[ -z $dry_run ]] || { printf '%s\n' "${commands[@]}" && exit 0; }

[[ -z $slurm ]] || command -v sbatch >/dev/null || fail "--slurm: there is no sbatch here"
logs=$runs_dir/logs total=${#names[@]}
{ mkdir -p "$logs" 2>/dev/null && [[ -w $logs && -w $runs_dir ]]; } || fail "--runs-dir $runs_dir: cannot write to $logs"

if [[ -n $slurm ]]; then
  list=$logs/${algorithm}__$(date +%s)__$$.list
  printf '%s\n' "${commands[@]}" >"$list"
  # The task becomes the run itself, so that Slurm's signals reach it and it writes a checkpoint.
  sbatch --array="0-$((total - 1))${workers:+%$workers}" --ntasks=1 --cpus-per-task=1 --requeue --job-name="$algorithm" \
    --output="${logs//%/%%}/slurm-%A_%a.log" --open-mode=append --chdir="$PWD" ${sbatch_options[@]+"${sbatch_options[@]}"} <<END
#!/usr/bin/env bash
export OMP_NUM_THREADS=\$SLURM_CPUS_PER_TASK
run=\$(sed -n "\$((SLURM_ARRAY_TASK_ID + 1))p" $(printf %q "$list")) && eval "exec \$run"
END
  echo "$total runs; ./benchmark.sh --summary $(printf %q "$runs_dir") tells which have ended"
  exit 0
fi

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc would obey them
visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -)} || visible=""
device=$(sed -n 's/^    device: .* = "\(.*\)"$/\1/p' "$script") # the script's default
[[ " ${flags[*]-} " =~ .*\ --device[\ =]([a-z]+) ]] && device=${BASH_REMATCH[1]}
[[ $device != cpu ]] || visible=""
IFS=, read -ra gpus <<<"${visible#-1}"
threads=${OMP_NUM_THREADS-}
[[ $threads =~ ^[1-9][0-9]{0,5}$ ]] || threads=""
[[ -n $workers ]] || workers=$((${#gpus[@]} > 0 ? ${#gpus[@]} : cores / ${threads:-1}))
workers=$((workers < 1 ? 1 : workers < total ? workers : total))
export OMP_NUM_THREADS=${threads:-$((cores / workers > 0 ? cores / workers : 1))}

# However the sweep ends, its runs end with it, each with a checkpoint.
end() {
  # shellcheck disable=SC2046
  kill -TERM $(jobs -p) 2>/dev/null || true
}
stop() {
  [[ ${BASHPID-$$} == "$$" ]] || exit 130 # a child just forked may hear the signal too
  trap '' PIPE EXIT
  trap end INT TERM HUP # a second signal reaches the runs too, which it ends at once
  printf '\nstopping ...\n' >&2 || true
  end
  until wait; do :; done
  echo "stopped; the same command goes on" >&2 || true
  exit 130
}
trap stop INT TERM HUP PIPE EXIT # PIPE: of `2>&1 | tee`, by the same signal

pids=() running=() next=0 finished=0 failed=0 before="" # of each worker: its process, its run's number in the list
while :; do
  under_way=0
  for ((worker = 0; worker < workers; worker++)); do
    if [[ -n ${pids[worker]-} ]] && ! kill -0 "${pids[worker]}" 2>/dev/null; then
      status=0 name=${names[running[worker]]}
      wait "${pids[worker]}" || status=$?
      pids[worker]=""
      if [[ $status -eq 0 && -e $runs_dir/$name/result.json ]]; then
        finished=$((finished + 1))
      else
        failed=$((failed + 1))
        printf '\n%s failed with status %d; the end of %s:\n' "$name" "$status" "$logs/$name.log" >&2
        tail -n 12 "$logs/$name.log" >&2 || true
      fi
    fi
    if [[ -z ${pids[worker]-} && $next -lt $total ]]; then
      [[ ${#gpus[@]} -eq 0 ]] || export CUDA_VISIBLE_DEVICES=${gpus[worker % ${#gpus[@]}]}
      { trap '' HUP && eval "exec ${commands[next]}"; } >>"$logs/${names[next]}.log" 2>&1 </dev/null &
      pids[worker]=$! running[worker]=$next next=$((next + 1))
    fi
    [[ -z ${pids[worker]-} ]] || under_way=$((under_way + 1))
  done
  line="$finished/$total done, $under_way running, $failed failed"
  [[ $line == "$before" ]] || echo "$line"
  before=$line
  [[ $under_way -gt 0 ]] || break
  sleep 0.5 &
  wait $! || true # a trap is served at once
done
trap - EXIT

[[ $failed -eq 0 ]] || echo "$failed of $total runs failed; the same command tries them again" >&2
"$python" "$here/results/summary.py" "$runs_dir" && [[ $failed -eq 0 ]] || exit 1
