# Our driver domain: a guest named `storage` that serves its memory. dom0 reaches what its disks
# hold as a guest of its own. There is no devd: the domain answers xl by itself.
#
# It has a disk of its own, too, which it forwards: pvblkd serves that, from a file of dom0, and is what
# dies where its store is to die.
. /pvblkd.sh

own=/tmp/own.img

# Direct and through the page cache.
store_settings() { # N
	echo "[defaults]"
	[ $(($1 % 2)) = 0 ] || echo "buffered = true"
}

# The driver domain says it by itself.
backend_served() {
	:
}

store_end() { # N
	backend_end "$1"
}

store_begin() { # N
	backend_begin "$1"
}

backend_up() {
	load xen-blkfront
	truncate -s ${raw_mib}M $own
	pvblkd_up || return 1
	cat >/guests/storage.cfg <<-END
		name="storage"
		type="pvh"
		kernel="/guests/driver-domain"
		cmdline="ram0=24M ram1=64M ram2=16M"
		memory=256
		vcpus=1
		tsc_mode="native"
		driver_domain=1
		disk=["$(pvblkd_disk $own xvdb w)"]
		on_crash="preserve"
	END
	xl create /guests/storage.cfg >&9 2>&1
}

domain_disk() { # image|raw|other|forwarded VDEV r|w
	case $1 in
	image) target=ram0 ;;
	raw) target=ram1 ;;
	other) target=ram2 ;;
	forwarded) target=disk:xvdb ;;
	esac
	case $3 in
	r) access=ro ;;
	w) access=rw ;;
	esac
	echo "format=raw,vdev=$2,access=$access,backend=storage,target=$target"
}

backend_reset() { # SECTOR
	# Once: no guest can write to it.
	[ -n "$filled" ] || through_dom0 "$(domain_disk image xvdy w)" write $image
	filled=1
	through_dom0 "$(domain_disk "$disk" xvdy w)" clear
}

backend_disk() {
	domain_disk "$@"
}

backend_content() { # [other]
	through_dom0 "$(domain_disk "${1:-raw}" xvdy r)" read $raw
	echo $raw
}

# What it has said since the last time: of this guest and no other.
backend_release() {
	cp /var/log/xen/console/guest-storage.log /tmp/said
	tail -n +$((told + 1)) /tmp/said | sed 's/^/storage: /' >&9
	sed 's/^/pvblkd: /' $pvblkd_log >&9
	: >$pvblkd_log
	told=$(wc -l </tmp/said)
	rm -f $raw /tmp/said
}
