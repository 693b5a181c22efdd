package node

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/testkit"
)

// logBuffer is a log that is read while it is written.
type logBuffer struct{ testkit.Buffer }

// has reports whether a line has all of these parts.
func (b *logBuffer) has(parts ...string) bool {
	for line := range strings.Lines(b.String()) {
		all := true
		for _, part := range parts {
			all = all && strings.Contains(line, part)
		}
		if all {
			return true
		}
	}
	return false
}

// logTo makes a node write its log to a buffer.
func logTo(b *logBuffer) func(*Node) {
	return func(n *Node) { n.log = zerolog.New(b).Level(zerolog.InfoLevel) }
}

// closeHook is a listener that calls a function when it is closed first.
type closeHook struct {
	net.Listener
	once   sync.Once
	closed func()
}

func (l *closeHook) Close() error {
	err := l.Listener.Close()
	l.once.Do(l.closed)
	return err
}

// TestStopOrder asserts that health and STUN say that the relay is gone before the
// relay takes no more clients, and that the admin and health listeners answer
// until then. After the stop nothing listens.
func TestStopOrder(t *testing.T) {
	var closes func()
	n := begin(t, testkit.Environ(t, "DERP_HEALTH_ADDR=127.0.0.1:0"), func(n *Node) {
		n.listeners.https = &closeHook{Listener: n.listeners.https, closed: func() { closes() }}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	admin, health := n.listeners.admin.Addr().String(), n.listeners.health.Addr().String()
	ready := func(addr string) string {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+addr+"/readyz", http.NoBody)
		if err != nil {
			return err.Error()
		}
		res, err := client.Do(req)
		if err != nil {
			return err.Error()
		}
		defer func() { _ = res.Body.Close() }()
		body, _ := io.ReadAll(res.Body)
		return string(body)
	}
	if got := ready(admin); !strings.HasPrefix(got, "ready\n") {
		t.Errorf("before the stop: %s", got)
	}
	var whileClosing []string
	var open bool
	closes = func() { whileClosing, open = []string{ready(admin), ready(health)}, n.stun.Open() }
	n.stop()
	if len(whileClosing) != 2 || !strings.HasPrefix(whileClosing[0], "not ready: the relay is stopping\n") || whileClosing[1] != "not ready\n" {
		t.Errorf("when the relay closes, health says %q", whileClosing)
	}
	if open {
		t.Error("STUN was open when the relay closed")
	}
	for _, addr := range []net.Addr{n.listeners.https.Addr(), n.listeners.http.Addr(), n.listeners.admin.Addr(), n.listeners.health.Addr()} {
		if conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr.String()); err == nil {
			_ = conn.Close()
			t.Errorf("%s accepts connections after the stop", addr)
		}
	}
	if _, err := n.listeners.stun.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the socket of STUN after the stop: %v", err)
	}
}

// TestStopDoesNotWait asserts that a relay which cannot be closed holds up the
// stop for a moment only, and that the log says so.
func TestStopDoesNotWait(t *testing.T) {
	release := make(chan struct{})
	log := new(logBuffer)
	n := begin(t, testkit.Environ(t), logTo(log), func(n *Node) {
		n.listeners.https = &closeHook{Listener: n.listeners.https, closed: func() { <-release }}
	})
	begun := time.Now()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		n.stop()
	}()
	testkit.Until(t, "the stop goes on", func() bool {
		return log.has(`"level":"warn"`, "some clients were still connected when the relay stopped")
	})
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the stop went on after %s", took)
	}
	close(release)
	testkit.Receive(t, "the end of the stop", stopped)
}

// TestFailedPart asserts that a part which fails ends the run, with its name.
func TestFailedPart(t *testing.T) {
	c, err := config.Load(testkit.LastOfEach(testkit.Environ(t)))
	if err != nil {
		t.Fatal(err)
	}
	log := new(logBuffer)
	n, err := New(t.Context(), c, Options{Map: io.Discard, Log: zerolog.New(log)})
	if err != nil {
		t.Fatal(err)
	}
	_ = n.listeners.https.Close()
	ended := make(chan error, 1)
	go func() { ended <- n.Run(t.Context()) }()
	if err := testkit.Receive(t, "the end of the run", ended); !errors.Is(err, net.ErrClosed) || !strings.HasPrefix(err.Error(), "https: ") {
		t.Errorf("the run ended with %v", err)
	}
	if log.has(`"message":"stopped"`) {
		t.Error("a run that failed is logged as stopped")
	}
}

// failingWriter is a stdout that nobody reads.
type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

