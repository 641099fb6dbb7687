#!/bin/sh
# shop.sh controller|n1|n2: the demo's shop (lab/demo) as systemd services of installed hosts, for the Vagrant lab. On
# n2, the last, it shows what the mesh does and exits 0 only if each thing was seen. Safe to repeat.
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
    # MariaDB is left to the demo: its data directory would be all that these machines show of it
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

catalog() { # catalog NAME VERSION
    install -D -m 755 "$services/catalog.py" /usr/local/lib/shop/catalog.py
    service "$1" /usr/bin/python3 /usr/local/lib/shop/catalog.py "$1" "$2" 8000
    enrolled "$1" catalog 8000 "$2"
}

n1() {
    apt_install nginx-light redis-server
    systemctl -q disable --now nginx redis-server 2>/dev/null || :
    service redis /usr/bin/redis-server --bind '*' -::* --port 6379 --protected-mode no --save '""' --appendonly no --dir /run/shop-redis
    enrolled redis redis 6379
    catalog catalog-v1a v1
    install -d /usr/local/lib/shop
    sed 's#@DIR@#/run/shop-front#' "$services/nginx.conf" >/usr/local/lib/shop/nginx.conf
    service front /usr/sbin/nginx -c /usr/local/lib/shop/nginx.conf -e stderr
    enrolled front front 8080
}

failures=0
seen() { # seen TITLE WANTED COMMAND…: whether the output has WANTED in it
    title=$1 wanted=$2
    shift 2
    out=$(timeout 30 "$@" 2>&1 | grep -v '^pillion: .* runs as' | tr '\n' ' ') || :
    case $out in *"$wanted"*) state=ok ;; *) state=NOT failures=$((failures + 1)) ;; esac
    printf '%-4s %-58s %.120s\n' "$state" "$title" "$out"
}
client="pillion run --service client --namespace shop --" intruder="pillion run --service intruder --namespace shop --"

# shellcheck disable=SC2086 # words
n2() {
    apt_install redis-tools curl
    catalog catalog-v2 v2
    peer=${PEER:-192.168.56.11}
    say "what the mesh does, from n2 ($(uname -r)):"
    seen "a service on this node" '"by": "catalog-v2"' $client curl -sS -m 10 http://catalog-v2.shop.mesh/items
    seen "a service on the other node, by mutual TLS" '"by": "catalog-v1a"' $client curl -sS -m 10 http://catalog-v1.shop.mesh/items
    seen "nginx on the other node, and back to a catalog" '"by": "catalog' $client curl -sS -m 10 http://front.shop.mesh/catalog/items
    seen "redis on the other node" PONG $client redis-cli -h redis.shop.mesh ping
    seen "who may look may not administer" 403 $intruder curl -sS -m 10 -o /dev/null -w '%{http_code}' http://catalog.shop.mesh/admin
    seen "an intruder at redis" refused $intruder sh -c 'redis-cli -h redis.shop.mesh ping || echo refused'
    seen "from outside the mesh, past it" refused sh -c "curl -sS -m 3 http://$peer:8000/items || echo refused"
    [ $failures = 0 ] || { say "$failures not seen"; exit 1; }
    say "all of it was seen"
}

case ${1:-} in
controller | n1 | n2) [ "$(id -u)" = 0 ] || { say "run it as root"; exit 1; }; $1 ;;
*) sed -n '2,3s/^# //p' "$0" >&2; exit 2 ;;
esac
