package host

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// minOpenFiles is enough for a few thousand clients: each needs one open file.
const minOpenFiles = 4096

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
