# One column of the matrix: a backend, and guests that use its disks one after the other.
#
# /backend.sh is a file of ci/rig/backends. It defines:
#
#   backend_up                starts the backend, once a boot
#   backend_reset SECTOR      disk `image` holds $image and can be read; `raw` holds zeroes ($raw_mib MiB)
#   backend_disk DISK VDEV r|w   prints that disk as xl's configuration has it; `mapped` is `raw`, but
#                             the backend maps pages that it does not keep; `other` is another one;
#                             `device` is a block device; `forwarded` is a disk of a driver domain's own
#   backend_content [other]   prints a file or device of dom0 that shows what `raw` (or that) holds
#   backend_release           after a guest is gone
#   backend_kill, backend_restart   kills the backend with its disks in use; starts it again
#   store_kill, store_restart       the same with what it has its data from
#   backend_end N             ends the backend in an orderly way (N odd) or not; backend_begin N
#                             starts it again with other settings
#   store_end N, store_begin N      the same with what it has its data from
#   backend_serves            whether guests' disks are connected
#   backend_resize GUEST MIB  gives the guest's disk that size
#
# (all from `backend_kill` on, `mapped`, `other`, `device` and `forwarded`, where that can be done) and, where xl's own way is
# not the way, backend_plug and backend_unplug; where it can say what it has done for its guests,
# backend_served.
#
# /guests/cells has a line for each guest: NAME KIND SECONDS SECTOR DISK live|later. KIND is
#
#   unikernel   does its work and ends
#   linux       the same, but has its disk taken away and given back between
#   brief       does less, and keeps its disk
#   resize      the same, but its disk grows while it writes
#   crash       is destroyed while it writes
#   hostile     breaks the rules on `other`, while another guest does its work
#   deaths-backend, deaths-store   makes random requests, while that dies at random moments
#   history     makes random requests
#   rings       has a new ring each time that the backend was killed, before that is started again
#   kill-backend, kill-store   as linux, but that is killed and started again while the guest
#               writes its tree, and under load

image=/guests/ext4.img
raw=/tmp/raw.img
raw_mib=64
other_mib=16

backend_served() {
	:
}

# look GUEST: what can be told of its disk only while it is connected.
look() {
	say "PROTOCOL $(xenstore-read "/local/domain/$(xl domid "$1")/device/vbd/51728/protocol")"
	backend_served
}

# backend_plug GUEST: gives the running guest its disk.
backend_plug() {
	xl block-attach "$1" "$(backend_disk "$disk" xvdb w)" >&9 2>&1
}

# backend_unplug GUEST
backend_unplug() {
	xl block-detach "$1" xvdb >&9 2>&1
}

# through_dom0 SPECIFICATION write FILE | read FILE | clear: dom0 as a guest of the backend: copies
# a file to the start of the disk, copies all of the disk to a file, or discards all of it, which
# has it read as zeroes.
# Needs xen-blkfront. The disk is xvdy in SPECIFICATION.
through_dom0() {
	xl block-attach 0 "$1" >&9 2>&1
	tries=0
	until [ -b /dev/xvdy ] || [ $tries -ge 200 ]; do
		tries=$((tries + 1))
		usleep 50000
	done
	case $2 in
	write) dd if="$3" of=/dev/xvdy bs=1M conv=fsync 2>/dev/null ;;
	read) dd if=/dev/xvdy of="$3" bs=1M 2>/dev/null ;;
	clear) blkdiscard /dev/xvdy ;;
	esac || say "dom0: cannot $2 /dev/xvdy"
	xl block-detach 0 xvdy >&9 2>&1
}

# marker LOG WORDS SECONDS: waits until the guest's console has that line.
marker() {
	tries=0
	until grep -q "^$2" "$1" 2>/dev/null; do
		tries=$((tries + 1))
		[ $tries -lt $(($3 * 10)) ] || return 1
		usleep 100000
	done
}

# ranges LOG FILE: reads what the guest says the disk holds, and reports what is there.
ranges() {
	tr -d '\r' <"$1" | sed -n 's/^RANGE \([0-9]*\) \([0-9]*\) .*/\1 \2/p' | sort -u |
		while read -r offset mib; do
			sum=$(dd if="$2" bs=1M skip="$offset" count="$mib" 2>/dev/null | sha256sum)
			say "FOUND RANGE $offset $mib ${sum%% *}"
		done
}

