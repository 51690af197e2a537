# The driver domain (`storage`), and guests with its disks, several at a time. It has two disks that
# dom0's blkback serves: xvdb, a file system to be read, and xvdc, empty. The steps:
#
#   together      our unikernel on both of those, forwarded, while Linux works on a RAM disk, which is
#                 taken away from it and given back
#   crash_beside  Linux is destroyed while it writes to a RAM disk; our unikernel goes on beside it
#   big           512 MiB outstanding on one ring page
#   attach_own    dom0, as its guest, asks for a disk that it has not got; it gets that, and dom0 compares
#   detach_own    xvdc is taken away from the driver domain itself
#
# Then the driver domain is asked to shut down. What matrix.sh defines is there, too.
. /matrix.sh

own=/tmp/own.img
storage_log=/var/log/xen/console/guest-storage.log

# relay NAME LOG: as init.dom0's, but each line says whose it is.
relay() {
	while [ ! -f "$2" ]; do
		[ -e "/run/gone.$1" ] && return
		usleep 50000
	done
	exec 3<"$2"
	part=
	last=
	while :; do
		if IFS= read -r line <&3; then
			say "CONSOLE $1|$part$line"
			part=
		else
			part=$part$line
			[ -n "$last" ] && break
			[ -e "/run/gone.$1" ] && last=1
			[ -n "$last" ] || usleep 100000
		fi
	done
	[ -z "$part" ] || say "CONSOLE $1|$part"
}

# disk TARGET VDEV rw|ro
disk() {
	echo "format=raw,vdev=$2,access=$3,backend=storage,target=$1"
}

# What matrix.sh's `disturb` needs to know of the disk xvdb of the Linux guest.
backend_disk() {
	disk ram1 xvdb rw
}

# It stays attached: the ranges that the guest tells later are looked for, too.
backend_content() {
	through_dom0 "$(disk ram1 xvdy ro)" read $raw
	echo $raw
}

# run NAME SECONDS DISK ...: a guest from its creation to its end.
run() {
	name=$1
	limit=$2
	shift 2
	cp "/guests/$name.xl" "/guests/$name.cfg"
	printf 'disk=[' >>"/guests/$name.cfg"
	for one in "$@"; do
		printf '"%s",' "$one" >>"/guests/$name.cfg"
	done
	echo ']' >>"/guests/$name.cfg"
	guest "$name" "$limit" live
	say "ENDED $name $ended"
}

# first_bytes NAME FILE: what the disk holds that the unikernel NAME has written.
first_bytes() {
	bytes=$(sed -n 's/^DISK-SHA256 [0-9a-f]* \([0-9]*\).*/\1/p' "/var/log/xen/console/guest-$1.log" | tail -n 1)
	[ -z "$bytes" ] || say "DISK $1 $(head -c "$bytes" "$2" | sha256sum | cut -d ' ' -f 1) $bytes"
}

together() {
	seconds=300
	disturb linux linux /var/log/xen/console/guest-linux.log &
	run linux 400 "$(disk ram1 xvdb rw)" &
	linux=$!
	run forwarded 300 "$(disk disk:xvdb xvda ro)" "$(disk disk:xvdc xvdb rw)"
	first_bytes forwarded $own
	wait $linux
	ranges /var/log/xen/console/guest-linux.log "$(backend_content)"
}

crash_beside() {
	run crash 300 "$(disk ram1 xvdb rw)" &
	crashing=$!
	marker /var/log/xen/console/guest-crash.log WRITING 300 || return
	sleep 1
	crashed=$(xl domid crash)
	say "MAPPED $(mapped "$crashed")"
	run beside 300 "$(disk disk:xvdb xvda ro)" "$(disk ram:64m xvdb rw)" &
	beside=$!
	marker /var/log/xen/console/guest-beside.log 'NEGOTIATED device=xvdb' 120
	xl destroy crash >&9 2>&1
	tries=0
	while [ "$(lingers "$crashed")" = 1 ] && [ $tries -lt 50 ]; do
		tries=$((tries + 1))
		usleep 100000
	done
	say "DESTROYED crash"
	wait $beside $crashing
	say "LEFT $(mapped "$crashed") $(lingers "$crashed")"
	run after 300 "$(disk disk:xvdb xvda ro)" "$(disk ram1 xvdb rw)"
	backend_content >/dev/null
	first_bytes after $raw
}

big() {
	run big 600 "$(disk ram2 xvda rw)"
}

attach_own() {
	late=/tmp/late.img
	truncate -s 16M $late
	/sbin/losetup /dev/loop2 $late 2>&9
	head -c 4194304 $image >/tmp/written
	through_dom0 "$(disk disk:xvdd xvdy rw)" write /tmp/written &
	asking=$!
	marker $storage_log '.*this domain has no xvdd yet' 30
	xl block-attach storage phy:/dev/loop2,xvdd,w >&9 2>&1
	wait $asking
	xl block-detach storage xvdd >&9 2>&1
	marker $storage_log 'own xvdd.*: closed' 30
	say "ATTACHED $(sha256sum </tmp/written) $(head -c 4194304 $late | sha256sum)"
	/sbin/losetup -d /dev/loop2
}

detach_own() {
	xl block-detach storage xvdc >&9 2>&1
	marker $storage_log 'own xvdc.*: closed' 30
}

scenario() {
	load loop max_loop=8
	load xen-blkback
	load xen-blkfront
	for module in crc16 mbcache jbd2 crc32c_generic libcrc32c ext4; do
		[ ! -f /lib/modules/$module.ko ] || load $module
	done
	truncate -s 64M $own
	/sbin/losetup -r /dev/loop0 $image 2>&9
	/sbin/losetup /dev/loop1 $own 2>&9
	xl create /guests/storage.cfg >&9 2>&1 || return 1
	relay storage $storage_log &
	storage=$!
	marker $storage_log ready: 60 || return 1
	for step in $(cat /guests/steps); do
		say "STEP $step"
		$step
	done
	say "STEP shutdown"
	xl shutdown storage >&9 2>&1
	tries=0
	until xl list storage | grep -q -- '---s--' || [ $tries -ge 300 ]; do
		tries=$((tries + 1))
		usleep 100000
	done
	xl list >&9
	touch /run/gone.storage
	wait $storage
	xl destroy storage >&9 2>&1
	say "DOMAINS $(xl list | tail -n +2 | wc -l)"
}
