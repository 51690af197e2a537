# pvblkd, which serves files of dom0.
. /pvblkd.sh

# The same file under another name, by which the daemon knows it as a disk with other settings.
mapped=/tmp/mapped.img
other=/tmp/other.img

# Direct, through the page cache, by plain system calls, and both.
store_settings() { # N
	echo "[defaults]"
	[ $(($1 % 2)) = 0 ] || echo "buffered = true"
	[ $(($1 / 2 % 2)) = 0 ] || echo "synchronous = true"
	cat <<-END
		[[disk]]
		target = "$mapped"
		data-path = "map"
	END
}

store_up() {
	:
}

backend_reset() { # SECTOR
	rm -f $raw
	truncate -s ${raw_mib}M $raw
	ln -f $raw $mapped
	rm -f $other
	truncate -s ${other_mib}M $other
}

backend_disk() { # image|raw|mapped|other VDEV r|w
	case $1 in
	image) pvblkd_disk $image "$2" "$3" ;;
	raw) pvblkd_disk $raw "$2" "$3" ;;
	mapped) pvblkd_disk $mapped "$2" "$3" ;;
	other) pvblkd_disk $other "$2" "$3" ;;
	esac
}

backend_resize() { # GUEST MIB
	pvblkd resize "$1" xvdb "$2M" >&9 2>&1
}

backend_content() { # [other]
	[ "$1" = other ] && echo $other || echo $raw
}

store_release() {
	:
}
