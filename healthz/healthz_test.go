package healthz

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func fixed(name string, r Result) Check {
	return Check{name, func(context.Context) Result { return r }}
}

// counting is a check whose detail is the number of its runs.
func counting() (Check, *atomic.Int64) {
	runs := new(atomic.Int64)
	return Check{"count", func(context.Context) Result { return Okf("%d", runs.Add(1)) }}, runs
}

func ask(t *testing.T, h http.Handler, method, path string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, http.NoBody))
	return w
}

// Warnings do not make the relay not ready. The first failure is the cause, also
// if a later check fails sooner.
func TestHandler(t *testing.T) {
	later := make(chan struct{})
	ready := New([]Check{fixed("listeners", Okf(":%d", 443)), fixed("admission", Warnf("open to %s", "everybody"))})
	failed := New([]Check{
		fixed("listeners", Okf(":443")),
		{"certificate", func(context.Context) Result { <-later; return Failf("expired on %s", "Monday") }},
		{"derp", func(context.Context) Result { close(later); return Failf("no handshake") }},
	})
	stopping := New([]Check{fixed("listeners", Okf(":443"))})
	stopping.Stopping()
	const text, asJSON = "text/plain; charset=utf-8", "application/json"
	for _, tt := range []struct {
		name          string
		handler       http.Handler
		method, path  string
		code          int
		kind, content string // any content type if empty
	}{
		{"ready", ready.Handler(), "GET", "/readyz", 200, text, "ready\nok   listeners: :443\nwarn admission: open to everybody\n"},
		{"ready, as JSON", ready.Handler(), "GET", "/healthz", 200, asJSON, `{
  "ready": true,
  "checks": [
    {
      "name": "listeners",
      "level": "ok",
      "detail": ":443"
    },
    {
      "name": "admission",
      "level": "warn",
      "detail": "open to everybody"
    }
  ]
}
`},
		{"ready, without body", ready.Handler(), "HEAD", "/readyz", 200, text, "ready\nok   listeners: :443\nwarn admission: open to everybody\n"}, // net/http drops the body
		{"ready, for strangers", ready.StatusHandler(), "GET", "/readyz", 200, "", "ready\n"},
		{"not ready", failed.Handler(), "GET", "/readyz", 503, text, "not ready: certificate: expired on Monday\nok   listeners: :443\nfail certificate: expired on Monday\nfail derp: no handshake\n"},
		{"not ready, as JSON", failed.Handler(), "GET", "/healthz", 503, asJSON, `{
  "ready": false,
  "cause": "certificate: expired on Monday",
  "checks": [
    {
      "name": "listeners",
      "level": "ok",
      "detail": ":443"
    },
    {
      "name": "certificate",
      "level": "fail",
      "detail": "expired on Monday"
    },
    {
      "name": "derp",
      "level": "fail",
      "detail": "no handshake"
    }
  ]
}
`},
		{"not ready, for strangers", failed.StatusHandler(), "GET", "/readyz", 503, "", "not ready\n"},
		{"not ready, but alive", failed.Handler(), "GET", "/livez", 200, "", "ok\n"},
		{"stopping", stopping.Handler(), "GET", "/readyz", 503, text, "not ready: the relay is stopping\n"},
		{"stopping, as JSON", stopping.Handler(), "GET", "/healthz", 503, asJSON, "{\n  \"ready\": false,\n  \"cause\": \"the relay is stopping\",\n  \"checks\": []\n}\n"},
		{"stopping, for strangers", stopping.StatusHandler(), "GET", "/readyz", 503, "", "not ready\n"},
		{"another method", ready.Handler(), "POST", "/readyz", 405, "", "Method Not Allowed\n"},
		{"another method, as JSON", ready.Handler(), "POST", "/healthz", 405, "", "Method Not Allowed\n"},
		{"another method, for life", ready.Handler(), "POST", "/livez", 405, "", "Method Not Allowed\n"},
		{"another method, for strangers", ready.StatusHandler(), "POST", "/readyz", 405, "", "Method Not Allowed\n"},
		{"strangers get no results", ready.StatusHandler(), "GET", "/healthz", 404, "", "404 page not found\n"},
	} {
		w := ask(t, tt.handler, tt.method, tt.path)
		if w.Code != tt.code || w.Body.String() != tt.content {
			t.Errorf("%s: %d\n%s\nwant %d\n%s", tt.name, w.Code, w.Body, tt.code, tt.content)
		}
		if kind := w.Header().Get("Content-Type"); tt.kind != "" && kind != tt.kind {
			t.Errorf("%s: content type %q, want %q", tt.name, kind, tt.kind)
		}
	}
}

