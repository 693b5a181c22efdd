package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Private files and directories that other users may use are reported as long as that
// is so.
func TestExposed(t *testing.T) {
	dir := t.TempDir()
	if inMemory(dir) {
		t.Skip("the temporary directory is in memory, where files are left out")
	}
	data, secret := filepath.Join(dir, "data"), filepath.Join(dir, "secret")
	c := good(t, "DERP_DATA_DIR="+data)
	if list := c.Exposed(); len(list) != 0 {
		t.Errorf("before the first start: %q", list)
	}
	for _, path := range []string{data, filepath.Join(data, "certs")} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(secret, []byte("5ecfe7"), 0o600); err != nil {
		t.Fatal(err)
	}
	c = good(t, "DERP_DATA_DIR="+data, "DERP_TAILNET_API_KEY_FILE="+secret)
	private := []string{c.Storage.NodeKeyFile(), c.Certificate.Pinned.Path, secret}
	for _, path := range private {
		if err := os.WriteFile(path, []byte("5ecfe7"), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if list := c.Exposed(); len(list) != 0 {
		t.Errorf("readable by the group: %q", list)
	}
	for _, path := range append(private, data, c.Storage.CertDir) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		mode := info.Mode().Perm() | 0o004
		if info.IsDir() {
			mode |= 0o022
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if list := c.Exposed(); len(list) != 1 || !strings.Contains(list[0], path) || !strings.HasSuffix(list[0], "run chmod o= "+path) {
			t.Errorf("%s with mode %04o: %q", path, mode, list)
		}
		if err := os.Chmod(path, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	if list := c.Exposed(); len(list) != 0 {
		t.Errorf("after the fix: %q", list)
	}
}
