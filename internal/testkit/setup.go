package testkit

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Setup creates files below a directory, for rows of a test's table.
type Setup = func(t *testing.T, dir string)

// File is the setup of one file with mode 0600.
func File(name, content string) Setup {
	return func(t *testing.T, dir string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// Pair is the setup of base.crt and base.key. Both files contain a self-signed
// certificate for name, valid from a time for ten years, and its key.
func Pair(base, name string, from time.Time) Setup {
	return func(t *testing.T, dir string) {
		t.Helper()
		c := NewCertificate(t, Certificate{Names: []string{name}, NotBefore: from.AddDate(0, 0, -1), NotAfter: from.AddDate(10, 0, 0)})
		content := string(ChainPEM(c)) + string(KeyPEM(t, c))
		File(base+".crt", content)(t, dir)
		File(base+".key", content)(t, dir)
	}
}