// A report answers for a second after its round, and a change ends it.
func TestReportIsReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check, runs := counting()
		h := New([]Check{check, {"slow", func(context.Context) Result { <-time.After(3 * time.Second); return Okf("done") }}})
		for _, step := range []struct {
			after  time.Duration
			change bool
			want   int64
		}{
			{0, false, 1},
			{0, false, 1},
			{999 * time.Millisecond, false, 1},
			{time.Millisecond, false, 2},
			{0, false, 2},
			{0, true, 3},
			{0, false, 3},
		} {
			<-time.After(step.after)
			if step.change {
				h.Changed()
			}
			if r := h.Report(t.Context()); runs.Load() != step.want || !r.Ready || len(r.Checks) != 2 {
				t.Fatalf("%+v: %d rounds and %+v", step, runs.Load(), r)
			}
		}
	})
}

// Callers at the same time share a round.
func TestReportIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		check, runs := counting()
		release := make(chan struct{})
		h := New([]Check{check, {"slow", func(context.Context) Result { <-release; return Okf("done") }}})
		var callers sync.WaitGroup
		for range 10 {
			callers.Go(func() {
				if r := h.Report(t.Context()); !r.Ready || r.Checks[0].Detail != "1" {
					t.Errorf("got %+v, want the first round", r)
				}
			})
		}
		close(release)
		callers.Wait()
		if n := runs.Load(); n != 1 {
			t.Errorf("%d rounds, want 1", n)
		}
	})
}

// A caller that hangs up does not end the round, since others get its report too.
func TestCallerHangsUp(t *testing.T) {
	h := New([]Check{{"derp", func(ctx context.Context) Result {
		if err := ctx.Err(); err != nil {
			return Failf("%v", err)
		}
		return Okf("a packet")
	}}})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	first, second := h.Report(gone), h.Report(t.Context())
	if !first.Ready || !second.Ready {
		t.Errorf("the caller that hung up got %+v, the next one %+v; want both ready", first, second)
	}
}

// Checks run at the same time, and end after four seconds.
func TestChecksTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hanging := func(ctx context.Context) Result { <-ctx.Done(); return Failf("%v", ctx.Err()) }
		h := New([]Check{{"a", hanging}, {"b", hanging}})
		began := time.Now()
		r := h.Report(t.Context())
		if took := time.Since(began); took != 4*time.Second {
			t.Errorf("a round took %s, want 4s", took)
		}
		if want := "not ready: a: context deadline exceeded\nfail a: context deadline exceeded\nfail b: context deadline exceeded\n"; r.String() != want {
			t.Errorf("got %q, want %q", r, want)
		}
	})
}

// Changed and Stopping do not wait for a round, and apply to it.
func TestChangesDuringARound(t *testing.T) {
	begun, release := make(chan struct{}, 2), make(chan struct{})
	check, runs := counting()
	h := New([]Check{{"slow", func(ctx context.Context) Result {
		result := check.Run(ctx)
		begun <- struct{}{}
		<-release
		return result
	}}})
	report := func() <-chan Report {
		c := make(chan Report, 1)
		go func() { c <- h.Report(context.Background()) }()
		return c
	}
	// Both deadlock the test if they take the lock of the round.
	unlocked := func(f func()) {
		t.Helper()
		done := make(chan struct{})
		go func() { f(); close(done) }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			close(release)
			t.Fatal("waits for the round")
		}
	}

	wait := func() {
		t.Helper()
		select {
		case <-begun:
		case <-time.After(10 * time.Second):
			close(release)
			t.Fatal("no new round")
		}
	}

	changed := report()
	wait()
	unlocked(h.Changed)
	release <- struct{}{}
	if r := <-changed; !r.Ready {
		t.Errorf("got %+v, want ready", r)
	}
	stopped := report()
	wait() // the change has ended the use of the first report
	if n := runs.Load(); n != 2 {
		t.Errorf("%d rounds, want 2", n)
	}
	unlocked(h.Stopping)
	unlocked(func() {
		if r := h.Report(t.Context()); r.Ready {
			t.Error("ready after Stopping")
		}
	})
	release <- struct{}{}
	if r := <-stopped; r.Ready || r.Cause != "the relay is stopping" {
		t.Errorf("got %+v, want the stop", r)
	}
}
