#!/usr/bin/env bash
# Proves the image without a container daemon: podman builds the Dockerfile as it stands, runs the image
# confined as README.md says, and every promise is tried on the running container.
#   docker/prove_image.sh                  makes a base from this machine's Debian mirror
#   BASE=IMAGE docker/prove_image.sh       builds on an image that podman has or can pull
#   WORK=DIR docker/prove_image.sh         keeps images and the pip configuration there for the next run
# Needs root, and Debian's podman, crun, buildah, catatonit, debootstrap, prometheus and jq.
set -euo pipefail
cd "$(dirname "$0")/.."

image=localhost/layerskip-server:proof
container=layerskip-proof-$$
# The container shares the machine's network, so that it needs no network of its own.
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
url=http://127.0.0.1:$port
# The same flags as in README.md, which has the reasons.
confined=(--init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges)
# podman would add writable file systems of its own to a read-only root; no other engine does.
strict=(--read-only-tmpfs=false)
# What podman asks for by itself, root may lack the capability to grant.
limits=(--ulimit nofile=4096:4096 --ulimit nproc=4096:4096)

# crun refuses a machine that has both generations of cgroups, so the second is hidden from this script alone.
enter_mount_namespace() {
    [ -n "${PROVING:-}" ] || PROVING=1 exec unshare --mount "$0" "$@"
    ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
}

prepare_storage() {
    work=${WORK:-$(mktemp -d /var/tmp/layerskip-proof.XXXXXX)}
    mkdir -p "$work"
    trap clean_up EXIT
    printf '[storage]\ndriver = "overlay"\nrunroot = "%s"\ngraphroot = "%s"\n' \
        "$work/run" "$work/images" >"$work/storage.conf"
    export CONTAINERS_STORAGE_CONF=$work/storage.conf
}

clean_up() {
    podman rm --force --volumes "$container" >/dev/null 2>&1 || true
    [ -n "${WORK:-}" ] || { podman system reset --force >/dev/null 2>&1 || true; rm -rf "$work"; }
}

fact() { echo "proven: $*"; }
fail() {
    echo "NOT PROVEN: $*" >&2
    podman logs --tail 20 "$container" >&2 || true
    exit 1
}
expect() { # WHAT EXPECTED ACTUAL
    [ "$2" = "$3" ] || fail "$1: expected $2, got $3"
    fact "$1: ${3:-nothing}"
}

