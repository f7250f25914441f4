#!/usr/bin/env bash
# Streams text from the built-in model, setting up whatever is missing first. Ctrl-C ends it.
# Usage: bash scripts/demo.sh [FLAGS OF sinkjax.decode]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
if [ $# -eq 0 ]; then
    set -- --prompt "The old lighthouse keeper climbed the stairs, and" --max_tokens 300 --ignore_eos
fi
exec python -m sinkjax.decode --stats "$@"
