# Sourced by the scripts that need a virtual environment; the caller's working directory is the repository's root.

# python_at_least 3 11: the first interpreter that really runs (a version manager's stub may not) and is new enough.
python_at_least() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < ($1, $2))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: this needs Python $1.$2 or newer${PYTHON:+, which $PYTHON is not}; name one: PYTHON=/path/to/python3" >&2
  return 1
}

# make_venv DIRECTORY PYTHON: creates the environment, or makes anew one that no longer works.
make_venv() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
  "$2" -m venv --clear "$1" || {
    echo "error: $2 cannot make a virtual environment (on Debian and Ubuntu: install python3-venv)" >&2
    return 1
  }
}

# pip_once DIRECTORY NAME ARGS...: `pip install ARGS`, unless the same was done before with these lists of packages.
pip_once() {
  local venv=$1 name=$2 key
  shift 2
  key="$* $(cat pyproject.toml tests/checkpoints.txt | cksum)"
  [ "$(cat "$venv/.installed-$name" 2>/dev/null)" = "$key" ] && return
  echo "installing $name into $venv (the first time takes minutes)" >&2
  "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "$@" || return
  echo "$key" >"$venv/.installed-$name"
}
