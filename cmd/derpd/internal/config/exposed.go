package config

import (
	"fmt"
	"os"
	"slices"
)

// Exposed returns warnings about private files that other users may read, and about
// directories in which other users may replace them. Each call reads the modes again.
//
// A group is not another user: certificates are often shared with a group, and
// Kubernetes gives a volume to a group (fsGroup). Files on a file system in memory are
// left out. Kubernetes and Docker's swarm mode mount secrets there, readable by every
// user of the container, which has one user.
func (c *Config) Exposed() []string {
	private := []string{c.Storage.NodeKeyFile()}
	directories := []string{c.Storage.DataDir}
	switch c.Certificate.Mode {
	case ModePinned:
		private = append(private, c.Certificate.Pinned.Path)
		directories = append(directories, c.Storage.CertDir)
	case ModeManual:
		private = append(private, c.Certificate.Manual.KeyFile)
	case ModeLetsEncrypt:
		directories = append(directories, c.Storage.CertDir)
	}
	if len(c.environment.files) > 0 {
		for _, v := range c.environment.variables() {
			if path := c.environment.files[v.Name]; path != "" && v.Secret() {
				private = append(private, path)
			}
		}
	}
	var warnings []string
	for _, path := range private {
		if mode, ok := modeOf(path); ok && mode&0o007 != 0 {
			warnings = append(warnings, fmt.Sprintf("%s may be read by other users (mode %04o); run chmod o= %s", path, mode, path))
		}
	}
	slices.Sort(directories)
	for _, path := range slices.Compact(directories) {
		if mode, ok := modeOf(path); ok && mode&0o002 != 0 {
			warnings = append(warnings, fmt.Sprintf("other users may replace the files in %s (mode %04o); run chmod o= %s", path, mode, path))
		}
	}
	return warnings
}

// modeOf returns the permissions of a path on disk.
func modeOf(path string) (mode os.FileMode, ok bool) {
	info, err := os.Stat(path)
	if err != nil || inMemory(path) {
		return 0, false
	}
	return info.Mode().Perm(), true
}
