#!/bin/sh
# after.sh carried|left, on a machine of the Vagrant lab: says in its last line what was seen, exits 0 only if it should be so.
#   carried   on n2: the kernel carries requests of one connection, from a client to a service of this host
#   left      after install.sh ROLE --remove: nothing of it, but what an operator (or deploy/shop.sh) put there
set -eu

carried() { # a service that is here alone; again while the agent is late to pair a connection that does not last long
    pillion express status -o json >/tmp/before
    for _ in 1 2 3 4 5; do
        # shellcheck disable=SC2046 # words
        pillion run --service client --namespace shop -- curl -sS $(yes http://front.shop.mesh/who | head -n 2000) >/dev/null
        pillion express status -o json >/tmp/after
        python3 -c '
import json, sys
before, after = (next(iter(json.load(open(each)).values())) for each in ("/tmp/before", "/tmp/after"))
more = after["carried"]["requests"] - before["carried"]["requests"]
print("express:", "on" if after["on"] and more > 0 else after)
sys.exit(more <= 0)' && return
    done
    exit 1
}

left() {
    stamp=/etc/machine-id # written at boot
    { # files that are newer than that, or ours by their name; users, groups; units; cgroups; mounts; filters of traffic
        find /etc /opt /usr /var -xdev ! -type d -cnewer $stamp ! -path '*shop*' \
            ! -path '/var/log/*' ! -path '/var/cache/*' ! -path '/var/lib/systemd/*' ! -path '/var/lib/dpkg/*' ! -path '/var/lib/apt/*' ! -path '/var/lib/redis/*' ! -path '/var/lib/mysql/*' ! -path '/usr/lib/mysql/*' ! -path '/var/lib/ubuntu-advantage/*' \
            ! -path '/etc/rc?.d/*' ! -path /etc/ld.so.cache ! -path /etc/mtab ! -name .updated ! -path $stamp ! -regex '/etc/\(\.pwd\.lock\|passwd\|g?shadow\|group\|sub[ug]id\)-?'
        find /etc /opt /usr /var /run /dev /tmp /sys/fs/bpf /sys/fs/cgroup -iname '*pillion*' -cnewer $stamp ! -name '*pillion-lab-tokens*' \
            ! -path '/var/log/*' ! -path '/var/cache/*'
        getent passwd | grep pillion || :
        getent group | grep pillion || :
        systemctl list-units --all --plain --no-legend '*pillion*' | grep -v pillion-lab-tokens || :
        systemctl list-unit-files --plain --no-legend '*pillion*' | grep -v pillion-lab-tokens || :
        awk '$5 ~ /pillion/' /proc/self/mountinfo
        for each in /sys/class/net/*; do tc filter show dev "${each##*/}" ingress; done | grep pillion || :
    } >/tmp/left 2>&1
    [ ! -s /tmp/left ] || { cat /tmp/left; exit 1; }
    echo "nothing is left"
}

$1
