#!/usr/bin/env bash
# What adapters cost: this library beside the frozen model, plain C++ and Python PEFT on the same LibTorch, in turn.
#
#   examples/bench.sh [--libtorch debian|wheel] [--out FOLDER] [ARGUMENT-OF-peft-bench...]
#
# Without arguments everything, which takes hours; --quick takes three minutes and answers most of the targets, --list
# names the rows. Installs what is missing: a compiler, the torch wheel (the default), and beside it the Python
# packages measured against. With --libtorch debian, whose LibTorch has no Python of its own, Python is left out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

libtorch=wheel
out=$peft_root/build/bench
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --libtorch | --out)
      [ $# -ge 2 ] || peft_fail "$1 needs a value"
      if [ "$1" = --out ]; then out=$2; else libtorch=$2; fi
      shift 2
      ;;
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "$0"
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
if [ "$libtorch" = debian ]; then
  arguments+=(--no-python)
elif [ -z "${PEFT_REFERENCE_PYTHON:-}" ] && [[ " ${arguments[*]} " != *" --no-python "* ]]; then
  packages=(transformers==5.23.0 peft==0.21.2 safetensors numpy)
  mark=$PEFT_CACHE/venv-$PEFT_TORCH_WHEEL/.bench
  if [ ! -e "$mark" ]; then
    peft_say "installing for Python: ${packages[*]}"
    # The torch that is there is named too, so that no package brings another.
    peft_pip "$peft_python" install "torch==$("$peft_python" -c 'from importlib.metadata import version; print(version("torch"))')" "${packages[@]}" ||
      peft_fail "pip could not install ${packages[*]}" "${peft_pip_error:-pip printed no error}" \
        "(hint: --no-python measures without)"
    touch "$mark"
  fi
  export PEFT_REFERENCE_PYTHON=$peft_python
fi

# Optimised and one for each LibTorch: here the program's own time is measured too.
build=$peft_root/build/bench-$libtorch
peft_configure "$build" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -DNDEBUG" -DPEFT_BUILD_TESTS=OFF
peft_say "building peft-bench"
cmake --build "$build" -j "$(peft_jobs)" --target peft-bench >"$build/build.log" 2>&1 || {
  tail -n 30 "$build/build.log" >&2
  peft_fail "the build failed" "its whole output: $build/build.log"
}
"$build/examples/peft-bench" --out "$out" ${arguments[@]+"${arguments[@]}"}
