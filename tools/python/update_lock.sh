#!/usr/bin/env bash
# Generate the locks of requirements*.in: all distributions with the hashes of their files, for Python 3.11 and newer.
#   tools/python/update_lock.sh                    keep existing pins where possible
#   tools/python/update_lock.sh --upgrade          move every pin to the newest release
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

without() {  # without NAME...: overrides that exclude these distributions from a lock
  printf "%s ; python_version < '3'\n" "$@"
}

# open_clip_torch and clip-benchmark are only needed for files of names, so their dependencies are excluded.
compile requirements \
  --override <(without torch torchvision timm ftfy transformers webdataset pycocoevalcap) "$@"
# Both environments use equal versions of shared distributions. For torch and pycocoevalcap, see requirements-clients.in.
compile requirements-clients --constraint requirements.lock --override <(without torch pycocoevalcap) "$@"
# The environment of the site does not contain JAX: see requirements-docs.in.
compile requirements-docs "$@"
# The lock of an extra contains only additions to requirements.lock, at compatible versions.
held=()
for name in $(grep -oE '^[a-z0-9][a-z0-9._-]*==' requirements.lock | sed 's/==//' | sort -u); do
  held+=(--no-emit-package "$name")
done
for extra in tpu cuda; do
  compile "requirements-$extra" --constraint requirements.lock "${held[@]}" "$@"
done
