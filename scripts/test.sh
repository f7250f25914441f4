#!/usr/bin/env bash
# Checks style and types, and runs all tests, setting up whatever is missing first.
# Usage: bash scripts/test.sh [ARGUMENTS OF pytest]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
ruff check .
ruff format --check --quiet .
mypy
# A file is run by one process: its models are loaded and compiled once.
exec python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile "$@"
