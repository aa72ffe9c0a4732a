#!/usr/bin/env bash
# A language model of one's own, adapted: pretrains a small GPT-2 on the first five books of the King James Bible
# (Debian's package bible-kjv, in the public domain), adapts it to the letters of Paul by each method, and shows the
# perplexity on both, and that the base is exactly what it was with the adapter off.
#
#   examples/causal.sh [--out FOLDER] [-- ARGUMENT-OF-peft-causal...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

out=$peft_root/build/causal
while [ $# -gt 0 ]; do
  case $1 in
    --out)
      [ $# -ge 2 ] || peft_fail "$1 needs a value"
      out=$2
      shift 2
      ;;
    --)
      shift
      break
      ;;
    -h | --help)
      sed -n '2,7s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) peft_fail "unknown argument '$1' (expected: [--out FOLDER] [-- ARGUMENT...])" ;;
  esac
done
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || peft_fail "the folder $out cannot be written (hint: --out FOLDER)"

peft_setup
if [ ! -s "$out/old.txt" ] || [ ! -s "$out/new.txt" ]; then
  peft_install bible-kjv
  bible -f 'gen1:1-deu34:12' >"$out/old.txt"
  bible -f 'rom1:1-phm1:25' >"$out/new.txt"
fi
build=$peft_root/build/release
peft_configure "$build" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG" -DPEFT_BUILD_TESTS=OFF
cmake --build "$build" -j "$(peft_jobs)" --target peft-causal >"$build/build.log" 2>&1 || {
  tail -n 30 "$build/build.log" >&2
  peft_fail "the build failed" "its whole output: $build/build.log"
}
"$build/examples/peft-causal" --pretrain "$out/old.txt" --adapt "$out/new.txt" --out "$out" "$@"
