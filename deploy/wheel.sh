#!/bin/sh
# wheel.sh DIR: builds Pillion's wheel from this checkout into DIR and prints its path. Leaves nothing else behind; the
# same sources give the same wheel. PYTHON names the interpreter to build with (default /usr/bin/python3), PIP its pip.
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
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800} PYTHONDONTWRITEBYTECODE=1 \
    "$python" ${PIP:--m pip} wheel -q --disable-pip-version-check --no-deps ${WHEEL_OPTIONS:-} -w "$work/out" "$work/src"
cp "$work/out"/pillion-*.whl "$out/"
basename "$work/out"/pillion-*.whl | sed "s#^#$out/#"
