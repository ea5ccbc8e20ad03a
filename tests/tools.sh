#!/bin/sh
# Installs what tests run and pip does not bring, where it is missing: tests/tools.sh PROGRAM=DEBIAN_PACKAGE ...
# A program that is there already, from wherever, is taken as it is.
set -eu
packages=
for wanted in "$@"; do
    command -v "${wanted%%=*}" >/dev/null || packages="$packages ${wanted#*=}"
done
[ -n "$packages" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "The tests need these packages:$packages. As root on Debian: apt-get install$packages" >&2
    exit 1
fi

# Runs apt-get once no other apt holds one of its locks: ten minutes at most. Of three locks apt itself waits for one.
apt() {
    seconds=600
    until said=$(LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get "$@" 2>&1); do
        case $said in *"Could not get lock"*) ;; *) seconds=0 ;; esac
        if [ "$seconds" -eq 0 ]; then
            echo "$said" >&2
            return 1
        fi
        [ "$seconds" -ne 600 ] || echo "another apt runs: waiting for it"
        seconds=$((seconds - 1))
        sleep 1
    done
}

echo "installing$packages"
apt update -qq
# The word-splitting is meant: one argument a package.
# shellcheck disable=SC2086
apt install --yes -qq --no-install-recommends $packages
