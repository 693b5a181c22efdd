package node

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"derpd/healthz"
	"derpd/internal/testkit"
	"derpd/relay"
)

// Health, metrics and the log report a limit that closes connections, and each begin
// once. The relay stays ready, and its self-check takes no place.
func TestLimitsAreReported(t *testing.T) {
	log := new(testkit.Buffer)
	n := begin(t, testkit.Environ(t, "DERP_MAX_CONNECTIONS=16", "DERP_MAX_PER_ADDRESS=4"), func(n *Node) { n.log = zerolog.New(log) })
	if result := n.checkConnections(t.Context()); result.Level != healthz.OK || !strings.HasSuffix(result.Detail, " of them without an admitted node") {
		t.Errorf("before: %+v", result)
	}
	for range 20 {
		if conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", n.listeners.https.Addr().String()); err == nil {
			defer func() { _ = conn.Close() }()
		}
	}
	testkit.Until(t, "the limit is logged", func() bool { return strings.Contains(log.String(), "a limit closes connections") })
	result := n.checkConnections(t.Context())
	for _, want := range []string{"; DERP_MAX_PER_ADDRESS=4 has closed ", "one address has too many connections", "; connected clients are not affected"} {
		if result.Level != healthz.Warn || !strings.Contains(result.Detail, want) {
			t.Errorf("want a warning with %q, got %+v", want, result)
		}
	}
	if _, err := n.probeDERP(t.Context()); err != nil {
		t.Errorf("the self-check: %v", err)
	}
	if s := n.relay.Places(); s.Open > 4 {
		t.Errorf("%+v, want at most 4 connections", s)
	}
	if got := strings.Count(log.String(), "a limit closes connections"); got != 1 {
		t.Errorf("logged %d times: %s", got, log.String())
	}
}

// The state of a limit ends some time after the last connection that it closed.
func TestLimitLog(t *testing.T) {
	log := new(testkit.Buffer)
	n := begin(t, testkit.Environ(t, "DERP_MAX_STRANGERS=9"))
	quiet := &Node{config: n.config, health: n.health, log: zerolog.New(log)}
	closing := make(map[relay.Limit]bool)
	for _, tt := range []struct {
		count uint64
		ago   time.Duration
		want  string // the new line
	}{
		{0, 0, ""},
		{3, 0, `{"level":"warn","variable":"DERP_MAX_STRANGERS","limit":9,"meaning":"` + limitMeaning[relay.LimitStrangers] + `","message":"a limit closes connections; connected clients are not affected"}`},
		{4, 0, ""},
		{4, limitedFor - time.Second, ""},
		{4, limitedFor + time.Second, `{"level":"info","variable":"DERP_MAX_STRANGERS","closed_since_start":4,"message":"the limit closes no more connections"}`},
		{4, limitedFor + time.Hour, ""},
		{5, time.Second, `{"level":"warn","variable":"DERP_MAX_STRANGERS","limit":9,"meaning":"` + limitMeaning[relay.LimitStrangers] + `","message":"a limit closes connections; connected clients are not affected"}`},
	} {
		before := len(log.String())
		last := time.Now().Add(-tt.ago)
		if tt.count == 0 {
			last = time.Time{}
		}
		quiet.logLimits(closing, []relay.LimitCount{{Limit: relay.LimitStrangers, Count: tt.count, Last: last}})
		if got := strings.TrimSpace(log.String()[before:]); got != tt.want {
			t.Errorf("%d closed, the last one %s ago: logged %s, want %s", tt.count, tt.ago, got, tt.want)
		}
	}
}

// Every limit has a variable, a value and a meaning.
func TestEveryLimitIsDescribed(t *testing.T) {
	n := begin(t, testkit.Environ(t, "DERP_MAX_CONNECTIONS=20", "DERP_MAX_STRANGERS=19", "DERP_MAX_PER_ADDRESS=18", "DERP_ACCEPT_RATE=17"))
	for i, limit := range relay.AllLimits() {
		if limitVariable[limit] == "" || limitMeaning[limit] == "" || n.limitOf(limit) != 20-i {
			t.Errorf("%s: %q=%d %q", limit, limitVariable[limit], n.limitOf(limit), limitMeaning[limit])
		}
	}
}
