package config

import "golang.org/x/sys/unix"

// inMemory reports whether a path is on tmpfs or ramfs.
func inMemory(path string) bool {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false
	}
	return fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC
}
