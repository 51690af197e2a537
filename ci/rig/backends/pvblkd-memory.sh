# pvblkd, which serves its own memory. Such a disk has a name, and is there from when somebody first
# names it until the daemon ends; dom0 reaches what it holds as a guest of its own.
. /pvblkd.sh

store_settings() { # N
	:
}

store_up() {
	load xen-blkfront
}

memory_disk() { # image|raw VDEV r|w
	case $1 in
	image) pvblkd_disk "memory:image:24M" "$2" "$3" ;;
	raw) pvblkd_disk "memory:raw:${raw_mib}M" "$2" "$3" ;;
	esac
}

backend_disk() {
	memory_disk "$@"
}

backend_reset() { # SECTOR
	# Once: no guest can write to it.
	[ -n "$filled" ] || through_dom0 "$(memory_disk image xvdy w)" write $image
	filled=1
	through_dom0 "$(memory_disk raw xvdy w)" clear
}

backend_content() {
	through_dom0 "$(memory_disk raw xvdy r)" read $raw
	echo $raw
}

store_release() {
	rm -f $raw
}
