package relay

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
)

// A state begins when clients keep arriving, and ends some minutes after the last
// one. Bursts, single arrivals and strangers make no state.
func TestMisdirectionStates(t *testing.T) {
	for name, tt := range map[string]struct {
		client bool
		pauses []time.Duration // before each arrival
		after  time.Duration   // from the last arrival to the question
		now    bool
		begun  int // times that a state begins
	}{
		"a client that retries":                 {client: true, pauses: []time.Duration{0, 5 * time.Second, 5 * time.Second, time.Minute}, now: true, begun: 1},
		"a client that retries at once":         {client: true, pauses: slices.Repeat([]time.Duration{time.Second}, 11), now: true, begun: 1},
		"four minutes later":                    {client: true, pauses: []time.Duration{0, 10 * time.Second, 10 * time.Second}, after: 4 * time.Minute, now: true, begun: 1},
		"five minutes later":                    {client: true, pauses: []time.Duration{0, 10 * time.Second, 10 * time.Second}, after: 5 * time.Minute, begun: 1},
		"another state":                         {client: true, pauses: []time.Duration{0, time.Minute, time.Minute, time.Hour, time.Minute, time.Minute}, now: true, begun: 2},
		"a fingerprint of ten connections":      {client: true, pauses: slices.Repeat([]time.Duration{300 * time.Millisecond}, 10)},
		"two arrivals":                          {client: true, pauses: []time.Duration{0, time.Minute}},
		"one arrival every ten minutes":         {client: true, pauses: slices.Repeat([]time.Duration{10 * time.Minute}, 20)},
		"strangers":                             {pauses: slices.Repeat([]time.Duration{10 * time.Second}, 100)},
		"no arrival":                            {},
		"a client that comes back after a rest": {client: true, pauses: []time.Duration{0, 10 * time.Second, 6 * time.Minute, 10 * time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := 0
				m := newMisdirections(zerolog.Nop(), func(kind Misdirection) {
					if begun++; kind != NoUpgrade {
						t.Errorf("%s begins, want %s", kind, NoUpgrade)
					}
				})
				for _, pause := range tt.pauses {
					<-time.After(pause)
					m.note(NoUpgrade, tt.client, "192.0.2.1:1")
				}
				<-time.After(tt.after)
				states := m.states(time.Now())
				if s := states[0]; len(states) != len(Misdirections()) || s.Misdirection != NoUpgrade || s.Now != tt.now || s.Count != uint64(len(tt.pauses)) || begun != tt.begun {
					t.Errorf("%+v, begun %d times; want %v of %d arrivals, begun %d times", s, begun, tt.now, len(tt.pauses), tt.begun)
				}
				for _, s := range states[1:] {
					if s.Count != 0 || s.Now {
						t.Errorf("%+v, want no arrival", s)
					}
				}
			})
		})
	}
}

// PROXY headers from one address are evidence of a proxy when they keep coming, past
// headers from other addresses. Bursts and returning scanners are none.
func TestRecurringProxyHeaders(t *testing.T) {
	const proxy, scanner = "192.0.2.1", "198.51.100.1"
	every := func(pause time.Duration, n int) []time.Duration { return slices.Repeat([]time.Duration{pause}, n) }
	for name, tt := range map[string]struct {
		kind    Misdirection
		pauses  []time.Duration
		between string // another address that arrives after each
		now     bool
	}{
		"a proxy":               {UnexpectedProxyHeader, every(20*time.Second, 20), "", true},
		"a proxy, not trusted":  {UntrustedProxyHeader, every(20*time.Second, 20), "", true},
		"a proxy of one client": {UntrustedProxyHeader, every(2*time.Minute, 6), "", true},
		"a proxy and scanners":  {UntrustedProxyHeader, every(20*time.Second, 20), scanner, true},
		"four minutes":          {UntrustedProxyHeader, every(10*time.Second, 25), "", false},
		"a daily scanner":       {UntrustedProxyHeader, every(10*time.Minute, 20), "", false},
		"TLS of a scanner":      {TLSOnPlainPort, every(20*time.Second, 20), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMisdirections(zerolog.Nop(), nil)
				for i, pause := range tt.pauses {
					<-time.After(pause)
					m.note(tt.kind, false, fmt.Sprintf("%s:%d", proxy, 4000+i))
					if tt.between != "" {
						m.note(tt.kind, false, tt.between+":1")
					}
				}
				for _, s := range m.states(time.Now()) {
					if s.Now != (tt.now && s.Misdirection == tt.kind) {
						t.Errorf("%+v, want %v of %s", s, tt.now, tt.kind)
					}
				}
			})
		})
	}
}
