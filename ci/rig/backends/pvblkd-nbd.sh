# pvblkd, which serves what an NBD server has: nbdkit, on loopback, with files of dom0.
. /pvblkd.sh

nbd_folder=/tmp/nbd
nbd_port=10809

# start_nbd: serves each file of the folder under its name. nbdkit has itself ended when its parent
# ends (PR_SET_PDEATHSIG), so it gets one that waits for it.
start_nbd() {
	(
		nbdkit --foreground --ipaddr 127.0.0.1 --port $nbd_port --pidfile /run/nbdkit.pid \
			file dir=$nbd_folder >>/var/log/nbdkit.log 2>&1
		:
	) &
	tries=0
	until nbd_greets; do
		tries=$((tries + 1))
		if [ $tries -ge 50 ]; then
			sed 's/^/nbdkit: /' /var/log/nbdkit.log >&9
			return 1
		fi
		usleep 100000
	done
}

# nbd_greets: whether somebody speaks NBD there.
nbd_greets() {
	nc -w 1 127.0.0.1 $nbd_port </dev/null 2>/dev/null | head -c 16 | grep -q NBDMAGICIHAVEOPT
}

# nbd_read EXPORT OFFSET BYTES: what the server has there, by the old way of choosing an export
# (NBD_OPT_EXPORT_NAME, without zeroes after it).
nbd_read() {
	{
		printf '\0\0\0\3IHAVEOPT\0\0\0\1'
		printf "$(printf '\\%03o' 0 0 0 ${#1})%s" "$1"
		printf '\45\140\225\23\0\0\0\0\0\0\0\0\0\0\0\1'
		big_endian 8 "$2"
		big_endian 4 "$3"
		sleep 1
	} | nc 127.0.0.1 $nbd_port | tail -c "$3"
}

# big_endian BYTES NUMBER
big_endian() {
	at=$1
	while [ "$at" -gt 0 ]; do
		at=$((at - 1))
		printf "$(printf '\\%03o' $(($2 >> (8 * at) & 255)))"
	done
}

# The server dies as it stands; what it has written is in its files, that is in dom0's page cache,
# which lives on.
store_kill() {
	kill -9 "$(cat /run/nbdkit.pid)"
}

store_restart() {
	start_nbd
}

# A server that is killed loses nothing here. By default a flush after that fails, and the guest's file
# system or fio with it, for it might have.
store_settings() { # N
	printf '[defaults]\nnbd-durability = "trusted"\n'
}

store_end() { # N
	[ $(($1 % 2)) = 0 ] && signal=KILL || signal=TERM
	dies "$(cat /run/nbdkit.pid)" $signal
}

store_begin() { # N
	start_nbd
}

store_up() {
	ip link set lo up
	mkdir -p $nbd_folder
	ln -sf $image $nbd_folder/image
	start_nbd
}

backend_reset() { # SECTOR
	rm -f $nbd_folder/raw
	truncate -s ${raw_mib}M $nbd_folder/raw
}

backend_disk() { # image|raw VDEV r|w
	pvblkd_disk "nbd://127.0.0.1:$nbd_port/$1" "$2" "$3"
}

backend_content() {
	echo $nbd_folder/raw
}

store_release() {
	:
}
