#!/bin/busybox sh
# The first process of a virtual machine of the tests, in the initial RAM file system: makes a root
# of the host's programs, read-only, and of directories of its own, and goes there.
#
# A root that is laid over the host's as a whole would be simpler, and then no file had the device
# and inode that its file system gives it, which is how agentguard knows files.
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
exec >/dev/console 2>&1
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module" || echo "vm: $module does not load"
done
. /machine

$b mkdir -p /host /root
$b mount -t virtiofs -o ro host /host || echo "vm: the host's files are not there"
$b mount -t tmpfs -o mode=755,size=75% root /root
cd /host
for entry in *; do
    case $entry in
        # What a machine has of its own.
        dev | proc | run | sys | tmp | var | root | home | mnt | media | srv | lost+found) ;;
        *)
            if [ -L "$entry" ]; then
                $b cp -a "$entry" /root/
            elif [ -d "$entry" ]; then
                $b mkdir "/root/$entry"
                $b mount --bind "/host/$entry" "/root/$entry"
            fi
            ;;
    esac
done
cd /root
$b mkdir -p dev proc sys run tmp root home mnt srv var/cache var/lib var/log var/tmp
$b chmod 1777 tmp var/tmp
# A mount, so that a service manager makes none over it.
$b mount -t tmpfs -o mode=755 run run
$b ln -s /run var/run
# What programs expect there to be written to, is not here to stay.
$b mkdir -p run/etc/upper run/etc/work
$b mount -t overlay -o lowerdir=/host/etc,upperdir=/root/run/etc/upper,workdir=/root/run/etc/work \
    etc etc || echo "vm: /etc is read-only"
for directory in $visible; do
    [ -d "/root$directory" ] && continue
    $b mkdir -p "/root$directory"
    $b mount --bind "/host$directory" "/root$directory"
done
$b cp /bin/busybox /guest.sh /job.sh /machine run/
for system in proc sys dev; do
    $b mount --move "/$system" "/root/$system"
done
exec $b switch_root /root /run/busybox sh /run/guest.sh begin
