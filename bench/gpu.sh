#!/usr/bin/env bash
# Builds for the GPU of this machine, tests what needs one, and measures. No network, no virtual environment.
#
#   bench/gpu.sh RESULTS [--quick] [--dry-run] [--parts PART...]
#
# Parts: build machine plan tests fused step polar refresh; all of them by default, one after the other whatever the
# others said. In RESULTS: the figures as fused-gpu.csv, step-gpu.csv, polar-gpu.csv and refresh-gpu.csv, and in
# RESULTS/logs what each part said, with summary.txt. The package goes into build/gpu-site and nowhere else. Exit status 1 if a part failed.
#
# PYTHON (python3) has torch, setuptools>=77, cmake, ninja, pybind11 and pytest; nvcc is in CUDA_HOME/bin or on PATH; the
# products for Hopper are built where nvidia-cutlass can be imported, and peers are measured where they can: either may
# lie on PYTHONPATH. MODELS: of the step (gpt2-124m llama-1b). STEEPEST_COMMIT: for the figures, where there is no git.
set -uo pipefail

python=${PYTHON:-python3}
models=(${MODELS:-gpt2-124m llama-1b})
all=(build machine plan tests fused step polar refresh)
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

[[ $results == /* ]] || results=$PWD/$results
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
logs=$results/logs
site=$PWD/build/gpu-site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
[[ -n $dry ]] || mkdir -p "$logs" || exit 1

failed=0
# part NAME SECONDS COMMAND...: prints it, runs it for so many seconds at most, keeps what it says.
part() {
  local name=$1 limit=$2
  shift 2
  printf '%s: timeout %s' "$name" "$limit"
  printf ' %q' "$@"
  printf '\n'
  [[ -z $dry ]] || return 0
  local begin=$SECONDS status
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/$name.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) status=ok ;;
    124 | 137) status="stopped after $limit s" ;;
    *) status="failed with $status" ;;
  esac
  [[ $status == ok ]] || failed=1
  echo "$name: $status, $((SECONDS - begin)) s" | tee -a "$logs/summary.txt"
}

architecture() {
  local capability='import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + "a" * ((a, b) == (9, 0)))'
  "$python" -c "$capability"
}

# In the order of the list above, whatever the order in which they were asked for.
for name in "${all[@]}"; do
  [[ " ${parts[*]} " == *" $name "* ]] || continue
  case $name in
    build)
      list=${TORCH_CUDA_ARCH_LIST:-}
      [[ -n $list || -n $dry ]] || list=$(architecture)
      part build 540 env STEEPEST_CUDA=1 TORCH_CUDA_ARCH_LIST="${list:-of-the-device}" \
        "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-build-isolation \
        --upgrade --target "$site" .
      ;;
    machine)
      part machine 60 bash -c "nvidia-smi; $(printf %q "$python") -m steepest doctor"
      ;;
    plan)
      part plan 60 "$python" -m steepest plan --shape 24x1024x4096 --shape 4096x4096 --shape 126x64x256
      ;;
    tests)
      part tests 300 "$python" -m pytest -q -m gpu --continue-on-collection-errors -p no:cacheprovider \
        --junitxml "$logs/tests.xml"
      ;;
    fused)
      sizes=(--elements 1e8 1e9 --model "${models[@]}")
      [[ -z $quick ]] || sizes=(--elements 1e8 --model "${models[0]}" --rounds 5)
      part fused 120 "$python" bench/bench_fused.py --device cuda "${sizes[@]}" --csv "$results/fused-gpu.csv"
      ;;
    step)
      sizes=(--shapes "${models[@]}")
      [[ -z $quick ]] || sizes=(--shapes "${models[0]}" --rounds 3)
      part step 180 "$python" bench/bench_step.py --device cuda --whole "${sizes[@]}" --csv "$results/step-gpu.csv"
      ;;
    polar)
      part polar 330 "$python" bench/bench_polar.py --device cuda ${quick:+--quick} --csv "$results/polar-gpu.csv"
      ;;
    refresh)
      part refresh 330 "$python" bench/bench_refresh.py --device cuda ${quick:+--quick} --csv "$results/refresh-gpu.csv"
      ;;
  esac
done
exit $failed
