#!/usr/bin/env bash
# From a bare Debian or Ubuntu machine to trained adapters and a table that compares them, in a few minutes.
#
#   examples/quickstart.sh [--task pair|sections] [--out FOLDER]
#
# The data is on the machine already: the index of the distribution's packages. The question of the task `pair`
# (the default) is whether a one-line description belongs to a package name; of `sections`, in which section of
# the archive a package stands. Running it again skips what is there; cmake/setup.sh says which LibTorch it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

task=pair
out=$peft_root/build/quickstart
while [ $# -gt 0 ]; do
  case $1 in
    --task | --out)
      [ $# -ge 2 ] || peft_fail "$1 needs a value"
      if [ "$1" = --task ]; then task=$2; else out=$2; fi
      shift 2
      ;;
    -h | --help)
      sed -n '2,8s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) peft_fail "unknown argument '$1' (expected: [--task pair|sections] [--out FOLDER])" ;;
  esac
done
case $task in pair | sections) ;; *) peft_fail "--task must be pair or sections, but got '$task'" ;; esac
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || peft_fail "the folder $out cannot be written (hint: --out FOLDER)"
peft_need_disk "$out" 500 "the quickstart"

peft_say "step 1 of 5: what is needed to build"
peft_setup

peft_say "step 2 of 5: the pretrained encoder"
peft_fetch_encoder
peft_say "encoder: $PEFT_ENCODER"

peft_say "step 3 of 5: building the program peft-finetune"
build=$peft_root/build/release
# The work is done inside LibTorch: the program around it is better compiled quickly than well.
peft_configure "$build" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG" -DPEFT_BUILD_TESTS=OFF
cmake --build "$build" -j "$(peft_jobs)" --target peft-finetune peft-make-data >"$build/build.log" 2>&1 || {
  tail -n 30 "$build/build.log" >&2
  peft_fail "the build failed" "its whole output: $build/build.log"
}
finetune=$build/examples/peft-finetune
make_data=$build/examples/peft-make-data

data=$out/$task
if [ -e "$data/sections_train.tsv" ] && [ -e "$data/sections_test.tsv" ]; then
  peft_say "step 4 of 5: the data set is there"
else
  peft_say "step 4 of 5: making the data set out of this machine's package index"
  index=$(mktemp)
  trap 'rm -f "$index"' EXIT
  apt-cache dumpavail >"$index"
  # A machine that never asked for the index knows only what is installed.
  if [ "$(grep -c '^Package: ' "$index")" -lt 20000 ]; then
    peft_need_root
    peft_update_index "$out/update.log"
    apt-cache dumpavail >"$index"
    [ "$(grep -c '^Package: ' "$index")" -ge 20000 ] ||
      peft_fail "the package index is too small for the data set: no network?" "$(grep -E '^(E|W):' "$out/update.log" | head -n 1)"
  fi
  "$make_data" --task "$task" --out "$data" <"$index"
fi
peft_say "rows: $(($(wc -l <"$data/sections_train.tsv") - 1)) for training, $(($(wc -l <"$data/sections_test.tsv") - 1)) for testing"

adapters=$out/$task-adapters
table=$out/$task-table.txt
if [ -e "$table" ]; then
  peft_say "step 5 of 5: the methods are trained already (to do it again, remove $table)"
  cat "$table"
else
  peft_say "step 5 of 5: training with each method on 4,000 rows, two epochs"
  linear_layers='[query,key,value,attention.output.dense,intermediate.dense,output.dense]'
  "$finetune" compare --model "$PEFT_ENCODER" --train "$data/sections_train.tsv" --test "$data/sections_test.tsv" \
    --train-rows 4000 --test-rows 2000 --epochs 2 --batch-size 32 --max-length 48 --pooling mean \
    --head-lr 5e-3 --schedule linear --warmup 15 --weight-decay 0.01 --clip 0 \
    --method head \
    --method bitfit:lr=4e-3 \
    --method "lora:rank=8,alpha=16,lr=2e-3,targets=$linear_layers" \
    --out "$adapters" --overwrite | tee "$table.part"
  mv "$table.part" "$table"
fi

peft_say "five predictions of the LoRA adapter, on rows it has not seen"
for adapter in "$adapters"/*lora*/best "$adapters"/*lora*; do
  [ ! -e "$adapter/adapter_config.json" ] || break
done
head -n 6 "$data/sections_test.tsv" >"$out/five.tsv"
"$finetune" predict --model "$PEFT_ENCODER" --adapter "$adapter" --data "$out/five.tsv"
peft_say "done: the adapters, the table as CSV and the learning curves are in $adapters"
