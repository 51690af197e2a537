# The self test of pvblk-linux, with dom0 at both ends.

scenario() {
	/bin/selftest >&9 2>&9
}
