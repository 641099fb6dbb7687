#!/bin/sh
# What `make demo` and `make test` need on a fresh Debian 12: packages, a virtual environment made from
# the distribution's Python (its bcc module works with that one alone), this project in it.
# Safe to repeat: does nothing when all is there. Starts no service on the host.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || { say "Pillion loads eBPF and makes network namespaces: run this as root (sudo make …)."; exit 1; }

packages="python3-bpfcc linux-libc-dev libbpf1 python3-venv python3-dev gcc iproute2 util-linux procps curl tcpdump
 iperf3 nginx-light redis-server redis-tools mariadb-server mariadb-client wrk nghttp2-client"
case "${1:-}" in
"") ;;
vm) # what only `make test`, `make test-kernels` and `pillion lab vm` need
    packages="$packages systemd vagrant qemu-system-x86 busybox-static kmod e2fsprogs debootstrap"
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
    say "installing$missing"
    # A policy that denies keeps the servers we install for the demo from being started on this host. One
    # that was here before is the owner's and comes back.
    policy=/usr/sbin/policy-rc.d
    saved=""
    if [ -e "$policy" ] || [ -L "$policy" ]; then saved=$(mktemp -u "$policy.XXXXXX"); mv "$policy" "$saved"; fi
    restore() { rm -f "$policy"; if [ -n "$saved" ]; then mv "$saved" "$policy"; fi; }
    trap restore EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a list of words
    if ! { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        say "apt-get failed; its whole output is in $log"
        exit 1
    fi
    rm -f "$log"
    restore
    trap - EXIT INT TERM
fi

stamp=.venv/.made-from
want=$(cat requirements.lock pyproject.toml deploy/setup.sh | sha256sum)
if [ ! -x .venv/bin/python ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    say "making .venv (about a minute)"
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "needs Python 3.11 or newer at /usr/bin/python3"; exit 1; }
    /usr/bin/python3 -m venv --clear .venv
    .venv/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
    .venv/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
    # Only bcc from the distribution, not all of its packages.
    ln -sfn /usr/lib/python3/dist-packages/bcc "$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/bcc"
    .venv/bin/python -c 'import bcc' || { say "the bcc module does not load; is python3-bpfcc intact?"; exit 1; }
    printf '%s\n' "$want" >"$stamp"
fi

# bpffs and cgroup2 must be there; neither is made for the host unless it is missing.
grep -q ' cgroup2 ' /proc/mounts || { say "no cgroup2 mount: mount -t cgroup2 none /sys/fs/cgroup"; exit 1; }
