package host

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLostWithContainer(t *testing.T) {
	root := t.TempDir()
	data := filepath.Join(root, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if lostWithContainer(root, data) {
		t.Error("reported as lost outside a container")
	}
	if err := os.WriteFile(filepath.Join(root, ".dockerenv"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !lostWithContainer(root, data) {
		t.Error("a directory of the container itself is not reported")
	}
	// /proc is a file system of its own, as a volume is.
	if lostWithContainer(root, "/proc") {
		t.Error("a mounted volume is reported as lost")
	}
}
