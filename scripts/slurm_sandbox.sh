#!/usr/bin/env bash
# A real SLURM on one machine, to test a sweep or a preemption: slurmctld, and one slurmd per simulated node. Needs root
# on Debian or Ubuntu; works without systemd.
#
#   scripts/slurm_sandbox.sh install                  install slurm-wlm and munge
#   scripts/slurm_sandbox.sh start [FOLDER] [NODES]   start the daemons; state and logs in FOLDER (/tmp/slurm_sandbox)
#   export SLURM_CONF=FOLDER/slurm.conf               then use sinfo, squeue, sbatch, scontrol requeue, ...
#   python train_cls.py -m cluster=slurm cluster.gpus_per_node=null cluster.cpus_per_rank=1 cluster.ranks_per_node=1
#   scripts/slurm_sandbox.sh stop [FOLDER]
set -euo pipefail

action=${1:-}
folder=${2:-/tmp/slurm_sandbox}
nodes=${3:-2}
cpus=2 # per simulated node, independent of the machine

die() { echo "slurm_sandbox.sh: $1" >&2; exit 1; }

install_slurm() {
    command -v apt-get > /dev/null || die "install requires apt-get; install slurmctld, slurmd and munged manually"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null
}

start_munge() {
    munge -n 2> /dev/null | unmunge > /dev/null 2>&1 && return
    [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
    mkdir -p /run/munge /var/log/munge /var/lib/munge
    chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
    chmod 400 /etc/munge/munge.key
    chmod 755 /run/munge
    runuser -u munge -- munged --force
}

# Prints the first of NODES + 1 consecutive unused ports, for slurmctld and the nodes. They are below 32768, where no
# outgoing connection takes one.
unused_ports() {
    local first port
    while true; do
        first=$((10000 + RANDOM % 20000))
        for ((port = first; port <= first + nodes; port++)); do
            if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then continue 2; fi
        done
        echo "$first"
        return
    done
}

write_conf() {
    local host port
    host=$(hostname -s)
    port=$(unused_ports)
    cat > "$folder/slurm.conf" << CONF
ClusterName=sandbox
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=30
MpiDefault=none
SlurmdParameters=config_overrides
SlurmctldPort=$port
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" > /dev/null || die "$program is not installed; scripts/slurm_sandbox.sh install"
    done
    [ "$(id -u)" = 0 ] || die "must be run as root"
    if [ -e "$folder/slurmctld.pid" ]; then stop; fi
    mkdir -p "$folder/state"
    start_munge
    write_conf
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c
    for ((node = 1; node <= nodes; node++)); do slurmd -c -N "n$node"; done
    for ((tries = 0; tries < 60; tries++)); do
        if [ "$(sinfo -h -N -t idle 2> /dev/null | wc -l)" = "$nodes" ]; then
            echo "$nodes node(s); export SLURM_CONF=$folder/slurm.conf"
            return
        fi
        sleep 0.5
    done
    sinfo || true
    tail -n 5 "$folder"/*.log
    die "the nodes did not start within 30 seconds; logs: $folder"
}

stop() {
    compgen -G "$folder/*.pid" > /dev/null || return 0
    local pids
    pids=$(cat "$folder"/*.pid)
    export SLURM_CONF=$folder/slurm.conf
    scancel --quiet --user="$(id -un)" || true # else job steps outlive their slurmd
    for ((tries = 0; tries < 160; tries++)); do # longer than KillWait
        [ -n "$(squeue --noheader 2> /dev/null)" ] || break
        sleep 0.25
    done
    # shellcheck disable=SC2086
    kill $pids 2> /dev/null || true
    for ((tries = 0; tries < 40; tries++)); do
        # shellcheck disable=SC2086
        kill -0 $pids 2> /dev/null || break
        sleep 0.25
    done
    # shellcheck disable=SC2086
    kill -9 $pids 2> /dev/null || true
    rm -f "$folder"/*.pid
}

case $action in
    install) install_slurm ;;
    start) start ;;
    stop) stop ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; exit 2 ;;
esac
