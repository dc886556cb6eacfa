#!/usr/bin/env bash
# Pins what requirements*.in ask for: every distribution, with the hashes of its files, for Python 3.11 and newer.
#   tools/python/update_lock.sh                    keeps the pins it can, adds and removes what the .in files say
#   tools/python/update_lock.sh --upgrade          moves every pin to the newest release
#   tools/python/update_lock.sh --upgrade-package optax
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if ! command -v uv > /dev/null; then
  echo "update_lock.sh: uv not found; install it with: python3 -m pip install uv" >&2
  exit 1
fi

compile() {  # compile NAME [uv options]: NAME.in -> NAME.lock
  local name="$1"; shift
  uv pip compile "$name.in" --output-file "$name.lock" --quiet --universal --python-version 3.11 --generate-hashes \
    --no-annotate --custom-compile-command tools/python/update_lock.sh "$@"
}

without() {  # without NAME...: overrides that leave these distributions out of a lock
  printf "%s ; python_version < '3'\n" "$@"
}

# open_clip_torch is there for a file of names: what the package imports stays out.
compile requirements --override <(without torch torchvision timm ftfy) "$@"
# What both environments have, they have in one version. torch comes by itself: see requirements-clients.in.
compile requirements-clients --constraint requirements.lock --override <(without torch) "$@"
# An extra holds only what it adds to requirements.lock, at versions that agree with it.
held=()
for name in $(grep -oE '^[a-z0-9][a-z0-9._-]*==' requirements.lock | sed 's/==//' | sort -u); do
  held+=(--no-emit-package "$name")
done
for extra in tpu cuda; do
  compile "requirements-$extra" --constraint requirements.lock "${held[@]}" "$@"
done
