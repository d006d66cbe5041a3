#!/usr/bin/env bash
# What happens on a machine with accelerators: install, start a run that outlives the login, look at it, stop it.
# launch/tpu.sh calls this on every worker of a slice; on a machine of your own, call it yourself:
#
#   launch/worker.sh setup tpu|cuda12|cuda13            Python and spin_jax with that extra, in .venv of this checkout
#   launch/worker.sh start --config=... --workdir=...   spin_jax.main with these flags, in the background
#   launch/worker.sh status                             HOST running | HOST exit STATUS | HOST none
#   launch/worker.sh stop                               asks the run to save and to end, with exit status 75
#
# With HF_SECRET=NAME in the environment a run gets HF_TOKEN from Google's Secret Manager. The token is on no command
# line, in no file and in no log.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=$HOME/spin_jax_run # log: all that runs print; pid, exit: of the last run; lock: held while a run lives

setup() {
    cd "$checkout"
    # uv brings a newer Python where there is none: images of TPU machines have 3.10.
    local uv=$state/uv/bin/uv
    if command -v uv >/dev/null; then
        uv=uv
    elif [ ! -x "$uv" ]; then
        python3 -m pip install --quiet --target "$state/uv" uv
    fi
    "$uv" venv --quiet --allow-existing --python '>=3.11,<3.14' .venv
    "$uv" pip install --quiet --python .venv --editable ".[$1]"
}

start() {
    mkdir -p "$state"
    exec 9>"$state/lock"
    if ! flock --nonblock 9; then
        echo "$(hostname): a run is going on already" >&2
        exit 2
    fi
    rm -f "$state/exit"
    # A session of its own, which the end of this login does not end. It inherits the lock.
    setsid "$checkout/launch/worker.sh" run "$@" >>"$state/log" 2>&1 </dev/null &
}

run() {
    cd "$checkout"
    trap 'echo $? >"$state/exit"' EXIT
    # A machine that shuts down sends SIGTERM to the program, too, which saves: wait for the status of that.
    trap : TERM
    if [ -n "${HF_SECRET:-}" ]; then
        HF_TOKEN=$(gcloud secrets versions access latest --secret="$HF_SECRET")
        export HF_TOKEN
    fi
    (
        echo "$BASHPID" >"$state/pid"
        exec .venv/bin/python -m spin_jax.main "$@"
    )
}

running() {
    [ -e "$state/lock" ] && ! flock --nonblock "$state/lock" true
}

status() {
    if running; then
        echo "$(hostname) running"
    elif [ -e "$state/exit" ]; then
        echo "$(hostname) exit $(cat "$state/exit")"
    else
        echo "$(hostname) none"
    fi
}

stop() {
    if running; then
        kill "$(cat "$state/pid")"
    fi
}

case ${1:-} in
    setup | start | run | status | stop) "$@" ;;
    *)
        echo "usage: launch/worker.sh setup EXTRA | start FLAGS | status | stop" >&2
        exit 2
        ;;
esac
