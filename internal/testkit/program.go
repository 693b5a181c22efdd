package testkit

import (
	"os"
	"path/filepath"
	"testing"
)

// LinkAsDerpd links the test binary as derpd. Under that name TestMain runs a
// program instead of the tests.
func LinkAsDerpd(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "derpd")
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}
