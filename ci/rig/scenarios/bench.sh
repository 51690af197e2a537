# Guests that measure, one after the other, all on 128 MiB of memory. /guests/cases has a line for
# each: its name, and the backend that serves it. A backend is started when the first guest wants it,
# and ended when the next guest wants another.

# fill FILE: every page is there before anybody measures; the first block holds what a guest looks
# for.
fill() {
	dd if=/dev/zero of="$1" bs=1M count=128 conv=fsync 2>/dev/null
	printf '\123\357' | dd of="$1" bs=1 seek=1080 conv=notrunc,fsync 2>/dev/null
}

# fill_disk SPECIFICATION: the same, as a guest of the backend.
fill_disk() {
	[ -e /sys/module/xen_blkfront ] || load xen-blkfront
	xl block-attach 0 "$1" >&9 2>&1
	tries=0
	until [ -b /dev/xvdy ] || [ $tries -ge 200 ]; do
		tries=$((tries + 1))
		usleep 50000
	done
	fill /dev/xvdy
	xl block-detach 0 xvdy >&9 2>&1
}

start_blkback() {
	load xen-blkback
}

stop_blkback() {
	rmmod xen_blkback
}

# libxl starts it for each guest.
start_qdisk() {
	:
}

stop_qdisk() {
	:
}

start_pvblkd() {
	chmod +x /etc/xen/scripts/block-pvblkd
	pvblkd serve >/run/pvblkd.out 2>&1 &
	pvblkd=$!
	sleep 2
	fill_disk "format=raw,vdev=xvdy,access=rw,script=block-pvblkd,target=memory:ram:128M"
}

stop_pvblkd() {
	kill $pvblkd
	sed 's/^/pvblkd: /' /run/pvblkd.out >&9
}

start_domain() {
	cat >/guests/storage.cfg <<-'END'
		name="storage"
		type="pvh"
		kernel="/guests/driver-domain"
		cmdline="ram0=128m"
		memory=256
		vcpus=1
		tsc_mode="native"
		driver_domain=1
	END
	xl create /guests/storage.cfg >&9 2>&1
	sleep 1
	fill_disk "format=raw,vdev=xvdy,access=rw,backend=storage,target=ram0"
}

stop_domain() {
	tail -n 20 /var/log/xen/console/guest-storage.log | sed 's/^/storage: /' >&9
	xl destroy storage
}

# memory: reports what the daemon has in memory of its own while a guest uses its disks, in KiB. The
# disks' contents are not counted: they are files.
memory() {
	sleep 1.5
	say "MEMORY $(sed -n 's/^RssAnon:[^0-9]*\([0-9]*\).*/\1/p' /proc/$pvblkd/status)"
}

scenario() {
	load brd rd_nr=1 rd_size=$((128 * 1024))
	fill /dev/ram0
	sync
	serving=
	while read -r name backend; do
		if [ "$backend" != "$serving" ]; then
			[ -z "$serving" ] || stop_$serving
			start_$backend </dev/null
			serving=$backend
		fi
		# Xen clears the memory of the guest before, when there is nothing else to do.
		sleep 3
		say "CASE $name"
		/bin/mark
		case $name in idle-* | busy-*) memory & ;; esac
		guest "$name" 600 later </dev/null
		say "ENDED $ended"
	done </guests/cases
}
