#!/bin/sh
# What `make demo` and `make test` need on a fresh Debian 12: packages, a virtual environment made from
# the distribution's Python (its bcc module works with that one alone), this project in it.
# Safe to repeat: does nothing when all is there. Starts no service on the host.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || { say "Pillion loads eBPF and makes network namespaces: run this as root (sudo make …)."; exit 1; }
# What cannot be installed.
cgroups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
[ -n "$cgroups" ] || { say "no cgroup2 is mounted; do: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"; exit 1; }
[ -w "$cgroups" ] || { say "$cgroups is read-only: a container needs more rights (docker run --privileged --cgroupns=host)"; exit 1; }
[ "$(readlink /proc/self/ns/cgroup)" = "cgroup:[4026531835]" ] || # of the machine, by the kernel's own number
    say "a container with a cgroup namespace of its own: the tests, and deep in it the mesh, need the host's (docker run --cgroupns=host)"

log=""
ticker=""
clean() { [ -z "$ticker" ] || kill "$ticker" 2>/dev/null || :; ticker=""; }
trap clean EXIT
trap 'exit 1' INT TERM

# quietly COMMAND…: what it says goes to $log; each five seconds its last line is shown, so that nobody takes it for stuck.
quietly() {
    [ -n "$log" ] || log=$(mktemp)
    (
        seconds=0
        while sleep 5 >/dev/null 2>&1; do
            seconds=$((seconds + 5))
            line=$(tail -n 1 "$log" | tr -s '\r' '\n' | tail -n 1 | sed 's/^ *//' | cut -c 1-100)
            say "… $seconds s${line:+: $line}"
        done
    ) &
    ticker=$!
    code=0
    "$@" >>"$log" 2>&1 || code=$?
    clean
    return "$code"
}

failed() { # WHAT REMEDY
    tail -n 15 "$log" >&2
    say "$1 (its whole output: $log)"
    say "  $2"
    exit 1
}

packages="python3-bpfcc linux-libc-dev libbpf1 python3-venv python3-dev gcc iproute2 util-linux procps curl tcpdump
 iperf3 nginx-light redis-server redis-tools mariadb-server mariadb-client wrk nghttp2-client"
case "${1:-}" in
"") ;;
vm) # what only `make test`, `make test-kernels` and `pillion lab vm` need
    packages="$packages systemd vagrant qemu-system-x86 busybox-static kmod e2fsprogs debootstrap zstd"
    # runtimes at the ends of connections that the kernel carries: whichever are here will do
    command -v node >/dev/null || packages="$packages nodejs"
    command -v javac >/dev/null || packages="$packages default-jdk-headless"
    command -v go >/dev/null || packages="$packages golang-go"
    [ -n "$(command -v /usr/lib/qemu/virtiofsd)" ] || ! apt-cache show virtiofsd >/dev/null 2>&1 || packages="$packages virtiofsd" ;;
*) say "usage: setup.sh [vm]"; exit 2 ;;
esac
missing=""
for p in $packages; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || { say "needs these packages of Debian 12:$missing"; exit 1; }
    # shellcheck disable=SC2086 # here and below: a list of words
    say "installing with apt-get:" $missing
    # A policy that denies keeps the servers we install for the demo from being started on this host. One
    # that was here before is the owner's and comes back.
    policy=/usr/sbin/policy-rc.d
    saved=""
    if [ -e "$policy" ] || [ -L "$policy" ]; then saved=$(mktemp -u "$policy.XXXXXX"); mv "$policy" "$saved"; fi
    restore() { rm -f "$policy"; if [ -n "$saved" ]; then mv "$saved" "$policy"; fi; }
    trap 'clean; restore' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    export DEBIAN_FRONTEND=noninteractive
    remedy="is the network there, and does /etc/apt name Debian's mirrors? Then repeat the command: it goes on where it stopped"
    quietly apt-get update || failed "apt-get update failed" "$remedy"
    # shellcheck disable=SC2086
    quietly apt-get install -y --no-install-recommends $missing || failed "apt-get install failed" "$remedy"
    restore
    trap clean EXIT
fi

stamp=.venv/.made-from
want=$(cat requirements.lock pyproject.toml deploy/setup.sh | sha256sum)
if [ ! -x .venv/bin/python ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    say "making .venv with pip (about a minute)"
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "needs Python 3.11 or newer at /usr/bin/python3"; exit 1; }
    quietly /usr/bin/python3 -m venv --clear .venv || failed "python3 -m venv failed" "is python3-venv intact, and is there room on the disk?"
    remedy="is the network there? pip takes another index, proxy or certificate from PIP_INDEX_URL, PIP_PROXY, PIP_CERT"
    pip=".venv/bin/pip --disable-pip-version-check install --progress-bar off"
    # shellcheck disable=SC2086
    quietly $pip --require-hashes -r requirements.lock || failed "pip could not install what requirements.lock names" "$remedy"
    # shellcheck disable=SC2086
    quietly $pip --no-deps --no-build-isolation -e . || failed "pip could not install this project into .venv" "$remedy"
    # Only bcc from the distribution, not all of its packages.
    ln -sfn /usr/lib/python3/dist-packages/bcc "$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/bcc"
    .venv/bin/python -c 'import bcc' || { say "the bcc module does not load; is python3-bpfcc intact?"; exit 1; }
    printf '%s\n' "$want" >"$stamp"
fi
[ -z "$log" ] || rm -f "$log"
