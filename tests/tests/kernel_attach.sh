# Run in the virtual machine by kernel_attach.rs, behind its functions; that reads what is printed as RESULT.
dmesg -n 1
# A sync, which an orderly end begins with, would wait for a server for ten minutes.
trap 'cat /tmp/serve.log; dmesg | tail -n 60; echo o >/proc/sysrq-trigger; sleep 60' EXIT
raid10 create $members --chunk 64K --name vol
serve --direct
vol=$server
attached() { raid10 status "$1" | sed -n 's/^ Attached *//p'; }

# A second volume, of files: it may not be attached at first, it grows, its server stands still, and it is given up.
raid10 create /tmp/a.img /tmp/b.img --size 24M --name small
under="/tools/setpriv --bounding-set=-sys_admin" members="/tmp/a.img /tmp/b.img" serve
refuse "the process that serves the volume must run as root, with CAP_SYS_ADMIN" raid10 attach small --device /dev/nbd1
raid10 stop small
wait $server
members="/tmp/a.img /tmp/b.img" serve
small=$server

# A third one, on a file system that can be frozen: then its members do not answer, and its server lives.
/tools/mke2fs -q -t ext4 -F /dev/drive/disk4.img
mkdir /members
mount -t ext4 /dev/drive/disk4.img /members
raid10 create /members/a.img /members/b.img --size 24M --name slow
members="/members/a.img /members/b.img" serve
slow=$server
raid10 attach slow --device /dev/nbd2

echo "== busy disks, and disks that are none"
raid10 attach small --device /dev/nbd1
echo RESULT small $(attached small)
refuse "/dev/nbd1 is in use by raid10:" raid10 attach vol --device /dev/nbd1
refuse "/dev/nbd99999999: Invalid argument; \`dmesg\` says why" raid10 attach vol --device /dev/nbd99999999

echo "== a disk"
raid10 attach vol --device /dev/nbd0
echo RESULT attached $(attached vol)
queue() { cat /sys/block/nbd$1/queue/$2; }
echo RESULT queue $(queue 0 write_cache), fua $(queue 0 fua), discards of $(queue 0 discard_max_bytes)
refuse "attached at /dev/nbd0 already" raid10 attach vol
# Looked for in another place, its server lives all the same.
mkdir /tmp/elsewhere
refuse "run this with RAID10_RUNTIME_DIR=/run/raid10" env RAID10_RUNTIME_DIR=/tmp/elsewhere raid10 detach /dev/drive/disk0.img --force
refuse "attached at /dev/nbd0 already" raid10 attach vol --device /dev/nbd5
/tools/mke2fs -q -t ext4 -F /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/one bs=1M count=8
( cd /mnt && sha256sum one >/tmp/one.sum )
refuse "/dev/nbd0 is mounted on /mnt, and not by \`raid10 attach\`" raid10 detach vol
umount /mnt
sleep 600 </dev/nbd0 &
refuse "/dev/nbd0 is in use by sleep ($!)" raid10 detach vol
kill $!
# In the device's own page cache only.
head -c 4096 /tmp/one.sum | dd of=/dev/nbd0 bs=512 seek=389119 conv=notrunc
raid10 detach vol
echo RESULT free $(cat /sys/block/nbd0/size) $(ls /sys/block/nbd0/pid 2>&1)

echo "== attached again, and mounted"
raid10 attach vol --mount /mnt
( cd /mnt && sha256sum -c /tmp/one.sum )
head -c 20 /tmp/one.sum >/tmp/head
dd if=/dev/nbd0 bs=512 skip=389119 count=1 iflag=direct | head -c 20 | cmp - /tmp/head
echo RESULT mounted $(attached vol)
raid10 detach vol
echo RESULT unmounted $(grep -c ' /mnt ' /proc/mounts) $(ls -A /mnt)

echo "== a disk grows"
truncate -s 40M /tmp/a.img /tmp/b.img
raid10 grow small
echo RESULT grown $(raid10 status small --json | sed -n 's/^  "size": \([0-9]*\),$/\1/p') $(blockdev --getsize64 /dev/nbd1) $(queue 1 discard_max_bytes)

