#!/usr/bin/env bash
# GLUE: methods × tasks × seeds on a pretrained encoder, next to Python PEFT where wanted, as a table.
#
#   examples/glue.sh --data FOLDER [--model FOLDER] [--out FOLDER] [--peer] [ARGUMENT-OF-peft-glue...]
#
# The data is GLUE's own: a folder a task (CoLA, RTE, ...) with its train.tsv and dev.tsv; tasks that are absent are
# skipped. Without --model it takes MiniLM, which it fetches. Running it again goes on where it stopped. --peer installs
# Python PEFT and trains head, LoRA and AdaLoRA there too, from the same start on the same batches. A run with all
# methods takes hours: --task RTE --method lora --seeds 1 takes some minutes. PEFT_REFERENCE_PYTHON names a Python for
# --peer that has what it needs; once it is built, build/release/examples/peft-glue --help has every option.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

data=
model=
out=$peft_root/build/glue
peer=false
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --data | --model | --out)
      [ $# -ge 2 ] || peft_fail "$1 needs a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --peer)
      peer=true
      shift
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
[ -n "$data" ] || peft_fail "--data must be given: GLUE's folder, with a folder a task"
[ -d "$data" ] || peft_fail "--data: there is no folder $data"
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || peft_fail "the folder $out cannot be written (hint: --out FOLDER)"

peft_setup wheel
if [ -z "$model" ]; then
  peft_fetch_encoder
  model=$PEFT_ENCODER
fi
if $peer; then
  if [ -z "${PEFT_REFERENCE_PYTHON:-}" ]; then
    packages=(transformers==5.23.0 peft==0.21.2 safetensors numpy)
    mark=$PEFT_CACHE/venv-$PEFT_TORCH_WHEEL/.bench  # examples/bench.sh needs the same
    if [ ! -e "$mark" ]; then
      peft_say "installing for Python: ${packages[*]}"
      # The torch that is there is named too, so that no package brings another.
      peft_pip "$peft_python" install "torch==$("$peft_python" -c 'from importlib.metadata import version; print(version("torch"))')" "${packages[@]}" ||
        peft_fail "pip could not install ${packages[*]}" "${peft_pip_error:-pip printed no error}"
      touch "$mark"
    fi
    PEFT_REFERENCE_PYTHON=$peft_python
  fi
  arguments+=(--peer "$PEFT_REFERENCE_PYTHON")
fi

# The work is done inside LibTorch: the program around it is better compiled quickly than well.
build=$peft_root/build/release
peft_configure "$build" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG" -DPEFT_BUILD_TESTS=OFF
peft_say "building peft-glue"
cmake --build "$build" -j "$(peft_jobs)" --target peft-glue >"$build/build.log" 2>&1 || {
  tail -n 30 "$build/build.log" >&2
  peft_fail "the build failed" "its whole output: $build/build.log"
}
"$build/examples/peft-glue" --data "$data" --model "$model" --out "$out" ${arguments[@]+"${arguments[@]}"}
