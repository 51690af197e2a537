# What the columns of pvblkd share. xen-blkback is not loaded: the daemon owns `backend/vbd`, and
# guests' disks are plain lines of xl's configuration. Its stores are named by `target=`; a target
# that is no file of dom0 is left alone by libxl as long as there is a `script=`.

pvblkd_log=/var/log/pvblkd.log
# Its settings: those of a column are written by store_up.
pvblkd_config=/etc/xen/pvblkd.toml

# start_pvblkd: runs it, with its log among the reports.
start_pvblkd() {
	: >>$pvblkd_log
	pvblkd serve --config $pvblkd_config >>$pvblkd_log 2>&1 &
	pvblkd_pid=$!
	echo $pvblkd_pid >/run/pvblkd.pid
}

backend_up() {
	cat >/etc/xen/scripts/block-pvblkd <<-'END'
		#!/bin/sh
		# libxl's hotplug script for disks that pvblkd serves: there is nothing to prepare.
		[ "$1" != add ] || xenstore-write "$XENBUS_PATH/hotplug-status" connected
	END
	chmod +x /etc/xen/scripts/block-pvblkd
	: >$pvblkd_config
	store_up || return 1
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
