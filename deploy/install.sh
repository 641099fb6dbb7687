#!/bin/sh
# Installs Pillion on a host, or takes it away again. Safe to repeat: what is as it should be is left alone.
#
#   install.sh controller [--listen IP:PORT]… [--advertise IP:PORT]… [--trust-domain NAME]
#   install.sh node --name NAME [--address IP]… [--token FILE] [--workers N]
#   install.sh controller|node --remove [--keep-state]
#   install.sh controller|node --check      what this host can do; changes nothing
#
# Also: --wheel FILE (default: built from this checkout), --wheelhouse DIR (packages come from there, no index is asked),
# --no-start. --listen and --address default to the address this host reaches others from; what is not given stays as it is.
#
# It puts its packages into /opt/pillion, its settings into /etc/pillion, its units into /usr/local/lib/systemd/system,
# and writes down what else it does below /opt/pillion/installed, before it does it: whenever a run is cut short, the next
# one goes on, and --remove undoes.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
root=/opt/pillion etc=/etc/pillion units=/usr/local/lib/systemd/system
record=$root/installed
command_path=/usr/local/bin/pillion
run_lock=/run/pillion-install.lock
changed=no locked=no fresh='' scratch=''

say() { printf 'pillion: %s\n' "$*"; }
did() { changed=yes; say "$*"; }
die() { printf 'pillion: error: %s\n' "$1" >&2; if [ $# -gt 1 ]; then printf '  %s\n' "$2" >&2; fi; exit 1; }
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }

tidy() { # whatever ends this
    if [ -n "$fresh" ]; then rm -f "$fresh"; fi
    if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
    if [ $locked = yes ]; then rm -f $run_lock; fi
}
trap tidy EXIT
trap 'exit 130' HUP INT TERM

role=${1:-}
case $role in controller | node) shift ;; *) usage ;; esac

name='' addresses='' token='' workers='' listen='' advertise='' trust_domain='' wheelhouse='' wheel=''
start=yes action=install keep_state=no
while [ $# -gt 0 ]; do
    option=$1
    case $option in
    --remove) action=remove; shift; continue ;;
    --keep-state) keep_state=yes; shift; continue ;;
    --check) action=check; shift; continue ;;
    --no-start) start=no; shift; continue ;;
    -h | --help) usage ;;
    esac
    [ $# -ge 2 ] || die "$option needs a value, or is unknown" "see: $0 --help"
    case $option in
    --name) name=$2 ;;
    --address) addresses="$addresses $2" ;;
    --token) token=$2 ;;
    --workers) workers=$2 ;;
    --listen) listen="$listen $2" ;;
    --advertise) advertise="$advertise $2" ;;
    --trust-domain) trust_domain=$2 ;;
    --wheelhouse) wheelhouse=$2 ;;
    --wheel) wheel=$2 ;;
    *) die "unknown option $option" "see: $0 --help" ;;
    esac
    shift 2
done
# What these hold ends up in files that systemd splits at spaces
for value in "$name" "$trust_domain" "$workers" $addresses $listen $advertise; do
    case $value in *[!A-Za-z0-9.:\[\]_-]*) die "$value holds a character that no name or address has" ;; esac
done

# ---- which host

supported() {
    [ -r /etc/os-release ] || die "no /etc/os-release: not a system this script knows" "it knows Debian 12, Debian 13 and Ubuntu 24.04"
    # shellcheck disable=SC1091
    found=$(. /etc/os-release && printf '%s %s' "${ID:-}" "${VERSION_ID:-}")
    case $found in
    "debian 12" | "debian 13" | "ubuntu 24.04") ;;
    *) die "this is ${found:-unknown}; package names and kernels differ elsewhere, so nothing was done" \
        "use Debian 12, Debian 13 or Ubuntu 24.04" ;;
    esac
    [ "$(uname -m)" = x86_64 ] || die "this is $(uname -m); the proxy's system call filter is for x86_64"
    [ "$(id -u)" = 0 ] || die "installing a service takes root" "run it with sudo"
    [ -d /run/systemd/system ] || die "systemd does not run here" "on a machine without it, use the lab: make demo"
}

