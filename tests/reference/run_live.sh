#!/usr/bin/env bash
# run_live.sh SCRIPT [ARGUMENT…]: runs a comparison with live Python PEFT and transformers, in the Python that
# PEFT_REFERENCE_PYTHON names. An argument that begins with PEFT_ is the name of a variable and stands for its
# value. Without that Python, or a variable, the comparison is skipped (exit 77), which in CI is a failure.
set -euo pipefail
skip() {
  echo "skipped: $1"
  [ -z "${CI:-}" ] || { echo "error: in CI a skipped comparison is a failure" >&2; exit 1; }
  exit 77
}
[ -n "${PEFT_REFERENCE_PYTHON:-}" ] ||
  skip "PEFT_REFERENCE_PYTHON names no Python with torch, transformers, peft, tokenizers and safetensors"
arguments=()
for argument in "$@"; do
  if [[ $argument == PEFT_* ]]; then
    [ -n "${!argument:-}" ] || skip "$argument is not set"
    argument=${!argument}
  fi
  arguments+=("$argument")
done
status=0
"$PEFT_REFERENCE_PYTHON" "${arguments[@]}" || status=$?
[ $status -ne 77 ] || skip "the script says so"
exit $status
