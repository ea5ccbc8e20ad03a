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
echo "installing$packages"
apt-get update -qq
# The word-splitting is meant: one argument a package.
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends $packages >/dev/null