# tree FILE: reports the files of the file system on its first partition.
tree() {
	/sbin/losetup -r -o $((1 << 20)) --sizelimit $((32 << 20)) /dev/loop7 "$1" 2>&9
	mkdir -p /mnt
	if mount -t ext4 -o ro,noload /dev/loop7 /mnt 2>&9; then
		(
			cd /mnt || exit
			find . -type f -print0 | sort -z >/tmp/names
			xargs -0 sha256sum </tmp/names | cut -c -64 >/tmp/sums
			xargs -0 stat -c '%s %n' </tmp/names | sed 's/ \.\// \//' | paste -d ' ' /tmp/sums - |
				sed 's/^/FOUND FILE /' >&9
		)
		umount /mnt
	fi
	/sbin/losetup -d /dev/loop7
}

# mapped DOMID: how many of the guest's grants somebody has mapped, as Xen itself sees it.
mapped() {
	xl dmesg -c >/dev/null
	xl debug-keys g
	xl dmesg | awk -v domain="d$1" '
		/grant-table for remote/ { inside = ($0 ~ "remote " domain "( |$)") }
		inside && /\[0x/ { count++ }
		END { print count + 0 }'
}

# lingers DOMID: 1 if Xen still has the domain: it cannot go while its pages are mapped.
lingers() {
	xl list | awk -v domain="$1" '$2 == domain { found = 1 } END { print found + 0 }'
}

# gone DOMID: reports what is left of a guest that was destroyed.
gone() {
	tries=0
	while [ "$(lingers "$1")" = 1 ] && [ $tries -lt 50 ]; do
		tries=$((tries + 1))
		usleep 100000
	done
	say "LEFT $(mapped "$1") $(lingers "$1")"
}

# crash NAME: destroys the guest, which writes, and reports what is left of it.
crash() {
	sleep 2
	crashed=$(xl domid "$1")
	say "MAPPED $(mapped "$crashed")"
	xl destroy "$1" >&9 2>&1
	gone "$crashed"
}

# hostile NAME: that guest is given `other` once one beside it is at work. Leaves the console of that one
# in $log.
hostile() {
	working=/var/log/xen/console/guest-$1-beside.log
	{
		until xl domid "$1" >/dev/null 2>&1; do usleep 100000; done
		how=silent
		one_guest "$1-beside" unikernel
		say "BESIDE $ended"
	} &
	beside=$!
	{
		marker $working 'NEGOTIATED device=xvdb' "$seconds"
		xl block-attach "$1" "$(backend_disk other xvdb w)" >&9 2>&1
		# After that it uses its disk as one should.
		marker "/var/log/xen/console/guest-$1.log" 'HOSTILE last' "$seconds" || return
		grep -q VERDICT $working || say "MEANWHILE the one beside it worked"
	} &
	disturber=$!
	cp "/guests/$1.xl" "/guests/$1.cfg"
	guest "$1" "$seconds" "$how"
	kill $disturber 2>/dev/null
	say "HOSTILE $domain"
	gone "$domain"
	wait $beside
	sed "s/^/GUEST $1-beside|/" $working >&9
	ranges "$log" "$(backend_content other)"
	log=$working
}

# strike backend|store: kills it and starts it again.
strike() {
	sleep 1
	"$1_kill"
	say "KILLED the $1 at $(uptime)"
	sleep 1
	"$1_restart"
}

# a_while SEED MICROSECONDS: sleeps up to so long.
a_while() {
	usleep "$(awk -v seed="$1" -v most="$2" 'BEGIN { srand(seed); print int(rand() * most) }')"
}

# progress LOG COUNT: waits until the guest has told more than so many times how far it is.
progress() {
	tries=0
	until [ "$(grep -c '^HISTORY\|^VERDICT' "$1")" -gt "$2" ]; do
		tries=$((tries + 1))
		[ $tries -lt $((seconds * 10)) ] || return 1
		usleep 100000
	done
}

# deaths backend|store LOG: ends it and starts it again, six times or until the guest has done its work,
# each time when the guest has come further.
deaths() {
	count=0
	far=0
	marker "$2" HISTORY "$seconds" || return
	while [ $count -lt 6 ] && progress "$2" $far && ! grep -q '^HISTORY [ew]\|^VERDICT' "$2"; do
		a_while $((2 * count)) 200000
		far=$(grep -c ^HISTORY "$2")
		"$1_end" $count
		a_while $((2 * count + 1)) 300000
		"$1_begin" $count
		count=$((count + 1))
		tries=0
		until backend_serves || [ $tries -ge 100 ]; do
			tries=$((tries + 1))
			usleep 100000
		done
		say "SERVES again after death $count, at $(uptime)"
	done
	say "DEATHS $count"
}

# rings NAME LOG: kills the backend, has the guest forget its ring and publish a new one, and starts the
# backend again, until the guest has done its work.
rings() {
	count=0
	while marker "$2" "RINGS at work $count\|HISTORY [ew]\|VERDICT" "$seconds" &&
		! grep -q '^HISTORY [ew]\|^VERDICT' "$2"; do
		domain=$(xl domid "$1")
		a_while $((2 * count)) 500000
		backend_end 0
		# A guest's kernel cannot know: here it does not have its pages before they are free.
		until [ "$(mapped "$domain")" -le 2 ]; do usleep 100000; done
		xenstore-write "/local/domain/$domain/data/rings" $((count + 1))
		marker "$2" "RINGS published $((count + 1))" "$seconds" || return
		a_while $((2 * count + 1)) 300000
		backend_begin $count
		count=$((count + 1))
	done
	say "DEATHS $count"
}

# disturb NAME KIND LOG: what dom0 does while the guest runs.
disturb() {
	case $2 in
	crash)
		marker "$3" WRITING "$seconds" || return
		crash "$1"
		return
		;;
	brief | resize)
		marker "$3" 'STEP .* load' "$seconds" || return
		look "$1"
		[ "$2" = resize ] || return
		marker "$3" RESIZE "$seconds" || return
		backend_resize "$1" "$(sed -n 's/^RESIZE \([0-9]*\).*/\1/p' "$3")"
		return
		;;
	deaths-*)
		deaths "${2#deaths-}" "$3"
		return
		;;
	rings)
		rings "$1" "$3"
		return
		;;
	kill-*)
		marker "$3" 'STEP .* tree' "$seconds" || return
		strike "${2#kill-}"
		marker "$3" 'STEP .* load' "$seconds" || return
		strike "${2#kill-}"
		;;
	unikernel | history) return ;;
	esac
	marker "$3" DETACH "$seconds" || return
	look "$1"
	backend_unplug "$1"
	content=$(backend_content)
	tree "$content"
	ranges "$3" "$content"
	backend_plug "$1"
}

