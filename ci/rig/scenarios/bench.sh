# Guests that measure, one after the other, all on the same RAM disk. /guests/cases has a line for
# each: its name.

scenario() {
	load brd rd_nr=1 rd_size=$((128 * 1024))
	load xen-blkback
	# Every page is there before anybody measures; the first block holds what a guest looks for.
	dd if=/dev/zero of=/dev/ram0 bs=1M count=128 2>/dev/null
	printf '\123\357' | dd of=/dev/ram0 bs=1 seek=1080 conv=notrunc 2>/dev/null
	sync
	while read -r name; do
		# Xen clears the memory of the guest before, when there is nothing else to do.
		sleep 3
		say "CASE $name"
		/bin/mark
		guest "$name" 600 later </dev/null
		say "ENDED $ended"
		[ $ended = poweroff ] || return 1
	done </guests/cases
}