// TestMapWithoutReader asserts that a relay whose map cannot be printed goes on.
func TestMapWithoutReader(t *testing.T) {
	c, err := config.Load(testkit.LastOfEach(testkit.Environ(t)))
	if err != nil {
		t.Fatal(err)
	}
	log := new(logBuffer)
	n, err := New(t.Context(), c, Options{Map: failingWriter{}, Start: time.Now(), Log: zerolog.New(log)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	testkit.Until(t, "the warning is logged", func() bool {
		return log.has(`"level":"warn"`, "broken pipe", "the map could not be printed")
	})
	if out, err := n.formatMap(ctx, "policy"); err != nil || len(out) == 0 {
		t.Errorf("the map: %v", err)
	}
	cancel()
	if err := testkit.Receive(t, "the end of the run", ended); err != nil {
		t.Error(err)
	}
}

// TestReadyTime asserts that the line about the start has the time since the start
// of the process, in milliseconds.
func TestReadyTime(t *testing.T) {
	log := new(logBuffer)
	begin(t, testkit.Environ(t), logTo(log), func(n *Node) { n.options.Start = time.Now().Add(-time.Hour) })
	if !log.has(`"ready_ms":36`, `"message":"ready"`) || log.has(`"ready_ms":36`, `000000000`) {
		t.Errorf("want about 3,600,000 ms:\n%s", log.String())
	}
}

// TestNewFiles asserts that the data directory and what has secrets in it belong
// to the user alone.
func TestNewFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	member := key.NewNode()
	n := begin(t, testkit.Environ(t, "DERP_DATA_DIR="+dir, "DERP_ALLOW_KEYS="+member.Public().String()))
	testkit.MustAdmit(t, testkit.RegionClient(t, region(t, parsePolicy(t, n.printed)), member))
	n.stop()
	for name, mode := range map[string]os.FileMode{
		"": 0o700, "node.key": 0o600, "admitted.json": 0o600, "mapcert.json": 0o600, "certs": 0o700, "certs/pinned.pem": 0o600, "certs/pinned.pem.pin": 0o600,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if got := info.Mode().Perm(); got != mode {
			t.Errorf("the mode of data/%s is %o, want %o", name, got, mode)
		}
	}
	// Without certificates of its own the relay makes the directory for the key.
	without := filepath.Join(t.TempDir(), "data")
	begin(t, testkit.Environ(t, "DERP_DATA_DIR="+without, "DERP_CERT_MODE=off", "DERP_DOMAIN=derp.example.com")).stop()
	if info, err := os.Stat(without); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the data directory without certificates: %v, %v; want mode 0700", info, err)
	}
}

// TestFilesChangeBeforeTheStart asserts that a start fails with the name of the
// variable when a file was valid for the configuration and is not any more.
func TestFilesChangeBeforeTheStart(t *testing.T) {
	keys := filepath.Join(t.TempDir(), "keys")
	for want, tt := range map[string]struct {
		env   []string
		file  string // below the data directory unless it is absolute
		valid setup
	}{
		"DERP_DATA_DIR: reading node key: ": {nil, "node.key", nil},
		"DERP_CERT_DIR: ":                   {nil, "certs/pinned.pem", nil},
		"DERP_CERT_FILE: ": {
			[]string{"DERP_CERT_MODE=manual", "DERP_DOMAIN=derp.example.com"},
			"certs/derp.example.com.crt",
			pair("certs/derp.example.com", "derp.example.com", time.Now()),
		},
		"DERP_ALLOW_KEYS: ": {[]string{"DERP_ALLOW_KEYS=" + keys}, keys, func(t *testing.T, _ string) {
			t.Helper()
			if err := os.WriteFile(keys, []byte(key.NewNode().Public().String()+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		dir := t.TempDir()
		if tt.valid != nil {
			tt.valid(t, dir)
		}
		c, err := config.Load(testkit.LastOfEach(append(testkit.Environ(t, tt.env...), "DERP_DATA_DIR="+dir)))
		if err != nil {
			t.Fatal(err)
		}
		if filepath.IsAbs(tt.file) {
			if err := os.WriteFile(tt.file, []byte("nonsense"), 0o600); err != nil {
				t.Fatal(err)
			}
		} else {
			file(tt.file, "nonsense")(t, dir)
		}
		_, err = New(t.Context(), c, Options{Map: io.Discard, Log: zerolog.Nop()})
		if _, bind := errors.AsType[BindError](err); err == nil || bind || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("the start ends with %v, want %q", err, want)
		}
	}
}

// TestFailingAuthorityIsLogged asserts that the log says why there is no
// certificate yet. The relay stops all the same.
func TestFailingAuthorityIsLogged(t *testing.T) {
	c, err := config.Load(testkit.LastOfEach(testkit.Environ(t, "DERP_DOMAIN=derp.example.com", "DERP_ACME_CA=https://127.0.0.1:1/directory")))
	if err != nil {
		t.Fatal(err)
	}
	log := new(logBuffer)
	n, err := New(t.Context(), c, Options{Map: io.Discard, Log: zerolog.New(log)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	testkit.Until(t, "the failure is logged", func() bool {
		return log.has(`"level":"warn"`, "certificate not obtained", "connection refused")
	})
	if got := n.checkDERP(ctx); got.Level != healthz.Fail || !strings.HasSuffix(got.Detail, ": waiting for a certificate") {
		t.Errorf("health says %+v", got)
	}
	cancel()
	if err := testkit.Receive(t, "the end of the run", ended); err != nil {
		t.Error(err)
	}
	if log.has(`"message":"ready"`) {
		t.Errorf("a relay without a certificate was ready:\n%s", log)
	}
}
