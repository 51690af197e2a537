# Two guests at once, of the same image: the owner grants pages, the mapper maps and copies them.
# Between them they need what a toolstack does: each is told the other's number and may read the
# other's `data/foreign`; the owner is destroyed when the mapper asks for it.

# prepare DOMAIN PEER
prepare() {
	home=/local/domain/$1/data
	xenstore-write "$home/foreign" ""
	xenstore-chmod "$home/foreign" "n$1" "r$2"
	xenstore-write "$home/peer" "$2"
}

# ended DOMAIN: whether it has shut down, or is gone.
ended() {
	xl list "$1" >"/run/list.$1" 2>/dev/null || return 0
	grep -q -- '---s--\|----c-' "/run/list.$1"
}

scenario() {
	log=/var/log/xen/console
	for name in owner mapper; do
		xl create "/guests/$name.cfg" >"/run/$name.out" 2>&1 || {
			sed "s/^/dom0: xl: /" "/run/$name.out" >&9
			return 1
		}
		relay $name $log/guest-$name.log &
	done
	owner=$(xl domid owner)
	mapper=$(xl domid mapper)
	prepare "$owner" "$mapper"
	prepare "$mapper" "$owner"
	tries=0
	until ended "$mapper"; do
		tries=$((tries + 1))
		if [ $tries -gt 1200 ]; then
			say "dom0: the mapper does not end"
			break
		fi
		if [ -n "$owner" ] && xenstore-exists "/local/domain/$mapper/data/foreign/destroy"; then
			xl destroy "$owner"
			owner=
			xenstore-write "/local/domain/$mapper/data/destroyed" 1
		fi
		usleep 100000
	done
	usleep 200000 # xenconsoled drains what the guests wrote last
	touch /run/gone.owner /run/gone.mapper
	usleep 300000
	xl list >&9
	[ -z "$owner" ] || xl destroy "$owner"
	xl destroy "$mapper"
	# Nothing keeps the owner's memory once the mapper has let go of it.
	xl list >&9
	say "DOMAINS $(xl list | tail -n +2 | wc -l)"
}
