package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"derpd/internal/testkit"
)

// running is the whole of derpd in the test's process, started as main starts
// it.
type running struct {
	admin          string // address of the admin listener
	stdout, stderr testkit.Buffer
	stop           func() error // stops the program and returns its error
}

// startProgram runs derpd with an environment, and waits until it is ready.
func startProgram(t *testing.T, env []string) *running {
	t.Helper()
	p := &running{admin: testkit.FreeAddr(t)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, time.Now(), nil, testkit.LastOfEach(append(env, "DERP_ADMIN_ADDR="+p.admin)), &p.stdout, &p.stderr)
	}()
	p.stop = sync.OnceValue(func() error {
		cancel()
		return testkit.Receive(t, "derpd stops", done)
	})
	t.Cleanup(func() {
		if err := p.stop(); err != nil {
			t.Errorf("derpd ended with %v", err)
		}
	})
	testkit.Wait(t, "derpd to be ready", func(ctx context.Context) error {
		select {
		case err := <-done:
			done <- err
			t.Fatalf("derpd ended with %v", err)
		default:
		}
		status, body, err := p.ask(ctx, "/readyz")
		if err == nil && status != http.StatusOK {
			err = errors.New(body)
		}
		return err
	})
	return p
}

// ask sends a request to the admin listener.
func (p *running) ask(ctx context.Context, path string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.admin+path, http.NoBody)
	if err != nil {
		return 0, "", err
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// page is a page of the admin listener.
func (p *running) page(t *testing.T, path string) string {
	t.Helper()
	_, body, err := p.ask(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// logged returns the lines of the log with a message.
func (p *running) logged(t *testing.T, message string) []map[string]any {
	t.Helper()
	var list []map[string]any
	for line := range strings.Lines(p.stderr.String()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("a line of the log is not JSON: %q", line)
		}
		if text, _ := entry["message"].(string); strings.HasPrefix(text, message) {
			list = append(list, entry)
		}
	}
	return list
}
