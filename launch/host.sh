#!/usr/bin/env bash
# What launch/tpu_vm.py has every host do, in the folder of the code: install, start COMMAND, poll
# (is it running, how did it end), logs.
set -u
cd "$(dirname "$0")/.." || exit 1
# The process group of the run. This folder forgets it at a reboot, as it must.
group=/dev/shm/mae_jax${PWD//\//_}

case ${1:-} in
    install)
        set -e
        # The Python of the TPU images is too old: uv brings another.
        python3 -m pip install -q --user uv
        python3 -m uv venv -q --python=3.12
        python3 -m uv pip install -q --editable '.[tpu,gcs]' --constraint=constraints.txt
        ;;
    start)
        shift
        # What is left of the last try would hold the chips.
        if [[ -f $group ]] && kill -KILL -- "-$(<"$group")" 2>/dev/null; then
            for _ in {1..50}; do
                kill -0 -- "-$(<"$group")" 2>/dev/null || break
                sleep 0.2
            done
        fi
        rm -f status
        rm -f /tmp/libtpu_lockfile || sudo rm -f /tmp/libtpu_lockfile
        export PATH="$PWD/.venv/bin:$PATH" JAX_NUM_PROCESSES=auto PYTHONUNBUFFERED=1
        # shellcheck disable=SC2016
        setsid bash -c 'trap : TERM; "$@" >>log 2>&1; echo $? >status' run "$@" \
            </dev/null >/dev/null 2>&1 &
        echo $! >"$group"
        ;;
    poll)
        if [[ -f $group ]] && kill -0 "$(<"$group")" 2>/dev/null; then
            echo state=running
        else
            echo "state=$(cat status 2>/dev/null || echo gone)"
        fi
        ;;
    logs) sed "s/^/$(hostname): /" log | tail -n 40 ;;
    *)
        echo "error: install, start COMMAND, poll or logs" >&2
        exit 2
        ;;
esac