own_address() { ip -o route get "${1:-192.0.2.1}" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p' | head -n 1; }

# ---- pieces

put() { # put FILE MODE, content on standard input; only if it differs
    # Each step says itself what fails: whoever asks `if put` has switched off `set -e` in here
    fresh=$1.new # always the same, so that what a killed run leaves is the next one's
    { rm -f "$fresh" && (umask 077 && cat >"$fresh") && chmod "$2" "$fresh"; } || die "$1 could not be written" "is the disk full?"
    if [ -f "$1" ] && cmp -s "$fresh" "$1" && [ "$(stat -c %a "$1")" = "$2" ]; then rm -f "$fresh"; return 1; fi
    pending
    mv -T "$fresh" "$1" || die "$1 could not be written"
    did "wrote $1"
}

pending() { # before a change that what runs must be restarted for, until all of it was
    : >$record/pending || die "$record/pending could not be written" "is the disk full?"
}

packages() {
    wanted="python3 python3-venv iproute2 ca-certificates"
    [ "$role" = node ] && wanted="$wanted python3-bpfcc libbpf1 linux-libc-dev"
    missing=''
    for package in $wanted; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    did "installing packages:$missing"
    log=$scratch/apt deadline=$(($(date +%s) + APT_WAIT_S))
    until apt update >"$log" 2>&1; do # the lists' lock is not waited for by apt-get itself
        grep -q 'lists/lock' "$log" && [ "$(date +%s)" -lt $deadline ] || apt_failed
        sleep 5
    done
    # shellcheck disable=SC2086
    apt -s install --no-install-recommends $missing >"$log" 2>&1 || apt_failed
    awk '/^Inst / && $3 !~ /^\[/ {print $2}' "$log" >>"$record/packages" # those that are upgraded have their version there
    # shellcheck disable=SC2086
    apt install -y --no-install-recommends $missing >"$log" 2>&1 || apt_failed
}

APT_WAIT_S=900 # on its first boot a host upgrades itself
apt() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=$APT_WAIT_S "$@"; }
apt_failed() { tail -n 15 "$log" >&2; die "apt-get failed: see above"; }

user() { # user NAME
    getent passwd "$1" >/dev/null && return 0
    echo "$1" >>"$record/users"
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$1"
    did "made the user $1"
}

