#!/usr/bin/env bash
# Builds and runs the tests, from a machine with nothing installed.
#
#   tests/run.sh [--libtorch debian|wheel] [-- CTEST-ARGUMENT...]
#
# --libtorch chooses one of the two tested LibTorchs (Debian's 1.13.1, the 2.13.0+cpu wheel); see cmake/setup.sh.
# With PEFT_REFERENCE_PYTHON naming a Python that has torch, transformers, peft, tokenizers and safetensors, the
# comparisons with live Python run too. PEFT_CMAKE_OPTIONS: more options for CMake.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

libtorch=
while [ $# -gt 0 ]; do
  case $1 in
    --libtorch)
      [ $# -ge 2 ] || peft_fail "--libtorch needs a value: debian or wheel"
      libtorch=$2
      shift 2
      ;;
    --)
      shift
      break
      ;;
    -h | --help)
      sed -n '2,8s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) peft_fail "unknown argument '$1' (expected: [--libtorch debian|wheel] [-- CTEST-ARGUMENT...])" ;;
  esac
done

peft_setup "$libtorch"
labels='unit|consumers'
targets=(all)
if [ -n "${PEFT_REFERENCE_PYTHON:-}" ]; then
  peft_fetch_encoder
  export PEFT_ENCODER
  labels+='|live'
  targets+=(live-tools)
fi

build=$peft_root/build/tests${libtorch:+-$libtorch}
# Assertions stay on (no -DNDEBUG); without -g the programs take a third of the time to compile and link. Not
# optimised, which is quicker to compile: the time of the tests is LibTorch's.
# shellcheck disable=SC2086
peft_configure "$build" -DCMAKE_BUILD_TYPE=Tests -DCMAKE_CXX_FLAGS_TESTS=-O0 -DPEFT_BUNDLE_TESTS=ON \
  ${PEFT_CMAKE_OPTIONS:-}
peft_say "building the tests and examples in ${build#"$peft_root"/}"
cmake --build "$build" -j "$(peft_jobs 7)" --target "${targets[@]}"
peft_say "running the tests ($labels)"
ctest --test-dir "$build" -j "$(peft_jobs)" -L "$labels" --output-on-failure "$@"
peft_say "done"
