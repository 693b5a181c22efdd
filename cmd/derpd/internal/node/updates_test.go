package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"derpd/healthz"
	"derpd/internal/release"
	"derpd/internal/testkit"
)

// TestUpdates asserts what health, metrics and log say about releases while a relay
// asks a module proxy, and that no answer makes the relay not ready.
func TestUpdates(t *testing.T) {
	var versions atomic.Value // of the module proxy; empty is status 503
	versions.Store("v1.104.7\n")
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		list := versions.Load().(string)
		if list == "" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = fmt.Fprint(w, list)
	}))
	t.Cleanup(proxy.Close)
	log := new(logBuffer)
	n := begin(t, testkit.Environ(t, "DERP_UPDATE_CHECK=1h", "GOPROXY="+proxy.URL), logTo(log), func(n *Node) {
		if n.updates.every != time.Hour {
			t.Errorf("asks every %v", n.updates.every)
		}
		n.updates.every, n.updates.log = 20*time.Millisecond, n.log
		n.updates.ask = release.New(release.Build{Upstream: "v1.104.7"}, n.config.Updates.GoProxy).Ask
	})
	const isOut = "tailscale.com v1.104.9 is out (here: v1.104.7); take"
	for _, step := range []struct {
		versions string
		level    healthz.Level
		want     []string // parts of the health line
		metric   string
	}{
		{"v1.104.7\n", healthz.OK, []string{"tailscale.com v1.104.7 is the newest release, as of "}, "0"},
		{"v1.104.7\nv1.104.9\n", healthz.Warn, []string{isOut}, "1"},
		{"", healthz.Warn, []string{isOut, " ago; no answer since: GOPROXY: " + proxy.URL + ": answered 503"}, "1"},
		{"v1.104.9\n", healthz.Warn, []string{isOut}, "1"},
		{"v1.104.7\n", healthz.OK, []string{"v1.104.7 is the newest release"}, "0"},
	} {
		versions.Store(step.versions)
		testkit.Wait(t, "the health of "+strings.TrimSpace(step.versions), func(ctx context.Context) error {
			got := n.updates.check(ctx)
			metrics := metricsText(n.Node)
			if got.Level != step.level || metrics["gauge_derpd_update_available"] != step.metric || metrics["gauge_derpd_update_answer_timestamp_seconds"] < "1" {
				return fmt.Errorf("%v, metrics %s", got, metrics)
			}
			for _, part := range step.want {
				if !strings.Contains(got.Detail, part) {
					return fmt.Errorf("%v lacks %q", got, part)
				}
			}
			return nil
		})
		report := n.health.Report(t.Context())
		if last := report.Checks[len(report.Checks)-1]; !report.Ready || last.Name != "updates" {
			t.Errorf("ready %t, the last check is %v", report.Ready, last)
		}
	}
	n.stop()
	if count := strings.Count(log.String(), "a newer release is out"); count != 1 || !log.has(`"level":"warn"`, `"newest":"tailscale.com v1.104.9"`, isOut) {
		t.Errorf("%d lines about a newer release, want 1:\n%s", count, log)
	}
}

// TestUpdatesOff asserts that a relay asks nobody unless its operator wants it.
func TestUpdatesOff(t *testing.T) {
	n := begin(t, testkit.Environ(t))
	if report := n.health.Report(t.Context()).String(); n.updates != nil || strings.Contains(report, "updates") {
		t.Errorf("updates %v:\n%s", n.updates, report)
	}
	for _, task := range n.tasks() {
		if task.name == "updates" {
			t.Error("the task runs")
		}
	}
	if _, ok := metricsText(n.Node)["gauge_derpd_update_available"]; ok {
		t.Error("there is a metric")
	}
}

