# Xen and its tools work at all.

scenario() {
	xl info | grep -E '^(xen_version|xen_caps|total_memory)' >&9
	xl list >&9
}
