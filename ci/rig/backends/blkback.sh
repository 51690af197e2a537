# Linux's xen-blkback, on loop devices.

backend_up() {
	load xen-blkback max_queues=4
}

backend_reset() { # SECTOR
	rm -f $raw
	truncate -s ${raw_mib}M $raw
	# By its path: busybox would run its own, which cannot set a sector size.
	/sbin/losetup -r -b "$1" /dev/loop0 $image 2>&9
	/sbin/losetup -b "$1" /dev/loop1 $raw 2>&9
}

backend_disk() { # image|raw VDEV r|w
	case $1 in
	image) echo "phy:/dev/loop0,$2,$3" ;;
	raw) echo "phy:/dev/loop1,$2,$3" ;;
	esac
}

backend_content() {
	echo $raw
}

backend_release() {
	/sbin/losetup -d /dev/loop0
	/sbin/losetup -d /dev/loop1
}