echo "== members fail under a mounted file system, and are replaced"
for n in 0 1 2 3; do truncate -s 24M /tmp/m$n.img; done
raid10 create /tmp/m0.img /tmp/m1.img --name hurt
members="/tmp/m0.img /tmp/m1.img" serve
hurt=$server
raid10 attach hurt --device /dev/nbd3
/tools/mke2fs -q -t ext4 -F /dev/nbd3
mkdir /hurt
mount -t ext4 /dev/nbd3 /hurt
: >/tmp/hurt.log
churn() {
    i=0
    while [ ! -e /tmp/enough ]; do
        i=$((i + 1))
        dd if=/dev/urandom of=/hurt/f$((i % 24)) bs=64k count=4 conv=fsync 2>/tmp/hurt.dd || { cat /tmp/hurt.dd >>/tmp/hurt.errors; break; }
        echo $i >>/tmp/hurt.log
    done
}
churn &
churn=$!
more() { goal=$(($(wc -l </tmp/hurt.log) + $1)); n=0; until [ $(wc -l </tmp/hurt.log) -ge $goal ]; do n=$((n + 1)); [ $n -lt 600 ] || exit 1; sleep 0.1; done; }
more 5
# One is declared failed, the other one shrinks to nothing under its server.
raid10 fail hurt /tmp/m0.img
more 5
raid10 remove hurt /tmp/m0.img
raid10 add hurt /tmp/m2.img
raid10 wait hurt 2>/tmp/wait.log || cat /tmp/wait.log
more 5
truncate -s 0 /tmp/m1.img
n=0; until raid10 status hurt | grep -q degraded; do n=$((n + 1)); [ $n -lt 600 ] || exit 1; sleep 0.1; done
more 5
raid10 remove hurt /tmp/m1.img
raid10 add hurt /tmp/m3.img
raid10 wait hurt 2>/tmp/wait.log || cat /tmp/wait.log
more 5
touch /tmp/enough
wait $churn
rm /tmp/enough
echo RESULT churned $(cat /tmp/hurt.errors 2>/dev/null || echo all)
( cd /hurt && sha256sum f* >/tmp/hurt.sums )
umount /hurt
# What is read now was all rebuilt, and comes from the last member.
raid10 fail hurt /tmp/m2.img
blockdev --flushbufs /dev/nbd3
/tools/e2fsck -f -n /dev/nbd3
mount -t ext4 -o ro /dev/nbd3 /hurt
( cd /hurt && sha256sum -c /tmp/hurt.sums >/tmp/hurt.checked )
echo RESULT hurt $(grep -c OK /tmp/hurt.checked) of $(wc -l </tmp/hurt.sums)
umount /hurt
raid10 detach hurt
raid10 stop hurt
wait $hurt
rm /tmp/m?.img

echo "== a server dies under a mounted file system"
raid10 attach vol --mount /mnt
writer() {
    i=0
    while [ ! -e /tmp/enough ]; do
        i=$((i + 1))
        dd if=/dev/urandom of=/mnt/f$i bs=64k count=8 conv=fsync 2>/tmp/dd || { cat /tmp/dd >>/tmp/errors; break; }
        ( cd /mnt && sha256sum f$i >>/tmp/sums )
        echo $i >/tmp/at
    done
}
at_least() { n=0; until [ "$(cat /tmp/at)" -ge $1 ]; do n=$((n + 1)); [ $n -lt 120 ] || return 1; sleep 1; done; }
echo 0 >/tmp/at
writer &
writer=$!
at_least 10
# What is asked of the second one meanwhile outlasts the driver's patience with a request.
# Nor does it answer for itself: the first is named by a member until it goes on.
member=/dev/drive/disk0.img
kill -STOP $small
dd if=/dev/urandom of=/dev/nbd1 bs=64k count=16 oflag=direct 2>/tmp/stopped &
stopped=$!
# Nor do the members of the third.
dd if=/dev/urandom of=/tmp/frozen bs=64k count=16
fsfreeze --freeze /members
dd if=/tmp/frozen of=/dev/nbd2 bs=64k oflag=direct 2>/tmp/write &
write=$!
blkdiscard -o 4194304 -l 8388608 /dev/nbd2 2>/tmp/discard &
discard=$!
# It dies with requests under way, sooner or later after a stop.
kill -STOP $vol
sleep 2
kill -9 $vol
wait $vol || true
sleep 1
echo RESULT waiting $(attached $member)
refuse "has no server, and /dev/nbd0 on /mnt keeps what is not written yet" raid10 detach $member
members="$members" serve --direct
vol=$server
echo RESULT server $(attached $member)
before=$(cat /tmp/at)
raid10 attach $member
echo RESULT again $(attached $member)
at_least $((before + 10))
sleep 5
kill -CONT $small
wait $stopped && echo RESULT stopped ok || cat /tmp/stopped
# Given up by the driver, connections are replaced, though what was begun on them still waits for the members.
n=0; until grep -q "/dev/nbd2 has its connections again" /tmp/serve.log; do n=$((n + 1)); [ $n -lt 120 ] || exit 1; sleep 1; done
kill -0 $write
fsfreeze --unfreeze /members
wait $write && wait $discard && echo RESULT thawed ok || cat /tmp/write /tmp/discard
dd if=/dev/nbd2 bs=64k count=16 iflag=direct | cmp - /tmp/frozen
raid10 detach slow
raid10 stop slow
wait $slow
touch /tmp/enough
wait $writer
echo RESULT written $(cat /tmp/errors 2>/dev/null || echo all)
echo 3 >/proc/sys/vm/drop_caches
( cd /mnt && sha256sum -c /tmp/sums >/tmp/checked )
echo RESULT files $(grep -c OK /tmp/checked) of $(cat /tmp/at)
raid10 detach vol

