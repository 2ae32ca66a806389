#!/bin/sh
# Law: systemd says nothing about our units. An unknown or misspelt key is only a warning to it (exit
# code 0), so any word of output fails.
#
# verify.sh [BIN]: checks copies in which /opt/metisfl/bin is BIN (default: this checkout's
# .venv/bin), since a program that is not there would be a complaint too.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
bin=$(cd "${1:-$here/../../.venv/bin}" && pwd)

command -v systemd-analyze >/dev/null || {
    echo 'systemd-analyze is missing: apt-get install systemd' >&2
    exit 2
}

copies=$(mktemp -d)
trap 'rm -rf "$copies"' EXIT
ln -s "$bin" "$copies/bin" # a path without spaces, whatever the checkout's is
for unit in "$here"/*.service; do
    sed "s|/opt/metisfl/bin/|$copies/bin/|" "$unit" >"$copies/${unit##*/}"
done

said=$(systemd-analyze verify --man=no "$copies"/*.service 2>&1) || said=${said:-"exit code $?"}
[ -z "$said" ] || {
    printf '%s\n' "$said" >&2
    exit 1
}
