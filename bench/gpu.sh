#!/usr/bin/env bash
# Builds for the GPU of this machine, tests what needs one, and measures. No network, no virtual environment.
#
#   bench/gpu.sh RESULTS [--quick] [--dry-run] [--parts PART...]
#
# All of it takes nine minutes at most, three with --quick: what is left of them is shared out among the parts that follow,
# and a part that has no time left for a case says so. Parts, one after the other whatever the others said:
#
#   build machine plan tests
#   polar     suites polar, symm_gemm and small       step      suites step, launch and memory
#   refresh   suites refresh and fused                train     a training run
#
# In RESULTS: PART.json and .csv of each, pictures, and in RESULTS/logs what each part said, with summary.txt. The package
# goes into build/gpu-site and nowhere else. Exit status 1 if a part failed.
#
# PYTHON (python3) has torch, setuptools>=77, cmake, ninja, pybind11 and pytest; nvcc is in CUDA_HOME/bin or on PATH; the
# products for Hopper are built where nvidia-cutlass can be imported, peers are measured where they can, and pictures drawn
# where matplotlib can: all of them may lie on PYTHONPATH. MODELS: of the step (gpt2-124m llama-1b). LIMIT: seconds in all.
# STEEPEST_COMMIT: for the figures, where there is no git.
set -uo pipefail

python=${PYTHON:-python3}
models=(${MODELS:-gpt2-124m llama-1b})
all=(build machine plan tests polar step refresh train)
# Shares of the time that is left, of a part that is given a share.
declare -A weight=([tests]=4 [polar]=5 [step]=5 [refresh]=3 [train]=5)
parts=()
results="" quick="" dry=""

usage() {
  echo "usage: bench/gpu.sh RESULTS [--quick] [--dry-run] [--parts ${all[*]}]" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --quick) quick=1 ;;
    --dry-run) dry=1 ;;
    --parts)
      while (($# > 1)) && [[ $2 != --* ]]; do
        if [[ " ${all[*]} " != *" $2 "* ]]; then
          echo "part '$2' is not known; choose from ${all[*]}" >&2
          exit 2
        fi
        parts+=("$2")
        shift
      done
      ;;
    -*) usage ;;
    *)
      [[ -z $results ]] || usage
      results=$1
      ;;
  esac
  shift
done
[[ -n $results ]] || usage
((${#parts[@]})) || parts=("${all[@]}")

limit=${LIMIT:-$([[ -n $quick ]] && echo 170 || echo 530)}
[[ $results == /* ]] || results=$PWD/$results
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
logs=$results/logs
site=$PWD/build/gpu-site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
[[ -n $dry ]] || mkdir -p "$logs" || exit 1
SECONDS=0

asked() { [[ " ${parts[*]} " == *" $1 "* ]]; }

# share PART: its seconds of those that are left.
share() {
  local sum=0 after="" name
  for name in "${all[@]}"; do
    [[ $name != "$1" ]] || after=1
    if [[ -n $after ]] && asked "$name"; then sum=$((sum + ${weight[$name]:-0})); fi
  done
  echo $(((limit - SECONDS) * ${weight[$1]} / sum))
}

failed=0
# part NAME SECONDS COMMAND...: prints it, runs it for so many seconds at most, keeps what it says.
part() {
  local name=$1 most=$2
  shift 2
  ((most <= limit - SECONDS)) || most=$((limit - SECONDS))
  printf '%s: timeout %s' "$name" "$most"
  printf ' %q' "$@"
  printf '\n'
  [[ -z $dry ]] || return 0
  local begin=$SECONDS status
  if ((most < 5)); then
    status="left out: no time"
  else
    timeout --kill-after=10 "$most" "$@" 2>&1 | tee "$logs/$name.log"
    status=${PIPESTATUS[0]}
  fi
  case $status in
    0) status=ok ;;
    124 | 137) status="stopped after $most s" ;;
    [0-9]*) status="failed with $status" ;;
  esac
  [[ $status == ok ]] || failed=1
  echo "$name: $status, $((SECONDS - begin)) s" | tee -a "$logs/summary.txt"
}

# suites PART OPTION...: the suites and options of a part. No case begins in the last quarter of its time.
suites() {
  local name=$1 seconds
  shift
  seconds=$(share "$name")
  part "$name" "$seconds" "$python" -m steepest bench "$@" ${quick:+--quick} --device cuda --name "$name" \
    --budget $((seconds * 3 / 4)) --out "$results"
}

architecture() {
  local capability='import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + "a" * ((a, b) == (9, 0)))'
  "$python" -c "$capability"
}

# In the order of the list above, whatever the order in which they were asked for.
for name in "${all[@]}"; do
  asked "$name" || continue
  case $name in
    build)
      list=${TORCH_CUDA_ARCH_LIST:-}
      [[ -n $list || -n $dry ]] || list=$(architecture)
      part build $((limit - 60)) env STEEPEST_CUDA=1 TORCH_CUDA_ARCH_LIST="${list:-of-the-device}" \
        "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-build-isolation \
        --upgrade --target "$site" .
      ;;
    machine)
      part machine 30 bash -c "nvidia-smi; $(printf %q "$python") -m steepest doctor"
      ;;
    plan)
      part plan 30 "$python" -m steepest plan --shape 24x1024x4096 --shape 4096x4096 --shape 126x64x256
      ;;
    tests)
      part tests "$(share tests)" "$python" -m pytest -q -m gpu --continue-on-collection-errors -p no:cacheprovider \
        --junitxml "$logs/tests.xml"
      ;;
    polar) suites polar polar symm_gemm small ;;
    step)
      [[ -z $quick ]] || models=("${models[0]}")
      suites step step launch memory --whole --shapes "${models[@]}"
      ;;
    refresh) suites refresh refresh fused ;;
    train) suites train train ;;
  esac
done
exit $failed