echo "== a server ends under a mounted file system, and the next one is only asked to let go"
raid10 attach vol --mount /mnt
( cd /mnt && sha256sum -c /tmp/sums >/dev/null )
echo kept >/mnt/kept
kill -TERM $vol
n=0; until grep -q "its disk waits for the next server" /tmp/serve.log; do n=$((n + 1)); [ $n -lt 100 ] || exit 1; sleep 0.1; done
kill -TERM $vol
wait $vol
serve --direct
vol=$server
raid10 detach vol
raid10 attach vol --mount /mnt
echo RESULT kept $(cat /mnt/kept)
raid10 detach vol
raid10 attach vol
/tools/e2fsck -f -n /dev/nbd0
raid10 detach vol

echo "== given up"
echo RESULT mended $(grep -c "/dev/nbd1 has its connections again" /tmp/serve.log)
sleep 600 </dev/nbd1 &
user=$!
kill -9 $small
wait $small || true
refuse "small has no server" raid10 detach small
raid10 detach small --force 2>&1 | grep "becomes free when sleep ($user) let it go"
echo RESULT errors $(dmesg | grep -ci "i/o error")
# It is still there, and never goes on.
members="/tmp/a.img /tmp/b.img" serve
small=$server
raid10 attach small >/tmp/anew 2>&1
echo RESULT anew $(attached small) beside $(ls -d /sys/block/nbd1/pid)
raid10 detach small
kill $user

echo "== without a server for too long"
raid10 attach small --device /dev/nbd1
kill -9 $small
wait $small || true
echo RESULT noted $(cut -d' ' -f3 /run/raid10/nbd1.note)
touch -d "1960-01-01 00:00:00" /run/raid10/nbd1.note
refuse "/dev/nbd1 was without a server for longer than it waits" raid10 detach small
members="/tmp/a.img /tmp/b.img" serve
small=$server
echo RESULT vain $(attached small)
refuse "raid10 detach small --force" raid10 attach small
refuse "raid10 detach small --force" raid10 detach small
raid10 detach small --force 2>&1
raid10 attach small --device /dev/nbd1
raid10 detach small
echo RESULT forgotten $(ls /run/raid10/nbd1.note 2>&1)
raid10 stop small
wait $small

echo "== what cannot be written"
mkdir /full
mount -t tmpfs -o size=8M full /full
raid10 create /full/a.img /full/b.img --size 24M --name full
members="/full/a.img /full/b.img" serve
full=$server
raid10 attach full --device /dev/nbd1
dd if=/dev/urandom of=/dev/nbd1 bs=1M count=12 2>&1
refuse "/dev/nbd1 is gone, but not all that was written to it has reached the volume" raid10 detach full
refuse "full is not attached" raid10 detach full
raid10 stop full
wait $full
umount /full

echo "== the driver is slow to answer"
members="/tmp/a.img /tmp/b.img" serve
small=$server
raid10 attach small --device /dev/nbd1
exec 7>/dev/nbd1
kill -STOP $small
# More than its sockets take: who is to say goodbye on them waits, and whoever asks the driver anything waits for that.
dd if=/dev/zero bs=1M count=16 conv=fsync >&7 2>/tmp/stuffed &
stuffed=$!
sleep 3
/tools/nbd-client -d /dev/nbd1 >/tmp/goodbye 2>&1 &
goodbye=$!
sleep 2
raid10 attach $member --device /dev/nbd0 >/tmp/late 2>&1 &
late=$!
sleep 2
# Nobody else does. (A name is looked for at each server: the one that stands still does not answer.)
timeout 20 raid10 status $member >/dev/null
timeout 20 raid10 limit $member
refuse "vol is being attached or detached at this moment" timeout 20 raid10 stop $member
kill -0 $goodbye
kill -0 $late
kill -CONT $small
wait $goodbye
wait $stuffed || true
exec 7>&-
wait $late && echo RESULT late $(attached vol) || cat /tmp/late
raid10 detach vol
raid10 stop small
wait $small

echo "== no driver"
rmmod nbd
refuse "load it with \`modprobe nbd\`" raid10 attach vol --device /dev/nbd0
raid10 stop vol
wait $vol
trap - EXIT