environment() { # the venv, one for each content, and `current` points at it: an upgrade is one rename
    lock=$here/deploy/requirements.lock
    [ -r "$lock" ] || die "no requirements.lock beside this script" "run it from a checkout or an unpacked release"
    if [ -z "$wheel" ] && [ -n "$wheelhouse" ]; then wheel=$(find "$wheelhouse" -name 'pillion-*.whl' | sort | tail -n 1); fi
    if [ -n "$wheel" ]; then
        [ -r "$wheel" ] || die "no wheel $wheel"
        made_from=$(sha256sum <"$wheel")
    else
        made_from=$(cd "$here" && find pyproject.toml README.md LICENSE mesh nodeagent l7proxy controller pillion lab bpf \
            -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    fi
    mark=$(printf '%s %s %s' "$made_from" "$(sha256sum <"$lock")" "$(/usr/bin/python3 -V)" | sha256sum | cut -c1-16)
    venv=$root/venv-$mark
    if [ ! -e "$venv/.complete" ]; then
        did "making $venv (about a minute)"
        rm -rf "$venv"
        /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs Python 3.11 or newer at /usr/bin/python3"
        # pip as the distribution packs it for venvs, run from its archive: the venv itself has none, and needs none
        pip=$(find /usr/share/python-wheels -name 'pip-*.whl' | sort | tail -n 1)
        [ -n "$pip" ] || die "no pip in /usr/share/python-wheels" "is python3-venv intact? apt-get install --reinstall python3-pip-whl"
        /usr/bin/python3 -m venv --without-pip "$venv"
        options='' PIP_NO_CACHE_DIR=1 # in nobody's home
        export PIP_NO_CACHE_DIR
        if [ -n "$wheelhouse" ]; then
            options="--no-index --find-links $(cd "$wheelhouse" && pwd)"
            PIP_NO_INDEX=1 PIP_FIND_LINKS=$(cd "$wheelhouse" && pwd)
            export PIP_NO_INDEX PIP_FIND_LINKS # for what the wheel is built with, too
        fi
        # shellcheck disable=SC2086
        "$venv/bin/python" "$pip/pip" install -q --disable-pip-version-check --no-deps --only-binary :all: --require-hashes $options -r "$lock" ||
            die "pip could not install the packages" "without a package index: --wheelhouse DIR with the wheels of deploy/requirements.lock and build.lock"
        [ -n "$wheel" ] || wheel=$(PYTHON=$venv/bin/python PIP=$pip/pip "$here/deploy/wheel.sh" "$scratch") || die "the wheel could not be built"
        "$venv/bin/python" "$pip/pip" install -q --disable-pip-version-check --no-deps --no-index "$wheel" || die "pip could not install $wheel"
        # The distribution's bcc, and not all of its packages
        ln -sfn /usr/lib/python3/dist-packages/bcc "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/bcc"
        touch "$venv/.complete"
    fi
    if [ "$(readlink "$root/current" 2>/dev/null)" != "$venv" ]; then
        ln -sfn "$venv" "$root/.current"
        pending
        mv -T "$root/.current" "$root/current"
        new_code=yes
        did "$root/current is $venv"
    fi
    if [ ! -L $command_path ]; then
        mkdir -p "$(dirname $command_path)"
        ln -s $root/current/bin/pillion $command_path
        did "linked $command_path"
    fi
}

own_command() {
    [ "$(readlink $command_path 2>/dev/null)" = $root/current/bin/pillion ] || { [ ! -e $command_path ] && [ ! -L $command_path ]; } ||
        die "$command_path is there and not ours, so nothing was done" "move it away, then run this again"
}

old_environments() { # after the restart: processes may import late
    for old in "$root"/venv-*; do
        [ -d "$old" ] && [ "$old" != "$(readlink $root/current)" ] || continue
        if grep -qsF "$old/" /proc/[0-9]*/maps; then
            say "kept $old: open connections still go through a proxy of it; the next run removes it"
        else
            rm -rf "$old"
            did "removed $old"
        fi
    done
}

unit_files() {
    case $role in
    controller) echo pillion-controller.service ;;
    node) echo pillion.slice pillion-agent.slice pillion-proxy.slice run-pillion-bpf.mount pillion-agent.service pillion-proxy.service ;;
    esac
}

install_units() {
    mkdir -p $units
    for unit in $(unit_files); do
        if put "$units/$unit" 644 <"$here/deploy/systemd/$unit"; then new_units="$new_units $unit"; fi
    done
    if [ "$role" = controller ]; then # where the command line looks for a host's controller
        put /etc/tmpfiles.d/pillion.conf 644 <<-T || [ ! -L /run/pillion/controller.sock ] || return 0
		d /run/pillion 0755 root root -
		L /run/pillion/controller.sock - - - - ../pillion-controller/controller.sock
		T
        systemd-tmpfiles --create /etc/tmpfiles.d/pillion.conf
    fi
}

earlier() { # earlier FILE OPTION: its values, as a run before this wrote them
    { grep -s '^PILLION_[A-Z]*_OPTIONS=' "$etc/$1" || :; } | grep -oE -e "$2 [^ ]+" | cut -d' ' -f2 | tr '\n' ' '
}

