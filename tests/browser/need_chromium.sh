#!/bin/sh
# Make sure that there is a Chromium for the browser tests: one that CHROMIUM names, one that is installed, or, as root
# on Debian and its kin, one from the distribution. Playwright's own download is not used.
set -eu

if [ -n "${CHROMIUM:-}" ]; then
    [ -x "$CHROMIUM" ] && exit 0
    echo "CHROMIUM=$CHROMIUM is no program. Give the path of a Chromium, or leave CHROMIUM out." >&2
    exit 1
fi
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >&2 && exit 0
    echo "apt-get could not install chromium. Install a Chromium by hand, or set CHROMIUM to its path." >&2
    exit 1
fi
echo "The browser tests need a Chromium, and there is none. Install it (on Debian and Ubuntu: sudo apt install chromium)," \
    "or set CHROMIUM to its path." >&2
exit 1
