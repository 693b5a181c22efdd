package main

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
		t.Error("no container, and yet the data is lost with it")
	}
	if err := os.WriteFile(filepath.Join(root, ".dockerenv"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !lostWithContainer(root, data) {
		t.Error("a directory of the container itself is not found out")
	}
	// Another file system stands for a volume; every Linux has this one.
	if lostWithContainer(root, "/proc") {
		t.Error("a mount is called lost")
	}
}