# The mirror and the suite are those that apt uses here.
make_base() {
    BASE=localhost/debian-python:proof
    ! podman image exists "$BASE" || return 0
    local mirror suite
    read -r mirror suite < <(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' \
        'Created-By: Packages' 'Label: Debian' 'Component: main')
    debootstrap --variant=minbase --include=python3,python3-venv,python3-dev \
        "$suite" "$work/root" "$mirror" >"$work/debootstrap.log" || { tail "$work/debootstrap.log" >&2; exit 1; }
    tar -C "$work/root" -c . | podman import --quiet - "$BASE"
    rm -rf "$work/root"
}

# pip inside the build is configured as pip is here, and sees the files that this configuration names.
# Builds of torch with CUDA need triton: without it no step can fetch gigabytes to prove a start on a CPU.
make_pip_configuration() {
    echo 'triton<0' >"$work/constraints"
    {
        echo '[global]'
        echo "constraint = /etc/pip.constraints"
        # Variables come first and go before files, as they do in pip.
        python3 -m pip config list | sed -nE "s/^(:env:|global)\.([a-z-]+)='(.*)'$/\2 = \3/p" | sort -u -s -t= -k1,1
    } >"$work/pip.conf"
    mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro" --volume "$work/constraints:/etc/pip.constraints:ro")
    local path
    # The files of an index lie beside its pages.
    for path in $(grep -oE 'file://[^ ]+' "$work/pip.conf" | sed -E 's,^file://,,; s,/[^/]+/?$,,') \
        $(grep -oE '[ =]/[^ ]+' "$work/pip.conf" | cut -c2-); do
        [[ $path = /etc/pip.constraints || ! -e $path ]] || mounts+=(--volume "$path:$path:ro")
    done
}

build() {
    podman build --isolation chroot --network host --format docker "${limits[@]}" "${mounts[@]}" \
        --build-arg "BASE=$BASE" --tag "$image" . >"$work/build.log" 2>&1 || { tail -n 30 "$work/build.log" >&2; exit 1; }
    fact "the Dockerfile builds: $(grep --text ' STEP ' "$work/build.log" | sort -u | wc -l) steps on $BASE," \
        "$(podman image inspect --format '{{.Size}}' "$image" | numfmt --to=si)B"
}

start() {
    podman run --detach --name "$container" --network host --cgroups disabled --no-healthcheck "${limits[@]}" \
        "${confined[@]}" "${strict[@]}" --volume "$container:/cache" --env "LAYERSKIP_PORT=$port" "$image" >/dev/null
    init_pid=$(podman inspect --format '{{.State.Pid}}' "$container")
    fact "started with ${confined[*]}"
}

inside() { podman exec "$container" "$@"; }

# The image's own health check, asked as a daemon would ask it.
await_health() {
    local check
    SECONDS=0
    mapfile -t check < <(podman image inspect --format '{{range .HealthCheck.Test}}{{println .}}{{end}}' "$image")
    [ "${check[0]}" = CMD ] || fail "the image has a health check"
    check=("${check[@]:1}")
    unset 'check[-1]' # The template's last line is empty.
    ! inside "${check[@]}" 2>/dev/null || fail "the health check is red before the server listens"
    until inside "${check[@]}" 2>/dev/null; do
        [ "$(podman inspect --format '{{.State.Running}}' "$container")" = true ] || fail "the server stays up"
        [ "$SECONDS" -lt 120 ] || fail "the health check turns green"
        sleep 0.5
    done
    fact "the health check was red, and is green after $SECONDS s"
}

try_confinement() {
    expect "user and group" 10001:10001 "$(inside sh -c 'echo "$(id -u):$(id -g)"')"
    local status path
    status=$(</proc/"$(pgrep --parent "$init_pid")"/status)
    expect "empty sets of capabilities, of 5" 5 "$(grep --count --extended-regexp '^Cap\w+:\s0+$' <<<"$status")"
    expect "no new privileges" 1 "$(awk '/^NoNewPrivs:/ { print $2 }' <<<"$status")"
    ! inside touch /proof 2>/dev/null || fail "/ cannot be written"
    # What find may not look into, it may not write either.
    expect "what can be written beside /tmp and /cache" "" \
        "$(inside find / -xdev '(' -path /tmp -o -path /cache ')' -prune -o -writable ! -type l -print 2>/dev/null)"
    for path in /tmp /cache /cache/huggingface /cache/triton; do
        inside touch "$path/proof" || fail "$path can be written"
    done
    fact "/tmp and /cache can be written"
}

try_serving() {
    local answer
    answer=$(curl --silent --show-error --fail "$url/v1/completions" --header 'Content-Type: application/json' \
        --data '{"prompt": "def fibonacci(n):", "max_tokens": 16, "temperature": 0, "exit_layer": 4, "draft_length": 4}') ||
        fail "a completion is answered"
    expect "tokens of a completion" 16 "$(jq .usage.completion_tokens <<<"$answer")"
    fact "its text: $(jq -c '.choices[0].text' <<<"$answer"), its drafts: $(jq -c .metrics.speculative_decoding <<<"$answer")"
    docker/check.sh "$url" >"$work/check.log" || fail "Prometheus scrapes it: $(tail -n 3 "$work/check.log")"
    fact "Prometheus scrapes it: $(tail -n 1 "$work/check.log")"
}

# podman sends the image's own STOPSIGNAL, and after 10 s one that would make the status 137.
try_stopping() {
    SECONDS=0
    podman stop --time 10 "$container" >/dev/null
    expect "exit status after $(podman image inspect --format '{{.Config.StopSignal}}' "$image"), $SECONDS s later" \
        0 "$(podman inspect --format '{{.State.ExitCode}}' "$container")"
    ! podman logs "$container" 2>&1 | grep --quiet Traceback || fail "the log has no traceback"
    fact "the log has no traceback"
}

enter_mount_namespace "$@"
prepare_storage
[ -n "${BASE:-}" ] || make_base
make_pip_configuration
build
start
await_health
try_confinement
try_serving
try_stopping
echo "The image is proven."
