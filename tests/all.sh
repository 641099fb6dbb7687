#!/bin/sh
# The whole suite as two runs side by side: tests that bring up a mesh mostly wait, the others mostly compute. Each run
# judges by name what it left behind (tests/conftest.py). Exit code 0 only if both are green.
set -u
cd "$(dirname "$0")/.."
meshes="tests/attacks $(ls tests/e2e/test_*.py | grep -v test_express_)" # halves of about the same length
scratch=$(mktemp -d /tmp/pillion-tests-XXXXXX)
chmod 755 "$scratch" # servers of other users read below it
trap 'kill "$first" 2>/dev/null; wait; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

# shellcheck disable=SC2086 # a list of words
.venv/bin/python -m pytest --basetemp="$scratch/meshes" --durations=10 $meshes >"$scratch/meshes.log" 2>&1 &
first=$!
ignored=$(printf -- '--ignore=%s ' $meshes)
# shellcheck disable=SC2086
.venv/bin/python -m pytest --basetemp="$scratch/others" --durations=10 $ignored tests
others=$?
while kill -0 "$first" 2>/dev/null; do
    printf 'still at the attacks and what uses a mesh: %s\n' "$(grep -a -o '\[ *[0-9]*%\]' "$scratch/meshes.log" | tail -n 1)"
    sleep 10
done
wait "$first"
labs=$?
cat "$scratch/meshes.log"
[ "$others" = 0 ] && [ "$labs" = 0 ]
