#!/usr/bin/env bash
# Cloud TPUs from your own machine; docs/tpu.md tells the whole story. Written for bash 3.2, which macOS has, and later.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'USAGE'
usage: launch/tpu.sh COMMAND --name=NAME --zone=ZONE --project=PROJECT [OPTIONS] [-- FLAGS OF spin_jax.main]

  create     ask for the machines: one TPU VM, a pod slice, or several slices
  setup      install Python and spin_jax on every worker
  start      start the run on every worker; the same command again resumes it
  status     the request, the machines, and the run on each worker
  logs       follow what one worker prints
  stop       ask the run to save and to end
  supervise  all of the above, again after each preemption, until the run ends; then delete
  delete     give the machines back; nothing costs money afterwards but the bucket

  --slice=SLICE            create: v5e-16, v5p-8, v4-32, ..., as in --config=configs/zephyr_7b.py:SLICE
  --slices=N               create: that many slices joined by the data centre's network (default 1)
  --spot                   create: cheaper machines that can be taken away at any time
  --runtime=VERSION        create: the machines' image (default: the one for JAX on this kind of TPU)
  --service-account=EMAIL  create: whom the machines act as (default: the project's Compute Engine account)
  --create-flag=FLAG       create: one more flag for gcloud, as --create-flag=--network=NET; may be repeated
  --repo=URL --ref=REF     setup: the git repository, and its branch, tag or commit (default main)
  --config=FILE:SLICE      start: a file of this checkout, which is checked here first
  --workdir=gs://...       start
  --hf-secret=NAME         start: the secret of Secret Manager that holds the Hugging Face token
  --node=N --worker=N      logs: of which slice and which of its machines (default 0 and 0, where the run's log is)
  --every=SECONDS          supervise: how often to look (default 60)
  --keep                   supervise: do not delete the machines at the end
  --dry-run                print every command, one a line, and run none
USAGE
}

die() {
    echo "launch/tpu.sh: $1" >&2
    exit "${2:-2}"
}

need() { # OPTION...: the options that this command cannot do without
    local option
    for option; do
        if [ -z "${!option}" ]; then
            die "$command needs --$(echo "$option" | tr _ -)=...; launch/tpu.sh --help explains it"
        fi
    done
}

quote() { # WORD...: one line that a shell reads back as these words
    local word line='' escaped="'\\''"
    for word; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*)
                word=${word//\'/$escaped}
                word="'$word'"
                ;;
        esac
        line="$line${line:+ }$word"
    done
    echo "$line"
}

run() {
    if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

queued_resources() { # VERB WORD...
    run gcloud compute tpus queued-resources "$@" --zone="$zone" --project="$project"
}

on_workers() { # COMMAND: in the home directory of every worker of every slice
    queued_resources ssh "$name" --node=all --worker=all --command="$1"
}

# --- the machines

# Types and images: https://cloud.google.com/tpu/docs/runtimes and the pages of each generation beside it.
describe_slice() { # sets accelerator, devices of a slice and, unless it is given, runtime
    local image
    devices=${slice##*-}
    case $devices in '' | *[!0-9]*) devices=0 ;; esac
    case $slice in
        v2-* | v3-*) accelerator=$slice image=tpu-ubuntu2204-base ;; # cores, each of which is a device
        v4-*) accelerator=$slice image=tpu-ubuntu2204-base devices=$((devices / 2)) ;; # cores, two of a device
        v5e-* | v5litepod-*) accelerator=v5litepod-${slice##*-} image=v2-alpha-tpuv5-lite ;;
        v5p-*) accelerator=$slice image=v2-alpha-tpuv5 devices=$((devices / 2)) ;;
        v6e-*) accelerator=$slice image=v2-alpha-tpuv6e ;;
        tpu7x-*) die "--slice=$slice is to be had through GKE alone: use launch/jobset.yaml" ;;
        *) devices=0 ;;
    esac
    if [ "$devices" = 0 ]; then die "--slice=$slice is not a TPU slice: write v2-N, v3-N, v4-N, v5e-N, v5p-N or v6e-N"; fi
    runtime=${runtime:-$image}
}

