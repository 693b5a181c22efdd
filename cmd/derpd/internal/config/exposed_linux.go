package config

import "golang.org/x/sys/unix"

// inMemory reports whether a path is on tmpfs or ramfs.
func inMemory(path string) bool {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false
	}
	kind := uint32(fs.Type) // has another size and sign on each architecture
	return kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC
}
