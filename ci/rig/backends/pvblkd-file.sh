# pvblkd, which serves files of dom0.
. /pvblkd.sh

store_up() {
	:
}

backend_reset() { # SECTOR
	rm -f $raw
	truncate -s ${raw_mib}M $raw
}

backend_disk() { # image|raw VDEV r|w
	case $1 in
	image) pvblkd_disk $image "$2" "$3" ;;
	raw) pvblkd_disk $raw "$2" "$3" ;;
	esac
}

backend_resize() { # GUEST MIB
	pvblkd resize "$1" xvdb "$2M" >&9 2>&1
}

backend_content() {
	echo $raw
}

store_release() {
	:
}
