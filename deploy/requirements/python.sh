#!/bin/sh
# Law: a Python counts only after it ran. Version managers leave stand-ins on PATH that exist and
# exit 127, so no path and no name is believed.
#
# Prints the chosen interpreter's path; says on stderr which it is and why. Where there is none:
# one sentence with the remedy, exit code 2. PYTHON=/path/to/python overrides the search;
# SYSROOT=/other/root looks in another system's usual places.
#
# Why these two versions: OpenFHE's wheels are tagged for any Python but hold modules for 3.10, and
# for 3.12 with glibc 2.38 or newer. On others they install and then fail at the first import.
set -eu

# One line: version, glibc as a sortable number, what is missing, path.
probe() {
    "$1" -c '
import importlib.util, os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
try:
    major, minor = os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")[:2]
    glibc = int(major) * 1000 + int(minor)
except (AttributeError, ValueError):
    glibc = 0
lacks = "-"
if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
    lacks = "python%s-venv" % version
elif not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    lacks = "python%s-dev" % version
print(version, glibc, lacks, sys.executable)
' 2>/dev/null </dev/null
}

choose() {
    printf '%-14s Python %s\n' setup "$1" >&2
}

fail() {
    echo "$1" >&2
    exit 2
}

# take WANTED CANDIDATE: sets `found`, or `reason` (why a near miss does not do).
take() {
    facts=$(probe "$2") || return 1
    # shellcheck disable=SC2086
    set -- "$1" $facts # the path, last and maybe with spaces, is cut out again below
    [ "$2" = "$1" ] || return 1
    if [ "$4" != - ]; then
        reason="Python $2 is here but cannot make a virtual environment that builds: apt-get install $4"
        return 1
    fi
    if [ "$2" = 3.12 ] && [ "$3" -lt 2038 ]; then
        reason=${reason:-"Python 3.12 is here but OpenFHE loads on it only with glibc 2.38 or newer: install Python 3.10 (pyenv install 3.10), or name one with PYTHON=/path/to/python3.10"}
        return 1
    fi
    found=${facts#"$2 $3 $4 "}
}

search() {
    versions=${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}/versions
    for candidate in "python$1" "$versions/$1".*/bin/"python$1" \
        "${SYSROOT:-}/usr/local/bin/python$1" "${SYSROOT:-}/opt/python$1/bin/python$1" python3; do
        take "$1" "$candidate" && return 0
    done
    return 1
}

found='' reason=''

[ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "the locked set-up is for Linux on x86_64, this is $(uname -sm): in a virtual environment of your own, pip install -e '.[ui]'"

if [ -n "${PYTHON:-}" ]; then
    facts=$(probe "$PYTHON") || fail "PYTHON=$PYTHON does not run: name a Python 3.10 or 3.12, or leave PYTHON out"
    version=${facts%% *}
    case $version in
    3.10 | 3.12) ;;
    *) fail "PYTHON=$PYTHON is Python $version, but the locked packages are for 3.10 and 3.12: name one of these, or leave PYTHON out" ;;
    esac
    if ! take "$version" "$PYTHON"; then
        case $reason in
        *glibc*) ;; # asked for by name: it serves, without encryption
        *) fail "$reason" ;;
        esac
        choose "$version ($PYTHON): as asked; encryption will not load, glibc is older than 2.38"
        found=${facts#* * * }
    else
        choose "$version ($found): as asked"
    fi
elif search 3.10; then
    choose "3.10 ($found): the first version that OpenFHE has a wheel for"
elif search 3.12; then
    choose "3.12 ($found): no 3.10 here, and glibc is new enough for OpenFHE's wheel"
else
    fail "${reason:-"no fitting Python is here: install Python 3.10 (apt-get install python3.10-venv python3.10-dev where the distribution has it, else pyenv install 3.10), or name one with PYTHON=/path/to/python3.10"}"
fi
echo "$found"
