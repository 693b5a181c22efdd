package main

import "golang.org/x/sys/unix"

// lostWithContainer reports whether what is written to dir is gone when the
// container is made anew: dir is part of the container's own file system. The
// file system of the container begins at root.
func lostWithContainer(root, dir string) bool {
	var top, data unix.Stat_t
	return inContainer(root) && unix.Stat(root, &top) == nil && unix.Stat(dir, &data) == nil && top.Dev == data.Dev
}