// TestUpdatesBeforeAnAnswer asserts the health before the first answer.
func TestUpdatesBeforeAnAnswer(t *testing.T) {
	u := &updates{log: zerolog.Nop()}
	if got := u.check(t.Context()); got.Level != healthz.OK || got.Detail != "not asked yet" {
		t.Errorf("%v", got)
	}
	u.keep(release.Answer{}, errors.New("GOPROXY: off"))
	if got := u.check(t.Context()); got.Level != healthz.Warn || got.Detail != "no answer yet: GOPROXY: off" {
		t.Errorf("%v", got)
	}
}

// TestUpdatesJitter asserts that relays which start together do not ask together.
func TestUpdatesJitter(t *testing.T) {
	const every, relays, questions = 24 * time.Hour, 20, 5
	synctest.Test(t, func(t *testing.T) {
		firsts := make(map[time.Duration]bool)
		var latest time.Duration
		shortest, longest := every, every // between two questions
		for range relays {
			ctx, cancel := context.WithCancel(t.Context())
			var asked []time.Time
			u := &updates{every: every, log: zerolog.Nop()}
			u.ask = func(context.Context) (release.Answer, error) {
				if asked = append(asked, time.Now()); len(asked) == questions {
					cancel()
				}
				return release.Answer{}, nil
			}
			start := time.Now()
			if err := u.run(ctx); err != nil {
				t.Error(err)
			}
			first := asked[0].Sub(start)
			firsts[first], latest = true, max(latest, first)
			if first >= every/10 {
				t.Errorf("the first question is after %v", first)
			}
			for i, at := range asked[1:] {
				gap := at.Sub(asked[i])
				shortest, longest = min(shortest, gap), max(longest, gap)
				if gap < every*9/10 || gap > every*11/10 {
					t.Errorf("question %d is %v after the one before", i+2, gap)
				}
			}
		}
		if len(firsts) < relays/2 {
			t.Errorf("%d relays ask at %d times", relays, len(firsts))
		}
		// The chance that random times fail here is one in a million.
		if latest < every/20 || shortest > every*95/100 || longest < every*105/100 {
			t.Errorf("the last relay begins after %v, and intervals are %v to %v", latest, shortest, longest)
		}
	})
}

// TestUpdatesWithoutGitHub asserts that a newer release stays known while only a module
// proxy answers, and that each one is logged once.
func TestUpdatesWithoutGitHub(t *testing.T) {
	log := new(logBuffer)
	u := &updates{log: zerolog.New(log)}
	derpd := release.Answer{Newest: "derpd 1.104.7-2", Newer: true, Text: "derpd 1.104.7-2 is out"}
	instead := errors.New("api.github.com: no answer in time")
	same := release.Answer{Newest: "tailscale.com v1.104.7", Text: "v1.104.7 is the newest release", GitHub: instead}
	newer := release.Answer{Newest: "tailscale.com v1.104.9", Newer: true, Text: "v1.104.9 is out", GitHub: instead}
	none := release.Answer{Newest: "derpd 1.104.9-1", Text: "derpd 1.104.9-1 is the newest release"}
	for _, step := range []struct {
		answer release.Answer
		level  healthz.Level
		want   string
	}{
		{same, healthz.OK, "v1.104.7 is the newest release, as of "},
		{derpd, healthz.Warn, "derpd 1.104.7-2 is out"},
		{same, healthz.Warn, "derpd 1.104.7-2 is out, as of 0s ago; no answer since: api.github.com: no answer in time"},
		{newer, healthz.Warn, "v1.104.9 is out"},
		{derpd, healthz.Warn, "derpd 1.104.7-2 is out"},
		{newer, healthz.Warn, "v1.104.9 is out"},
		{none, healthz.OK, "derpd 1.104.9-1 is the newest release, as of "},
	} {
		u.keep(step.answer, nil)
		if got := u.check(t.Context()); got.Level != step.level || !strings.HasPrefix(got.Detail, step.want) {
			t.Errorf("%v, want %v %s", got, step.level, step.want)
		}
	}
	if count := strings.Count(log.String(), "a newer release is out"); count != 2 {
		t.Errorf("%d lines, want one for each newer release:\n%s", count, log)
	}
}
