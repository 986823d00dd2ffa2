# The first process after `init.sh`: mounts what a machine that runs agentguard has, runs the job,
# says how it ended, and turns the machine off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
. /run/machine
mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts -o mode=600,ptmxmode=000 devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t securityfs securityfs /sys/kernel/security
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up

# The kernel asks for modules by running this.
printf '#!/run/busybox sh\nexec /sbin/modprobe --dirname %s "$@"\n' "$modules" >/run/modprobe
chmod +x /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe

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
