# Sourced by demo.sh and test.sh: makes an environment with sinkjax in it, if it is not there yet, and
# puts it first on PATH. $1: the extra to install, or "" (given, else it is the caller's own $1).
# One environment an extra: the tests' holds compilers for chips, for which jax would look in vain
# each time that it starts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in python3.14 python3.13 python3.12 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

extra="${1:-}"
venv=".venv${extra:+-$extra}"
if [ ! -e "$venv/installed" ] || [ pyproject.toml -nt "$venv/installed" ]; then
    if ! python="$(find_python)"; then
        echo "sinkjax needs Python 3.12 or newer, and none was found. Get it with one of:" >&2
        echo "  uv python install 3.12" >&2
        echo "  pyenv install 3.12" >&2
        echo "  apt install python3.12 python3.12-venv    (Ubuntu 24.04 and later)" >&2
        echo "  brew install python@3.12" >&2
        exit 1
    fi
    echo "setting up $venv with $("$python" --version) (once) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --editable ".${extra:+[$extra]}"
    touch "$venv/installed"
fi
export PATH="$PWD/$venv/bin:$PATH"
