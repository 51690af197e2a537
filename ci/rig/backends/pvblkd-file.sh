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
	[ "$disk" != device ] || fresh_device
	truncate -s ${other_mib}M $other
}

# fresh_device: /dev/nullb0 is a block device of zeroes that has discard, and no command that writes
# zeroes, as those of LVM thin have.
fresh_device() {
	[ -d /sys/module/configfs ] || load configfs
	rmmod null_blk 2>/dev/null
	load null_blk gb=1 memory_backed=1 discard=1
}

backend_disk() { # image|raw|mapped|other|device VDEV r|w
	case $1 in
	image) pvblkd_disk $image "$2" "$3" ;;
	raw) pvblkd_disk $raw "$2" "$3" ;;
	mapped) pvblkd_disk $mapped "$2" "$3" ;;
	other) pvblkd_disk $other "$2" "$3" ;;
	device) pvblkd_disk /dev/nullb0 "$2" "$3" ;;
	esac
}

backend_resize() { # GUEST MIB
	pvblkd resize "$1" xvdb "$2M" >&9 2>&1
}

backend_content() { # [other]
	[ "$1" = other ] && echo $other || echo $raw
}

# The kernel's documentation, `block/stat`: the 12th number is discards.
store_release() {
	[ "$disk" = device ] || return
	say "DEVICE write-zeroes=$(cat /sys/block/nullb0/queue/write_zeroes_max_bytes)" \
		"discards=$(tr -s ' ' </sys/block/nullb0/stat | sed 's/^ //' | cut -d ' ' -f 12)"
}
