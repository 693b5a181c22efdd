//go:build linux

package main

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const machineEvery = 100 * time.Millisecond

// machine measures how long a request over HTTP takes that only this process answers.
// Other programs, and the work of the attack, delay it as they delay the relay.
type machine struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	longest time.Duration // guarded by mu
}

// measureMachine begins to measure. It ends with the row, or before with stop.
func (l *lab) measureMachine(ctx context.Context) (*machine, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	answer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	server := &http.Server{Handler: answer, ReadHeaderTimeout: healthWithin}
	go func() { _ = server.Serve(listener) }()
	m := &machine{}
	ctx, m.cancel = context.WithCancel(ctx)
	m.done.Go(func() {
		defer func() { _ = server.Close() }()
		address := netip.MustParseAddrPort(listener.Addr().String())
		pace(ctx, 0, machineEvery, func(time.Time) error {
			_, _, took := health(ctx, address, "/")
			m.mu.Lock()
			defer m.mu.Unlock()
			m.longest = max(m.longest, took)
			return ctx.Err()
		})
	})
	l.onClose(func() { m.stop() })
	return m, nil
}

// stop ends the measurement, and returns the longest delay.
func (m *machine) stop() time.Duration {
	m.cancel()
	m.done.Wait()
	return m.soFar()
}

// soFar returns the longest delay until now.
func (m *machine) soFar() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.longest
}

// stallFor is a delay of the machine during which every timeout of a client, of the relay
// and of its health may pass.
const stallFor = time.Second

// timely returns a line about what a stall of the machine may break too. On a machine that
// has stalled during the row, a broken line is no proof.
func (l *lab) timely(m measured) measured {
	if l.own == nil || m.State != broken {
		return m
	}
	if stall := l.own.soFar(); stall >= stallFor {
		m.Value += ", stall " + millis(stall)
		m.State = notReached
	}
	return m
}

// soon is a promise about the longest of some delays. A delay that is longer by a few
// times the machine's own one at the same time is no proof.
func soon(what string, within, longest, machine time.Duration, format string, args ...any) measured {
	line := promise(what, longest < within, format, args...)
	line.Value += ", machine " + millis(machine)
	if line.State == broken && longest < within+slowerBy*machine {
		line.State = notReached
	}
	return line
}