# one_guest NAME KIND: its console is in $log afterwards.
one_guest() {
	{
		cat "/guests/$1.xl"
		printf 'disk=['
		[ "$2" != unikernel ] || printf '"%s",' "$(backend_disk image xvda r)"
		printf '"%s"]\n' "$(backend_disk "$disk" xvdb w)"
	} >"/guests/$1.cfg"
	rm -f "/var/log/xen/console/guest-$1.log"
	disturb "$1" "$2" "/var/log/xen/console/guest-$1.log" &
	disturber=$!
	guest "$1" "$seconds" "$how"
	case $2 in
	crash | deaths-* | rings) ;;
	*) kill $disturber 2>/dev/null ;;
	esac
	wait $disturber
}

attempt() { # NAME KIND SECONDS SECTOR DISK live|later
	seconds=$3
	disk=$5
	how=$6
	before=$(uptime)
	backend_reset "$4"
	case $2 in
	hostile) hostile "$1" ;;
	*) one_guest "$1" "$2" ;;
	esac
	[ "$2" != crash ] || one_guest "$1-next" unikernel
	say "ENDED $ended"
	content=$(backend_content)
	bytes=$(sed -n 's/^DISK-SHA256 [0-9a-f]* \([0-9]*\).*/\1/p' "$log" | tail -n 1)
	[ -z "$bytes" ] || say "DISK $(head -c "$bytes" "$content" | sha256sum | cut -d ' ' -f 1) $bytes"
	ranges "$log" "$content"
	case $2 in
	brief | resize) tree "$content" ;;
	esac
	backend_release
	say "SECONDS $before $(uptime)"
}

scenario() {
	load loop max_loop=8
	for module in crc16 mbcache jbd2 crc32c_generic libcrc32c ext4; do
		[ ! -f /lib/modules/$module.ko ] || load $module
	done
	. /backend.sh
	backend_up || return 1
	while read -r name kind seconds sector disk how; do
		say "CASE $name"
		attempt "$name" "$kind" "$seconds" "$sector" "$disk" "$how" </dev/null
		tries=1
		while emulator_fault "$domain" && [ $tries -lt 3 ]; do
			say "AGAIN the emulator entered the guest half way (a triple fault in Xen's own code)"
			tries=$((tries + 1))
			attempt "$name" "$kind" "$seconds" "$sector" "$disk" "$how" </dev/null
		done
	done </guests/cells
}
