# Guests with two disks each, one guest after the other. /guests/cases has a line for each:
#
#   NAME SECTOR PERSISTENT SECONDS live|later|bytes
#
# SECTOR is the logical sector size of the disks, PERSISTENT whether the backend offers persistent
# grants, SECONDS how long the guest may run; then, how its console is reported (see `guest`).
# xvda is the file system image, read-only; xvdb is empty and may be written.

image=/guests/ext4.img
raw=/tmp/raw.img
raw_mib=64
parameters=/sys/module/xen_blkback/parameters

# node DOMAIN DEVICE FILE: what a frontend has written to XenStore, "-" if nothing.
node() {
	xenstore-read "/local/domain/$1/device/vbd/$2/$3" 2>/dev/null || echo -
}

# loop_device DEVICE SECTOR FILE [OPTION]
# By its path: busybox would run its own, which cannot set a sector size.
loop_device() {
	/sbin/losetup $4 -b "$2" "$1" "$3" 2>&9 || say "dom0: losetup $1 failed"
}

one_case() { # NAME SECTOR PERSISTENT SECONDS live|later|bytes
	say "CASE $1"
	attempt "$@"
	tries=1
	while emulator_fault "$domain" && [ $tries -lt 3 ]; do
		say "AGAIN the emulator entered the guest half way (a triple fault in Xen's own code)"
		tries=$((tries + 1))
		attempt "$@"
	done
}

attempt() {
	echo "$3" >$parameters/feature_persistent
	rm -f $raw
	truncate -s ${raw_mib}M $raw
	loop_device /dev/loop0 "$2" $image -r
	loop_device /dev/loop1 "$2" $raw
	before=$(uptime)
	guest "$1" "$4" "$5"
	say "SECONDS $before $(uptime)"
	say "ENDED $ended"
	# What the disk holds now, as far as the guest says that it should hold something.
	bytes=$(sed -n 's/^DISK-SHA256 [0-9a-f]* \([0-9]*\).*/\1/p' "$log" | tail -n 1)
	[ -z "$bytes" ] || say "DISK $(head -c "$bytes" $raw | sha256sum | cut -d ' ' -f 1) $bytes"
	/sbin/losetup -d /dev/loop0
	/sbin/losetup -d /dev/loop1
}

# Called by `guest` while the domain is still there.
before_destroy() { # DOMAIN
	say "NODES order=$(node "$1" 51728 ring-page-order)" \
		"queues=$(node "$1" 51728 multi-queue-num-queues)" \
		"feature-persistent=$(node "$1" 51728 feature-persistent)"
}

scenario() {
	load loop max_loop=4
	load xen-blkback max_queues=4
	late=0
	while read -r name sector persistent seconds how; do
		one_case "$name" "$sector" "$persistent" "$seconds" "$how" </dev/null
		[ $ended != timeout ] || late=$((late + 1))
		if [ $late -ge 3 ]; then
			say "dom0: three guests did not end in time: giving up"
			return 1
		fi
	done </guests/cases
}