settings_controller() {
    [ -n "$listen$advertise$trust_domain" ] || [ ! -e $etc/controller.env ] || return 0
    [ -n "$listen" ] || listen=$(earlier controller.env --listen)
    [ -n "$advertise" ] || advertise=$(earlier controller.env --advertise)
    [ -n "$trust_domain" ] || trust_domain=$(earlier controller.env --trust-domain)
    [ -n "$listen" ] || listen=$(own_address):15443
    [ "$listen" != ":15443" ] || die "this host has no address to be reached at" "give --listen IP:15443"
    options=''
    for each in $listen; do options="$options --listen $each"; done
    for each in $advertise; do options="$options --advertise $each"; done
    for each in $trust_domain; do options="$options --trust-domain $each"; done
    put $etc/controller.env 644 <<-S && new_settings=yes
	# Options of pillion-controller; read at its start
	PILLION_CONTROLLER_OPTIONS=${options# }
	S
    return 0
}

settings_node() {
    if [ -z "$name$addresses" ] && [ -e $etc/agent.env ]; then :; else
        [ -n "$name" ] || name=$(sed -n 's/^PILLION_NODE=//p' $etc/agent.env 2>/dev/null || :)
        [ -n "$name" ] || name=$(hostname -s | tr 'A-Z_' 'a-z-')
        [ -n "$addresses" ] || addresses=$(earlier agent.env --address)
        [ -n "$addresses" ] || addresses=$(own_address)
        [ -n "$addresses" ] || die "this host has no address of its own" "give --address IP"
        options=''
        for each in $addresses; do options="$options --address $each"; done
        put $etc/agent.env 644 <<-S && new_settings=yes
	# Read at the start of pillion-agent
	PILLION_NODE=$name
	PILLION_AGENT_OPTIONS=${options# }
	S
    fi
    if [ -n "$workers" ] || [ ! -e $etc/proxy.env ]; then
        put $etc/proxy.env 644 <<-S && new_proxy=yes
	# Read at the start of pillion-proxy
	PILLION_PROXY_OPTIONS=${workers:+--workers $workers}
	S
    fi
    if [ -n "$token" ]; then
        secret=$(cat "$token") && [ -n "$secret" ] || die "no token in $token" "on the controller: pillion node token ${name:-NAME}"
        put $etc/join-token 600 <<-T && new_settings=yes
	$secret
	T
    elif [ ! -e $etc/join-token ]; then
        put $etc/join-token 600 </dev/null || :
    fi
    [ -e $etc/workloads.yaml ] || put $etc/workloads.yaml 600 <<-S || :
	# Written by pillion enrol and pillion withdraw; watched by the agent
	workloads: []
	S
}

needs_start() { case $(systemctl is-active "$1") in active | activating) return 1 ;; esac; }

begin() {
    [ -z "$new_units$unfinished" ] || systemctl daemon-reload
    case $role in controller) wanted=pillion-controller.service ;; node) wanted="pillion-proxy.service pillion-agent.service" ;; esac
    for unit in $wanted; do
        if [ "$(systemctl is-enabled "$unit" 2>/dev/null)" != enabled ]; then systemctl -q enable "$unit"; did "enabled $unit"; fi
    done
    [ $start = yes ] || return 0
    started=''
    for unit in $wanted; do
        needs_start "$unit" || continue
        # The agent is not ready before the node has joined: its start is not waited for here
        systemctl start --no-block "$unit"
        started="$started $unit"
        did "started $unit"
    done
    # One after the other: while the agent is away the proxy goes on with what it has, and a new proxy gets all from an agent.
    # The other role of this host runs from the same environment, whose predecessor goes: it moves to the new one as well.
    for unit in pillion-controller.service pillion-agent.service pillion-proxy.service; do
        case " $started " in *" $unit "*) continue ;; esac
        case " $wanted " in
        *" $unit "*)
            why=$unfinished$new_code$new_settings
            [ "$unit" = pillion-proxy.service ] && why=$unfinished$new_code$new_proxy
            case " $new_units " in *" $unit "*) why=${why}yes ;; esac ;;
        *) why=$unfinished$new_code; [ -e "$units/$unit" ] && ! needs_start "$unit" || why='' ;;
        esac
        if [ -n "$why" ]; then restarted "$unit"; fi
    done
    settled "$wanted"
    rm -f $record/pending
}

restarted() { # restarted UNIT: until it is ready, if it was before
    was=$(systemctl is-active "$1") || :
    former=$(systemctl show -P InvocationID "$1")
    systemctl restart --no-block "$1"
    did "restarted $1"
    [ "$was" != active ] || settled "$1" "$former"
}

