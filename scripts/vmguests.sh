# shellcheck shell=bash
# vmguests.sh: the machines of scripts/vmlab that are guests of scripts/lab's hosts; that script reads this one
#
# QEMU runs in its host's network namespace, where the machine's tap is. All that is of vhost-user goes by UNIX sockets, which
# no namespace parts.
# shellcheck disable=SC2154,SC2034

virtual_machines=(vm1 vm2 vm3)
declare -A host_of=([vm1]=h1 [vm2]=h1 [vm3]=h2)
declare -A address=([vm1]=198.51.100.11 [vm2]=198.51.100.12 [vm3]=198.51.100.13)
lab_state=${XDG_RUNTIME_DIR:-/run}/vsocket-lab/$LAB
agent_socket=/run/vsocket/agent.sock

with_guests() { [[ -e $state/guests ]]; }
is_virtual() { [[ -n ${1:-} && " ${virtual_machines[*]} " == *" $1 "* ]]; }
lab() {
    bin_dir
    LAB=$LAB VSOCKET_BIN=$REPLY "$here/lab" "$@"
}

exec_lab() {
    bin_dir
    exec env "LAB=$LAB" "VSOCKET_BIN=$REPLY" "$here/lab" "$@"
}

need_guests_possible() {
    ((EUID == 0)) || die "--guests needs root, for network namespaces: run it with sudo"
    ((${1:-2} <= ${#virtual_machines[@]})) || die "up --guests: there are ${#virtual_machines[@]}, not $1"
}

# shellcheck disable=SC2054
guest_options() {
    local mac
    printf -v mac '02:00:00:64:00:%02x' "${address[$1]##*.}"
    enter=(ip netns exec "$LAB-${host_of[$1]}")
    wire=(-netdev "tap,id=wire,ifname=port-$1,script=no,downscript=no" -device "virtio-net-pci,netdev=wire,mac=$mac,romfile=")
    memory=${VMLAB_MEMORY:-768}
    parameters="vmlab.name=$1 vmlab.nic=soft vmlab.guest=${address[$1]} vmlab.agent=$(<"$state/guests")"
}

# in_machine run|exec GUEST -- CMD
in_machine() {
    need_up
    command_args "${@:3}"
    is_virtual "${2:-}" || exec_lab "$1" "${2:-}" -- "${args[@]}"
    case $1 in
        exec) exec_remote "$2" "${args[@]}" ;;
        run) exec_remote "$2" vsocket run --agent "$agent_socket" -- "${args[@]}" ;;
    esac
}

# A command that names a guest, a host or a daemon.
of_guests() {
    need_up
    local role=${2:-} name=${3:-}
    case $1,$role in
        vsocket,vm*) exec_remote "$role" vsocket "${3:-}" --agent "$agent_socket" "${@:4}" ;;
        start,machine) boot "${@:3}" ;;
        stop,machine) qmp "$name" quit ;;
        kill,machine) kill_machine "$name" ;;
        pause,machine) qmp "$name" stop ;;
        cont,machine) qmp "$name" cont ;;
        stop,front) front term "$name" ;;
        start,front | kill,front | pause,front | cont,front) front "$1" "$name" ;;
        *,agent | *,keeper)
            if is_virtual "$name"; then exec_remote "$name" guest-agent "$1" "$role"; fi
            exec_lab "$@"
            ;;
        *) exec_lab "$@" ;;
    esac
    exit
}

kill_machine() {
    need_machine "${1:-}"
    local i
    alive "$1" || die "$1 does not run"
    kill -s KILL "$REPLY"
    for ((i = 0; i < 200; i++)); do
        alive "$1" || return 0
        sleep 0.05
    done
    die "$1 goes on"
}

qmp() {
    need_machine "${1:-}"
    alive "$1" || die "$1 does not run"
    python3 "$here/vmqmp.py" "$state/$1.qmp" "${@:2}"
}
