#!/bin/sh
# wheel.sh DIR: builds Pillion's wheel from this checkout into DIR and prints its path. Leaves nothing else behind; the
# same sources give the same wheel. PYTHON names the interpreter to build with (default /usr/bin/python3), PIP its pip. It
# is built with what build.lock names, by its hash; BUILD_WITH=own: with what that interpreter has.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-/usr/bin/python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src" "$work/out"
for part in pyproject.toml README.md LICENSE mesh nodeagent l7proxy controller pillion lab bpf; do
    cp -R "$here/$part" "$work/src/"
done
find "$work/src" -name __pycache__ -prune -exec rm -rf {} +
PIP_ROOT_USER_ACTION=ignore
export PIP_ROOT_USER_ACTION
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800} PYTHONDONTWRITEBYTECODE=1
export SOURCE_DATE_EPOCH PYTHONDONTWRITEBYTECODE
# shellcheck disable=SC2086 # words
pip() { what=$1; shift; "$python" ${PIP:--m pip} "$what" -q --disable-pip-version-check --no-deps "$@"; }
if [ "${BUILD_WITH:-}" != own ]; then
    pip install --require-hashes --only-binary :all: --target "$work/build" -r "$here/deploy/build.lock"
    PYTHONPATH=$work/build
    export PYTHONPATH
fi
pip wheel --no-build-isolation -w "$work/out" "$work/src"
cp "$work/out"/pillion-*.whl "$out/"
basename "$work/out"/pillion-*.whl | sed "s#^#$out/#"