ready() { # ready UNIT [FORMER]: it is, and is not that invocation any more
    [ -z "${2:-}" ] || [ "$(systemctl show -P InvocationID "$1")" != "$2" ] || return 1
    [ "$(systemctl is-active "$1")" = active ]
}

settled() { # settled UNITS [FORMER]: until each is ready, or is known to wait for something
    wait=${PILLION_INSTALL_WAIT_S:-120} # more for a machine in emulation
    for waited in $1; do
        deadline=$(($(date +%s) + wait))
        until ready "$waited" "${2:-}"; do
            status=$(systemctl show -P StatusText "$waited")
            if [ "$waited" = pillion-agent.service ] && [ ! -s $etc/join-token ] && [ ! -e /var/lib/pillion-agent/home.json ]; then
                say "the node has not joined yet: on the controller run \`pillion node token ${name:-NAME}\`, here \`$0 node --token FILE\`"
                continue 2
            fi
            case $status in *"compiling for this kernel"*) deadline=$(($(date +%s) + wait)) ;; esac # the agent itself limits that
            [ "$(date +%s)" -lt $deadline ] || die "$waited is not ready after $wait s: ${status:-no reason given}" "see: journalctl -u $waited"
            sleep 1
        done
    done
}

# ---- the three actions

check() {
    command -v python3 >/dev/null || die "no python3 here to look at this host with" "apt-get install python3; installing does that itself"
    exec python3 "$here/pillion/preflight.py" "$role"
}

alone() { # one of these at a time
    while :; do
        exec 9>$run_lock
        flock -n 9 || { say "another install.sh is at work here; waiting for it"; flock 9; }
        [ /proc/$$/fd/9 -ef $run_lock ] && break # or the one that had it has taken it away
    done
    locked=yes
    scratch=$(mktemp -d)
}

install() {
    supported
    alone
    own_command
    new_code='' new_units='' new_settings='' new_proxy='' unfinished=''
    umask 022
    mkdir -p $record $etc
    [ -e $record/$role ] || : >$record/$role
    if [ -e $record/pending ]; then
        unfinished=yes
        did "what an earlier run changed is not in use yet: all is restarted"
    fi
    packages
    case $role in controller) user pillion-controller ;; node) user pillion-proxy ;; esac
    environment
    settings_$role
    install_units
    begin
    old_environments
    [ $changed = yes ] && say "done: $role" || say "nothing to do: $role is installed and runs as it should"
}

withdraw_all() {
    # Nothing is enrolled before that file is there
    [ -x $root/current/bin/pillion ] && [ -e $etc/workloads.yaml ] || return 0
    $root/current/bin/pillion withdraw --all || die "enrolled units could not be withdrawn" "see the message above"
}