# A queued resource even for one machine: it waits its turn where a plain request fails, and only it makes several
# slices that know each other (https://cloud.google.com/tpu/docs/queued-resources).
create() {
    local words
    words=(create "$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
    if [ "$slices" -gt 1 ]; then
        words+=(--node-count="$slices" --node-prefix="$name")
    else
        words+=(--node-id="$name")
    fi
    words+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    if [ -n "$service_account" ]; then words+=(--service-account="$service_account"); fi
    if [ -n "$spot" ]; then words+=(--spot); fi
    queued_resources "${words[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
    queued_resources delete "$name" --force --quiet
}

list_request() { # its state, or nothing where there is none
    queued_resources list --filter="name~/$name\$" --format='value(state.state)'
}

list_nodes() { # NAME STATE of each slice
    run gcloud compute tpus tpu-vm list --filter="queuedResource~/$name\$" --format='value(name.basename(),state)' \
        --zone="$zone" --project="$project"
}

# --- the run on them

# Before anything costs money: config and slice go together, and the program does not refuse its flags.
check() {
    local named='' python status=0
    case $config in *:*) named=${config#*:} named=${named%%,*} ;; esac
    case $named in
        "$slice" | '') ;;
        v[0-9]* | tpu7x-* | *[0-9]-[0-9]* | cpu)
            if [ -n "$slice" ]; then
                die "--slice=$slice is not the slice of --config=$config: write --config=${config%%:*}:$slice"
            fi
            ;;
    esac
    if ! python=$(find_python); then
        echo "launch/tpu.sh: no Python with spin_jax here, so the flags are checked on the machines only" >&2
        return
    fi
    (cd "$checkout" && "$python" -m spin_jax.main "${program[@]}" --check_for=$((devices * slices))) || status=$?
    if [ "$status" = 2 ]; then exit 2; fi
}

find_python() {
    local python
    for python in "$checkout/.venv/bin/python" python3 python; do
        if (cd "$checkout" && "$python" -c 'import spin_jax.main') >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    return 1
}

setup() {
    local commands
    commands="git init --quiet spin_jax && cd spin_jax"
    commands+=" && git fetch --quiet --depth=1 $(quote "$repo" "$ref") && git checkout --quiet --force FETCH_HEAD"
    on_workers "$commands && launch/worker.sh setup tpu"
}

start() {
    local secret=''
    if [ -n "$hf_secret" ]; then secret="HF_SECRET=$(quote "$hf_secret") "; fi
    on_workers "$secret$(quote spin_jax/launch/worker.sh start "${program[@]}")"
}

list_runs() { # HOST running | HOST exit STATUS | HOST none, for each worker
    # shellcheck disable=SC2016 # the name of the host over there
    on_workers 'spin_jax/launch/worker.sh status 2>/dev/null || echo "$(hostname) none"'
}

status() {
    list_request
    list_nodes
    list_runs
}

logs() { # a terminal, so that Ctrl-C ends the command over there as well
    queued_resources ssh "$name" --node="$node" --worker="$worker" --ssh-flag=-t \
        --command='tail -n 200 -F spin_jax_run/log'
}

stop() {
    on_workers 'spin_jax/launch/worker.sh stop'
}

# --- keeping it alive

look() { # one word for where things stand: the request, else the machines, else the run
    local request nodes runs
    if ! request=$(list_request); then
        echo unknown
    elif [ "$request" != ACTIVE ]; then
        echo "${request:-none}"
    elif ! nodes=$(list_nodes); then
        echo unknown
    elif grep -qE 'PREEMPTED|TERMINATED' <<<"$nodes"; then
        echo LOST
    elif ! runs=$(list_runs); then
        echo unreachable
    elif grep -q ' exit 2$' <<<"$runs"; then
        echo mistake
    elif grep -q ' running$' <<<"$runs"; then
        echo running
    elif grep -q ' none$' <<<"$runs"; then
        echo ready
    elif ! grep -qv ' exit 0$' <<<"$runs"; then
        echo finished
    elif ! grep -qvE ' exit (0|75)$' <<<"$runs"; then
        echo stopped
    else
        echo crashed
    fi
}

