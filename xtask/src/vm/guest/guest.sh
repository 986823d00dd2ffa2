# What follows `init.sh` in a virtual machine of the tests. `begin`, the first process, mounts what a
# machine that runs agentguard has, or has systemd do it; `run` runs the job, says how it ended, and
# turns the machine off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
. /run/machine

begin() {
    mkdir -p /dev/pts /dev/shm /run/lock
    ln -sf /proc/self/fd /dev/fd
    ln -sf /proc/self/fd/0 /dev/stdin
    ln -sf /proc/self/fd/1 /dev/stdout
    ln -sf /proc/self/fd/2 /dev/stderr
    # The kernel asks for modules by running this.
    printf '#!/run/busybox sh\nexec /sbin/modprobe --dirname %s "$@"\n' "$modules" >/run/modprobe
    chmod +x /run/modprobe
    echo /run/modprobe >/proc/sys/kernel/modprobe
    case $manager in
        systemd)
            units
            exec /lib/systemd/systemd --unit=vm-job.target
            ;;
        none)
            mount -t devpts -o mode=600,ptmxmode=000 devpts /dev/pts
            mount -t tmpfs shm /dev/shm
            mount -t cgroup2 cgroup /sys/fs/cgroup
            mount -t bpf bpf /sys/fs/bpf
            mount -t securityfs securityfs /sys/kernel/security
            mount -t tracefs tracefs /sys/kernel/tracing
            ip link set lo up
            run
            ;;
    esac
}

# The job as a service of a real service manager, and none of the services of the host's.
units() {
    mkdir -p /run/systemd/system
    printf '%s\n' '[Unit]' 'DefaultDependencies=no' 'Requires=vm-job.service' \
        >/run/systemd/system/vm-job.target
    printf '%s\n' '[Unit]' 'DefaultDependencies=no' 'After=systemd-journald.socket' \
        'Wants=systemd-journald.socket' '[Service]' 'Type=oneshot' 'TimeoutStartSec=infinity' \
        'ExecStart=/run/busybox sh /run/guest.sh run' >/run/systemd/system/vm-job.service
    for unit in systemd-udevd systemd-udev-trigger systemd-udev-settle systemd-modules-load \
        systemd-sysctl systemd-random-seed systemd-timesyncd systemd-binfmt systemd-sysusers \
        systemd-firstboot systemd-hwdb-update systemd-machine-id-commit keyboard-setup \
        console-setup apparmor systemd-update-utmp ldconfig systemd-journal-flush \
        systemd-remount-fs kmod-static-nodes systemd-tmpfiles-setup systemd-tmpfiles-setup-dev \
        modprobe@; do
        ln -s /dev/null "/run/systemd/system/$unit.service"
    done
    for mount in dev-hugepages dev-mqueue sys-kernel-debug sys-fs-fuse-connections \
        sys-kernel-config; do
        ln -s /dev/null "/run/systemd/system/$mount.mount"
    done
    ln -s /dev/null /run/systemd/system/proc-sys-fs-binfmt_misc.automount
    # A dozen programs that each `daemon-reload` runs, to make units of what a machine has.
    mkdir -p /run/systemd/system-generators
    for generator in /lib/systemd/system-generators/* /etc/systemd/system-generators/* \
        /usr/local/lib/systemd/system-generators/*; do
        [ ! -e "$generator" ] || ln -sf /dev/null "/run/systemd/system-generators/${generator##*/}"
    done
}

run() {
    for port in /sys/class/virtio-ports/*; do
        case $(cat "$port/name") in
            said) said=/dev/$(basename "$port") ;;
            report) report=/dev/$(basename "$port") ;;
        esac
    done
    # A port can be opened once: whoever reports has it as descriptor 3.
    exec 3>"$report"
    setsid sh /run/job.sh </dev/null >"$said" 2>&1
    echo "ended $?" >&3
    exec 3>&-
    /run/busybox poweroff -f
    sleep 60
}

"$1"
