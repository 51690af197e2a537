# QEMU's qdisk: a process in dom0 for each guest, which libxl starts.

backend_up() {
	:
}

backend_reset() { # SECTOR
	rm -f $raw
	truncate -s ${raw_mib}M $raw
}

# All disks can be written: QEMU 7.2 cannot make a read-only one ("Block node is read-only").
backend_disk() { # image|raw VDEV r|w
	case $1 in
	image) file=$image ;;
	raw) file=$raw ;;
	esac
	echo "format=raw,vdev=$2,access=rw,backendtype=qdisk,target=$file"
}

backend_content() {
	echo $raw
}

# What QEMU had to say.
backend_release() {
	for file in /var/log/xen/qemu-dm-*.log; do
		sed 's/^/qemu: /' "$file" >&9
		rm -f "$file"
	done
}
