#!/usr/bin/env bash
# The surveys' comparison of parameter-efficient methods, measured: storage, memory, cost of backward and of inference,
# what trains, what of the base changes and the rank of the change.
#
#   examples/survey.sh [--libtorch debian|wheel] [--out FOLDER] [ARGUMENT-OF-peft-survey...]
#
# Without arguments every method, on all-MiniLM-L6-v2, in some ten minutes: all it installs is a compiler, LibTorch and
# that model. --model FOLDER names another one; --methods lora adalora, --batch, --length and --repeat are passed on;
# once it is built, build/bench-wheel/examples/peft-survey --help has every option.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

libtorch=wheel
out=$peft_root/build/survey
model=
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --libtorch | --out | --model)
      [ $# -ge 2 ] || peft_fail "$1 needs a value"
      case $1 in
        --libtorch) libtorch=$2 ;;
        --out) out=$2 ;;
        --model) model=$2 ;;
      esac
      shift 2
      ;;
    -h | --help)
      sed -n '2,10s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || peft_fail "the folder $out cannot be written (hint: --out FOLDER)"

peft_setup "$libtorch"
if [ -z "$model" ]; then
  peft_fetch_encoder
  model=$PEFT_ENCODER
fi

build=$peft_root/build/bench-$libtorch
peft_configure "$build" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -DNDEBUG" -DPEFT_BUILD_TESTS=OFF
peft_say "building peft-survey"
cmake --build "$build" -j "$(peft_jobs)" --target peft-survey >"$build/build.log" 2>&1 || {
  tail -n 30 "$build/build.log" >&2
  peft_fail "the build failed" "its whole output: $build/build.log"
}
"$build/examples/peft-survey" "$model" --out "$out" ${arguments[@]+"${arguments[@]}"}
