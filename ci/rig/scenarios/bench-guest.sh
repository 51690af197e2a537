#!/bin/sh
# The first program of a Linux guest that measures. What it is to do is on the kernel's command
# line: `task=first-read`, or `task=fio case=PATTERN-BLOCK-DEPTH-COUNT`.
#
# While it measures it writes nothing: a console keeps dom0 busy.
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp

verdict() {
	echo "VERDICT $*"
	poweroff -f
}

# option NAME: its value on the kernel's command line.
option() {
	sed -n "s/.*\<$1=\([^ ]*\).*/\1/p" /proc/cmdline
}

disk() {
	insmod /lib/modules/xen-blkfront.ko "$@" || verdict FAIL "no xen-blkfront"
	until [ -b /dev/xvda ]; do
		usleep 1000
	done
}

first_read() {
	disk
	dd if=/dev/xvda of=/tmp/block bs=4k count=1 iflag=direct 2>/dev/null
	mark
	magic=$(dd if=/tmp/block bs=1 skip=1080 count=2 2>/dev/null | xxd -p)
	[ "$magic" = 53ef ] || verdict FAIL "the first block is not what it must be"
	echo "FIRST-READ verified"
}

# job PATTERN BLOCK DEPTH COUNT: one run of fio, over and over the disk if need be.
job() {
	case $2 in
	*m) kib=$((${2%m} * 1024)) ;;
	*) kib=${2%k} ;;
	esac
	fio --name=job --filename=/dev/xvda --direct=1 --ioengine=libaio --thread --rw="$1" --bs="$2" \
		--iodepth="$3" --io_size=$(($4 * kib))k --output-format=terse --terse-version=3
}

run_fio() {
	disk max_indirect_segments=256 max_ring_page_order=4
	echo none >/sys/block/xvda/queue/scheduler
	case=$(option case)
	set -- $(echo "$case" | tr - ' ')
	# Once through, so that the grants that are kept are there, and fio is in memory.
	job "$1" "$2" "$3" $(($3 * 4)) >/dev/null
	mark
	job "$1" "$2" "$3" "$4" >/dev/null
	mark
	job "$1" "$2" "$3" $(($4 * 2)) >/tmp/report
	mark
	clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
	[ "$clock" = tsc ] || verdict FAIL "the clock is $clock"
	grep -qF '[none]' /sys/block/xvda/queue/scheduler || verdict FAIL "there is a scheduler"
	echo "FIO $(tail -n 1 /tmp/report)"
}

case $(option task) in
first-read) first_read ;;
fio) run_fio ;;
*) verdict FAIL "no task" ;;
esac
verdict PASS
