package testkit

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

// Registry is a running registry of images: distribution, which Docker Hub and others
// run as well.
type Registry struct {
	// Host is the registry's address and port on loopback. It speaks HTTP.
	Host string
	// Storage is the directory with its blobs.
	Storage string
}

// listening is the line in the registry's log that names its port.
var listening = regexp.MustCompile(`msg="listening on ([^"]+)"`)

// StartRegistry starts an empty registry that ends with the test. The test is skipped
// when the program that DERPD_REGISTRY names has not been built.
func StartRegistry(t testing.TB) *Registry {
	t.Helper()
	return startRegistry(t, "")
}

// StartPrivateRegistry starts a registry as StartRegistry does. It answers only to a
// login by this user and password.
func StartPrivateRegistry(t testing.TB, user, password string) *Registry {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(file, []byte(user+":"+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return startRegistry(t, fmt.Sprintf("auth: {htpasswd: {realm: derpd, path: %q}}\n", file))
}

// startRegistry starts a registry with more lines of configuration.
func startRegistry(t testing.TB, more string) *Registry {
	t.Helper()
	const variable = "DERPD_REGISTRY"
	program := os.Getenv(variable)
	if program == "" {
		t.Skip("a real registry is needed: run make registry test")
	}
	if _, err := os.Stat(program); err != nil {
		t.Skipf("%s: %v; run make registry", variable, err)
	}
	dir := t.TempDir()
	r := &Registry{Storage: filepath.Join(dir, "storage")}
	file := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: \"127.0.0.1:0\"}\n", r.Storage)
	if err := os.WriteFile(file, []byte(text+more), 0o600); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	command := exec.CommandContext(ctx, program, "serve", file)
	// The registry sends traces to the local host otherwise.
	command.Env = []string{"OTEL_TRACES_EXPORTER=none"}
	stderr, err := command.StderrPipe()
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	var log Buffer
	host, ended := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			// Clients ask for every layer before they push it.
			if !bytes.Contains(lines.Bytes(), []byte("level=info")) && !bytes.Contains(lines.Bytes(), []byte("status=404")) {
				_, _ = log.Write(append(lines.Bytes(), '\n'))
			}
			if found := listening.FindSubmatch(lines.Bytes()); found != nil {
				host <- string(found[1])
			}
		}
		close(host)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		_ = command.Wait()
		if t.Failed() {
			t.Logf("warnings of the registry:\n%s", log.String())
		}
	})
	if r.Host = Receive(t, "the registry listens", host); r.Host == "" {
		t.Fatal("the registry ended")
	}
	return r
}