# Each turn looks and does one thing, so that this can be stopped and started again at any time.
supervise() {
    local state last='' failures=0 begun=''
    while true; do
        state=$(look)
        case $state in
            running) begun=yes ;;
            finished | mistake | stopped | crashed)
                if [ -z "$begun" ]; then state=ready; fi # that was an earlier run; if not, starting again does no harm
                ;;
        esac
        if [ "$state" != "$last" ]; then echo "$(date '+%F %T') $state" >&2; fi
        last=$state
        case $state in
            SUSPENDED | LOST) failures=0 ;; # preemptions may come as often as they like
            FAILED | crashed) failures=$((failures + 1)) ;;
            finished) finish 0 ;;
            mistake) finish 2 ;;
        esac
        if [ "$failures" -gt 3 ]; then finish 1; fi
        case $state in
            none) create ;;
            FAILED | SUSPENDED | LOST) delete ;;
            ready) setup && start && begun=yes ;;
            stopped | crashed) start ;;
        esac || failures=$((failures + 1))
        sleep "$every"
    done
}

finish() { # STATUS
    if [ "$1" != 0 ]; then
        echo "launch/tpu.sh: the run cannot go on; the end of its log:" >&2
        queued_resources ssh "$name" --node=0 --worker=0 \
            --command="tail -c 20000 spin_jax_run/log | tr '\r' '\n' | tail -n 20" || true
    fi
    if [ -z "$keep" ]; then
        delete || true
    else
        echo "The machines cost money until: $(quote launch/tpu.sh delete "${whose[@]}")" >&2
    fi
    exit "$1"
}

rehearse() { # the commands of a supervised run that nothing disturbs
    list_request
    create
    setup
    start
    status
    delete
}

# --- the command line

command=${1:-}
case $command in
    create | setup | start | status | logs | stop | supervise | delete) shift ;;
    --help)
        usage
        exit 0
        ;;
    *) die "'$command' is not a command: write create, setup, start, status, logs, stop, supervise or delete" ;;
esac

name='' zone='' project='' slice='' slices=1 spot='' runtime='' service_account='' create_flags=()
devices=0 repo='' ref=main config='' workdir='' hf_secret='' node=0 worker=0 every=60 keep='' dry_run=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --spot) spot=yes ;;
        --keep) keep=yes ;;
        --dry-run) dry_run=yes ;;
        --create-flag=*) create_flags+=("${1#*=}") ;;
        --name=* | --zone=* | --project=* | --slice=* | --slices=* | --runtime=* | --service-account=* | --repo=* | \
            --ref=* | --config=* | --workdir=* | --hf-secret=* | --node=* | --worker=* | --every=*)
            option=${1%%=*}
            option=${option#--}
            printf -v "${option//-/_}" %s "${1#*=}"
            ;;
        *) die "'$1' is not an option: --help lists them, and flags of spin_jax.main go after --" ;;
    esac
    shift
done
if [ $# -gt 0 ]; then shift; fi # the --

need name zone project
case $command in
    create) need slice ;;
    setup) need repo ;;
    start) need config workdir ;;
    supervise) need slice repo config workdir ;;
    *) if [ $# -gt 0 ]; then die "$command takes no flags of spin_jax.main"; fi ;;
esac
if [ -n "$slice" ]; then describe_slice; fi
case $name in *[!a-z0-9-]*) die "--name=$name: write lower-case letters, digits and hyphens" ;; esac
case $slices in '' | 0 | *[!0-9]*) die "--slices=$slices: write a number" ;; esac
case $workdir in
    '' | gs://*) ;;
    *) die "--workdir=$workdir: write gs://BUCKET/PATH, as all machines must see it and their own disks are lost" ;;
esac
whose=(--name="$name" --zone="$zone" --project="$project")
program=(--config="$config" --workdir="$workdir" "$@")

case $command in start | supervise) check ;; esac
if [ "$command" = supervise ] && [ -n "$dry_run" ]; then command=rehearse; fi
"$command"