remove() {
    supported
    alone
    other=controller
    [ $role = controller ] && other=node
    # Without any role it is what a run left that was cut short
    if [ ! -e $record/$role ] && { [ -e $record/$other ] || [ ! -e $record ]; }; then
        say "nothing to do: no $role is installed here"
        return 0
    fi
    if [ "$role" = node ]; then
        withdraw_all
        group=/sys/fs/cgroup/pillion.slice
        if grep -qs 'populated 1' $group/workloads/cgroup.events; then
            echo 1 >$group/workloads/cgroup.kill # without the agent no policy would hold them
            did "ended the programs of \`pillion run\`"
        fi
        systemctl -q disable --now pillion-agent.service pillion-proxy.service 2>/dev/null || :
        # What drains ends here
        if [ -e $group/pillion-proxy.slice/cgroup.kill ]; then echo 1 >$group/pillion-proxy.slice/cgroup.kill; fi
        for _ in 1 2 3 4 5 6 7 8 9 10; do grep -qs 'populated 1' $group/*/cgroup.events || break; sleep 0.5; done
        did "stopped agent and proxy"
        # Links and maps are gone with their file system, and with the links all enforcement
        systemctl stop run-pillion-bpf.mount 2>/dev/null || :
        ! mountpoint -q /run/pillion/bpf || umount /run/pillion/bpf ||
            die "/run/pillion/bpf is in use, and so are the programs in it" "see: fuser -vm /run/pillion/bpf; then run this again"
        for veth in $(ip -o link show type veth 2>/dev/null | sed -n 's/^[0-9]*: \([^@:]*\).*/\1/p'); do
            tc filter show dev "$veth" ingress 2>/dev/null |
                sed -n 's/.* pref \([0-9]*\) bpf .* handle \(0x[0-9a-f]*\) .*pillion-veth .*/\1 \2/p' >"$scratch/filters"
            [ -s "$scratch/filters" ] || continue
            while read -r preference handle; do
                tc filter del dev "$veth" ingress protocol all prio "$preference" handle "$handle" bpf || :
            done <"$scratch/filters"
            [ -n "$(tc filter show dev "$veth" ingress; tc filter show dev "$veth" egress)" ] || tc qdisc del dev "$veth" clsact || :
        done
        systemctl stop pillion-agent.slice pillion-proxy.slice pillion.slice 2>/dev/null || :
        if [ -d $group ]; then find $group -depth -type d -exec rmdir {} + 2>/dev/null || :; fi
        states=/var/lib/pillion-agent settings="agent.env proxy.env join-token workloads.yaml"
    else
        systemctl -q disable --now pillion-controller.service 2>/dev/null || :
        did "stopped the controller"
        rm -f /etc/tmpfiles.d/pillion.conf /etc/tmpfiles.d/pillion.conf.new /run/pillion/controller.sock
        rm -rf /run/pillion-controller
        states=/var/lib/pillion-controller settings=controller.env
    fi
    for unit in $(unit_files); do rm -f "$units/$unit" "$units/$unit.new"; done
    systemctl daemon-reload
    for unit in $(unit_files); do systemctl reset-failed "$unit" 2>/dev/null || :; done
    for file in $settings; do rm -f "$etc/$file" "$etc/$file.new"; done
    if [ $keep_state = yes ]; then say "kept $states"; else rm -rf $states; fi
    did "removed units, settings and state of the $role"
    # What says that there is something to remove goes last
    if [ -e $record/$other ]; then rm -f $record/$role; else remove_rest; fi
}

remove_rest() { # the last role takes everything with it
    [ ! -e $etc ] || rmdir $etc 2>/dev/null || say "kept $etc: it holds files that are not ours"
    rm -rf /run/pillion
    [ "$(readlink $command_path 2>/dev/null)" != $root/current/bin/pillion ] || rm -f $command_path
    if [ -e $record/users ]; then
        for each in $(sort -u $record/users); do
            getent passwd "$each" >/dev/null || continue
            said=$(userdel "$each" 2>&1) || die "the user $each could not be removed: $said" "then run this again"
            say "removed the user $each"
        done
    fi
    if [ -s $record/packages ]; then
        log=$scratch/apt
        # As many of them as are there: an install that was cut short had not come to all
        sort -u $record/packages | while read -r each; do
            ! dpkg-query -W -f '${Status}' "$each" 2>/dev/null | grep -q ' installed$' || echo "$each"
        done >"$scratch/ours"
        # shellcheck disable=SC2046
        others=$(apt-get -s purge $(cat "$scratch/ours") 2>/dev/null | awk '/^(Purg|Remv) / {print $2}' | sort -u | comm -23 - "$scratch/ours")
        if [ -n "$others" ]; then
            say "kept the packages it had installed: $(echo $others) need them by now"
        elif [ -s "$scratch/ours" ]; then
            # shellcheck disable=SC2046
            apt purge -y $(cat "$scratch/ours") >"$log" 2>&1 || apt_failed
            say "removed the packages it had installed"
        fi
    fi
    rmdir $units "$(dirname $units)" 2>/dev/null || :
    find $root -mindepth 1 -maxdepth 1 ! -name installed -exec rm -rf {} +
    rm -rf $record
    rmdir $root
    did "removed $root"
}

$action
