package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/tsweb/varz"
	"tailscale.com/types/key"

	"derpd/cmd/derpd/internal/config"
	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/relay"
	"derpd/relay/admit"
)

// TestCheckAdmission asserts what health and metrics say about sources that
// answer, never answered, answer no more, and have a problem.
func TestCheckAdmission(t *testing.T) {
	member, stranger := key.NewNode().Public(), key.NewNode().Public()
	now := time.Now()
	down := errors.New("connection refused")
	var listErr, oldErr error
	ask := func(err *error, asOf time.Time, admits bool) func(context.Context, key.NodePublic, netip.Addr) (time.Time, error) {
		return func(_ context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
			switch {
			case *err != nil:
				return time.Time{}, *err
			case admits && node == member:
				return asOf, nil
			}
			return asOf, admit.ErrRefused
		}
	}
	var none error
	gate := admit.NewGate(admit.Config{
		Sources: []admit.Source{
			{Name: "list", Ask: ask(&listErr, now.Add(-90*time.Second), true)},
			{Name: "old", Ask: ask(&oldErr, now.Add(-2*time.Hour), false)},
			{Name: "never", Ask: ask(&down, now, false)},
			{Name: "odd", Ask: ask(&none, now, false), Problem: func() error { return errors.New("the key ends soon") }},
		},
		Grace: time.Hour, Path: filepath.Join(t.TempDir(), "admitted.json"), Log: zerolog.Nop(),
	})
	r, err := relay.New(relay.Config{PrivateKey: key.NewNode(), Home: http.NotFoundHandler(), BootstrapDNS: http.NotFoundHandler(), Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	n := &Node{config: &config.Config{Sources: []config.Source{{}}}, relay: r}
	n.gate.Store(gate)
	if got := n.checkAdmission(t.Context()); got.Level != healthz.Warn || got.Detail != "1 of 4 sources need attention: odd: the key ends soon; admitted 0, refused 0, kept by grace 0, disconnected 0" {
		t.Errorf("before any question: %+v", got)
	}

	decide := func(node key.NodePublic, want bool) {
		t.Helper()
		if err := gate.Admit(t.Context(), node, netip.Addr{}); (err == nil) != want {
			t.Errorf("%v, want admitted %t", err, want)
		}
	}
	decide(stranger, false)
	oldErr = errors.New("broken")
	decide(member, true)
	listErr = errors.New("cut")
	decide(member, true) // within the grace
	listErr = nil
	decide(stranger, false)
	decide(stranger, false)

	got := n.checkAdmission(t.Context())
	want := "3 of 4 sources need attention: old: broken (its last answer is 2h0m"
	if got.Level != healthz.Warn || !strings.HasPrefix(got.Detail, want) {
		t.Errorf("%+v, want %q", got, want)
	}
	if want := "; never: connection refused; odd: the key ends soon; admitted 1, refused 3, kept by grace 1, disconnected 0"; !strings.HasSuffix(got.Detail, want) {
		t.Errorf("%+v, want %q", got, want)
	}
	var text strings.Builder
	for _, m := range n.admissionMetrics() {
		varz.WritePrometheusExpvar(&text, m)
	}
	for _, want := range []string{
		`derpd_admission_decisions_total{decision="admitted"} 1`, `derpd_admission_decisions_total{decision="kept"} 1`,
		`derpd_admission_decisions_total{decision="refused"} 0`, `derpd_admission_decisions_total{decision="unavailable"} 3`,
		`derpd_admission_decisions_total{decision="disconnected"} 0`, `derpd_admission_decisions_total{decision="limited"} 0`,
		`derpd_admission_source_up{source="list"} 1`, `derpd_admission_source_up{source="old"} 0`,
		`derpd_admission_source_up{source="never"} 0`, `derpd_admission_source_up{source="odd"} 0`,
		fmt.Sprintf(`derpd_admission_source_timestamp_seconds{source="list"} %d`, now.Add(-90*time.Second).Unix()),
	} {
		if !strings.Contains(text.String(), want+"\n") {
			t.Errorf("metrics lack %q:\n%s", want, text.String())
		}
	}
	if never := `derpd_admission_source_timestamp_seconds{source="never"}`; strings.Contains(text.String(), never) {
		t.Errorf("a source that never answered has a time:\n%s", text.String())
	}
}

// TestCheckAdmissionAtTheStart asserts that health and log report a source that does
// not answer before the first client connects, with the fix.
func TestCheckAdmissionAtTheStart(t *testing.T) {
	dir := t.TempDir()
	closed := testkit.FreeAddr(t)
	for name, tt := range map[string]struct{ env, want string }{
		"tailscaled": {
			"DERP_VERIFY_CLIENTS=true DERP_TAILSCALED_SOCKET=" + dir + "/s",
			"tailscaled " + dir + "/s: asking tailscaled: no such file or directory; start tailscaled; in a container, mount the directory, as compose.yaml does (" + dir + ":" + dir + ":ro); RuntimeDirectoryPreserve=yes in tailscaled.service keeps that mount valid over restarts",
		},
		"url": {
			"DERP_VERIFY_CLIENT_URL=http://u:p@" + closed + "/verify?token=5ecfe7",
			"url http://" + closed + "/verify: admission URL cannot be reached: dial tcp " + closed + ": connect: connection refused",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var log testkit.Buffer
			c, err := config.Load(testkit.LastOfEach(testkit.Environ(t, strings.Fields(tt.env)...)))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			n, err := New(ctx, c, Options{Start: time.Now(), Map: io.Discard, Log: zerolog.New(&log)})
			if err != nil {
				cancel()
				t.Fatal(err)
			}
			began, done := time.Now(), make(chan error, 1)
			go func() { done <- n.Run(ctx) }()
			want := "1 of 1 sources need attention: " + tt.want + "; admitted 0, refused 0, kept by grace 0, disconnected 0"
			testkit.Until(t, "health reports the source", func() bool { return n.checkAdmission(t.Context()).Level == healthz.Warn })
			if took := time.Since(began); took > time.Second {
				t.Errorf("health reports the source after %s", took)
			}
			if got := n.checkAdmission(t.Context()).Detail; got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if text := log.String(); strings.Count(text, "admission source unavailable") != 1 || strings.Contains(text, "5ecfe7") {
				t.Errorf("the log has:\n%s", text)
			}
			cancel()
			if err := testkit.Receive(t, "the end of the relay", done); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCheckAdmissionOfGoodSources asserts that health says how old the answer of
// each source is.
func TestCheckAdmissionOfGoodSources(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_ALLOW_KEYS="+key.NewNode().Public().String()))
	if got := n.checkAdmission(t.Context()); got.Level != healthz.OK || !strings.HasPrefix(got.Detail, "1 keys, as of ") || !strings.HasSuffix(got.Detail, "; admitted 0, refused 0, kept by grace 0, disconnected 0") {
		t.Errorf("%+v", got)
	}
	n.stop()
}
