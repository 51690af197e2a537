# What the columns of pvblkd share. xen-blkback is not loaded: the daemon owns `backend/vbd`, and
# guests' disks are plain lines of xl's configuration. Its stores are named by `target=`; a target
# that is no file of dom0 is left alone by libxl as long as there is a `script=`.

pvblkd_log=/var/log/pvblkd.log
# Its settings: `store_settings N` of a column prints them, those of every day first.
pvblkd_config=/etc/xen/pvblkd.toml

# start_pvblkd: runs it, with its log among the reports.
start_pvblkd() {
	: >>$pvblkd_log
	pvblkd serve --config $pvblkd_config >>$pvblkd_log 2>&1 &
	pvblkd_pid=$!
	echo $pvblkd_pid >/run/pvblkd.pid
}

backend_up() {
	store_up && pvblkd_up
}

pvblkd_up() {
	cat >/etc/xen/scripts/block-pvblkd <<-'END'
		#!/bin/sh
		# libxl's hotplug script for disks that pvblkd serves: there is nothing to prepare.
		[ "$1" != add ] || xenstore-write "$XENBUS_PATH/hotplug-status" connected
	END
	chmod +x /etc/xen/scripts/block-pvblkd
	store_settings 0 >$pvblkd_config
	start_pvblkd
	marker $pvblkd_log '.*serving' 30 && return
	sed 's/^/pvblkd: /' $pvblkd_log >&9
	return 1
}

# In a file: those that kill it are not those that started it.
backend_kill() {
	kill -9 "$(cat /run/pvblkd.pid)"
}

backend_restart() {
	start_pvblkd
}

# dies PID SIGNAL: sends it, and waits until that program is over.
dies() {
	kill "-$2" "$1"
	tries=0
	until [ ! -d "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status"; do
		tries=$((tries + 1))
		[ $tries -lt 200 ] || say "process $1 does not end"
		usleep 50000
	done
}

backend_end() { # N
	[ $(($1 % 2)) = 0 ] && signal=KILL || signal=TERM
	dies "$(cat /run/pvblkd.pid)" $signal
}

backend_begin() { # N
	store_settings "$1" >$pvblkd_config
	start_pvblkd
}

backend_serves() {
	pvblkd list --json 2>/dev/null | grep -q '"state": *"Connected"'
}

# pvblkd_disk TARGET VDEV r|w
pvblkd_disk() {
	case $3 in
	r) access=ro ;;
	w) access=rw ;;
	esac
	echo "format=raw,vdev=$2,access=$access,script=block-pvblkd,target=$1"
}

# A line of JSON.
backend_served() {
	say "SERVED $(pvblkd list --json | tr -d '\n')"
}

# What it has said since the last time.
backend_release() {
	sed 's/^/pvblkd: /' $pvblkd_log >&9
	: >$pvblkd_log
	store_release
}
