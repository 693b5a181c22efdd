package host

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// LostWithContainer reports whether dir belongs to the container's own file
// system. Its files are then lost when the container is replaced.
func LostWithContainer(dir string) bool { return lostWithContainer("/", dir) }

func lostWithContainer(root, dir string) bool {
	var top, data unix.Stat_t
	return inContainer(root) && unix.Stat(root, &top) == nil && unix.Stat(dir, &data) == nil && top.Dev == data.Dev
}

// inContainer reports whether Docker, Podman or CRI-O left its marker file.
func inContainer(root string) bool {
	for _, marker := range []string{".dockerenv", "run/.containerenv"} {
		if _, err := os.Stat(filepath.Join(root, marker)); err == nil {
			return true
		}
	}
	return false
}

// inPod reports whether the kubelet wrote the hosts file, as it does in every
// pod whatever the container runtime.
func inPod(root string) bool {
	hosts, err := os.ReadFile(filepath.Join(root, "etc/hosts"))
	return err == nil && strings.HasPrefix(string(hosts), "# Kubernetes-managed hosts file")
}
