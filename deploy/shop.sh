#!/bin/sh
# shop.sh controller|n1|n2: the demo's shop (lab/demo) as systemd services of installed hosts, for the Vagrant lab. On
# n2, the last, it ends with the demo's table and exits 0 only if each thing was seen. Safe to repeat.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
services=$here/lab/demo/services
say() { printf 'shop: %s\n' "$*"; }

controller() {
    grants=''
    for node in n1 n2; do
        grants="$grants
---
{apiVersion: mesh.pillion.dev/v1alpha1, kind: NodeGrant, metadata: {name: $node-shop}, spec: {node: $node, serviceAccounts: [shop/*]}}"
    done
    { cat "$here/lab/demo/shop.yaml"; printf '%s\n' "$grants"; } | pillion apply -f -
    # Of a lab: who asks from the lab's network for a node's token gets one. An operator carries it by hand.
    systemctl is-active -q pillion-lab-tokens.service ||
        systemd-run -q --unit=pillion-lab-tokens --collect /usr/bin/python3 "$here/deploy/tokens.py" 8077
    say "resources applied, tokens on port 8077"
}

user() { getent passwd "$1" >/dev/null || useradd --system --user-group --no-create-home --shell /usr/sbin/nologin "$1"; }

service() { # service NAME COMMAND…: a unit with a user of its own
    name=shop-$1
    shift
    user "$name"
    cat >"/etc/systemd/system/$name.service" <<U
[Unit]
Description=The shop: $name
[Service]
User=$name
ExecStart=$*
Restart=on-failure
RuntimeDirectory=$name
[Install]
WantedBy=multi-user.target
U
    systemctl daemon-reload
    systemctl -q enable "$name.service"
}

enrolled() { # enrolled NAME ACCOUNT PORT [VERSION]
    pillion enrol "shop-$1.service" --as "shop/$2" --port "$3" ${4:+--label version=$4}
    systemctl start "shop-$1.service"
}

apt_install() {
    missing=''
    for package; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
    done
    [ -z "$missing" ] || DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >/dev/null
}

off() { for unit; do systemctl -q disable --now "$unit" 2>/dev/null || :; done; } # what a package started by itself

catalog() { # catalog NAME VERSION PORT
    install -D -m 755 "$services/catalog.py" /usr/local/lib/shop/catalog.py
    service "$1" /usr/bin/python3 /usr/local/lib/shop/catalog.py "$@"
    enrolled "$1" catalog "$3" "$2"
}

mariadb() {
    user shop-mariadb
    data=/var/lib/shop-mariadb small="--innodb-log-file-size=4M --innodb-buffer-pool-size=16M --skip-log-bin"
    if [ ! -d $data ]; then # there only when it is whole
        rm -rf $data.new
        install -d -m 700 -o shop-mariadb -g shop-mariadb $data.new
        # shellcheck disable=SC2086 # words
        mariadb-install-db --no-defaults --datadir=$data.new --user=shop-mariadb --skip-test-db --skip-name-resolve --force \
            --auth-root-authentication-method=normal $small >/dev/null
        mv -T $data.new $data
    fi
    install -D -m 644 "$services/shop.sql" /usr/local/lib/shop/shop.sql
    service mariadb /usr/sbin/mariadbd --no-defaults --datadir=$data --socket=/run/shop-mariadb/sock --pid-file=/run/shop-mariadb/pid \
        --port=3306 '--bind-address=*' --skip-name-resolve --init-file=/usr/local/lib/shop/shop.sql "$small"
    enrolled mariadb mariadb 3306
}

n1() {
    apt_install mariadb-server
    off mariadb.socket mariadb
    mariadb
    catalog catalog-v1b v1 8000
    catalog catalog-v2 v2 8001
}

n2() {
    apt_install nginx-light redis-server redis-tools mariadb-client curl python3-scapy
    off nginx redis-server
    service redis /usr/bin/redis-server --bind '*' -::* --port 6379 --protected-mode no --save '""' --appendonly no --dir /run/shop-redis
    enrolled redis redis 6379
    catalog catalog-v1a v1 8000
    sed 's#@DIR@#/run/shop-front#' "$services/nginx.conf" >/usr/local/lib/shop/nginx.conf
    service front /usr/sbin/nginx -c /usr/local/lib/shop/nginx.conf -e stderr
    enrolled front front 8080
    other=${OTHER:-192.168.56.11}
    own=$(ip -o route get "$other" | sed -n 's/.* src \([^ ]*\).*/\1/p')
    /opt/pillion/current/bin/python -P -m lab.demo --hosts "n2=$own,n1=$other"
}

case ${1:-} in
controller | n1 | n2) [ "$(id -u)" = 0 ] || { say "run it as root"; exit 1; }; $1 ;;
*) sed -n '2,3s/^# //p' "$0" >&2; exit 2 ;;
esac
