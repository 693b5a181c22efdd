package host

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// minOpenFiles is enough for a few thousand clients: each needs one open file.
const minOpenFiles = 4096

// maxReserve is the number of descriptors that strangers leave: for the self-check,
// the admin and health listeners, questions about clients, and files.
const maxReserve = 64

// maxDescriptors stands for RLIM_INFINITY, among others.
const maxDescriptors = 1 << 30

// LastDescriptor is the highest descriptor of a listener that leaves a part of the
// reserve to others: 1 leaves all of the reserve, 2 leaves half. The result is 0 if the
// process has no limit.
func LastDescriptor(part int) int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return lastDescriptor(limit.Cur, part)
}

func lastDescriptor(limit uint64, part int) int {
	limit = min(limit, maxDescriptors)
	return int(limit-min(maxReserve, limit/4)/uint64(part)) - 1
}

// MaxConnections is the number of connections that leaves two reserves of descriptors: one
// for what derpd itself opens, and the one that [LastDescriptor] leaves.
func MaxConnections() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return maxDescriptors
	}
	return maxConnections(limit.Cur)
}

func maxConnections(limit uint64) int {
	limit = min(limit, maxDescriptors)
	return int(limit - 2*min(maxReserve, limit/4))
}

// OpenFilesFor is the limit of open files that a number of connections needs.
func OpenFilesFor(connections int) int { return connections + 2*maxReserve }

// OpenFilesWarning describes a limit on open files that is too low for a relay.
// It is empty when the limit is high enough. Go has already raised the soft
// limit to the hard limit.
func OpenFilesWarning() string {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return ""
	}
	return openFilesWarning(limit.Max)
}

func openFilesWarning(limit uint64) string {
	if limit >= minOpenFiles {
		return ""
	}
	return fmt.Sprintf("the limit of open files is %d, and each client needs one: raise it with --ulimit nofile=65536:65536 (docker), ulimits (compose), LimitNOFILE=65536 (systemd) or ulimit -Hn", limit)
}
