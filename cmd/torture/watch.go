//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/net/stun"
)

const (
	lookEvery    = time.Second
	healthWithin = 5 * time.Second // a health answer that takes longer is none
	stunTries    = 3               // requests of a client before it gives up
	stunWithin   = 300 * time.Millisecond
)

// watched is what monitors and clients saw of a server, one look each second.
type watched struct {
	STUN, NoSTUN    int // looks, and those without an answer to any of three requests
	Ready, NotReady int // looks, and those without a 200 from /readyz
	Livez           time.Duration
	Machine         time.Duration // its own longest delay
	Cause           string        // the first text of /readyz that was not ready
}

// watcher looks at a server once a second.
type watcher struct {
	cancel context.CancelFunc
	done   sync.WaitGroup
	own    *machine

	mu   sync.Mutex
	seen watched // guarded by mu
}

// watch begins to look at a server. Only derpd has /readyz and /livez.
func (l *lab) watch(ctx context.Context, r *relay) (*watcher, error) {
	own, err := l.measureMachine(ctx)
	if err != nil {
		return nil, err
	}
	w := &watcher{own: own}
	ctx, w.cancel = context.WithCancel(ctx)
	w.every(ctx, func() func(*watched) {
		answered := answersSTUN(ctx, r.STUN)
		return func(seen *watched) {
			seen.STUN++
			if !answered {
				seen.NoSTUN++
			}
		}
	})
	if l.isDerpd() {
		w.every(ctx, func() func(*watched) {
			status, text, _ := health(ctx, r.Admin, "/readyz")
			return func(seen *watched) {
				seen.Ready++
				if status != http.StatusOK {
					seen.NotReady++
					if seen.Cause == "" {
						seen.Cause = text
					}
				}
			}
		})
		w.every(ctx, func() func(*watched) {
			_, _, took := health(ctx, r.Admin, "/livez")
			return func(seen *watched) { seen.Livez = max(seen.Livez, took) }
		})
	}
	l.onClose(func() { _ = w.stop() })
	return w, nil
}

// every looks once a second. look returns how to count what it saw.
func (w *watcher) every(ctx context.Context, look func() func(*watched)) {
	w.done.Go(func() {
		pace(ctx, 0, lookEvery, func(time.Time) error {
			count := look()
			if ctx.Err() != nil {
				return ctx.Err() // the end of the row ended this look
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			count(&w.seen)
			return nil
		})
	})
}

// stop ends the looks, and returns what they saw.
func (w *watcher) stop() watched {
	w.cancel()
	w.done.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen.Machine = w.own.stop()
	return w.seen
}

// health asks the admin listener on a new connection, as `derpd healthcheck` does. The
// status is 0 without an answer.
func health(ctx context.Context, admin netip.AddrPort, path string) (status int, text string, took time.Duration) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, healthWithin)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin.String()+path, nil)
	if err != nil {
		return 0, err.Error(), time.Since(begun)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	response, err := transport.RoundTrip(request)
	if err != nil {
		return 0, err.Error(), time.Since(begun)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return 0, err.Error(), time.Since(begun)
	}
	return response.StatusCode, string(body), time.Since(begun)
}

// answersSTUN reports whether a server answers a request, or one of its repetitions.
func answersSTUN(ctx context.Context, server netip.AddrPort) bool {
	for range stunTries {
		if ctx.Err() != nil {
			return false
		}
		if err := askSTUN(server); err == nil {
			return true
		}
	}
	return false
}

func askSTUN(server netip.AddrPort) error {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	deadline := time.Now().Add(stunWithin)
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	id, answer := stun.NewTxID(), make([]byte, 128)
	if _, err := conn.Write(stun.Request(id)); err != nil {
		return err
	}
	n, err := conn.Read(answer)
	if err != nil {
		// A closed port answers at once. A client waits before it asks again.
		pause := time.NewTimer(time.Until(deadline))
		<-pause.C
		return err
	}
	if got, _, err := stun.ParseResponse(answer[:n]); err != nil || got != id {
		return fmt.Errorf("not an answer: %w", err)
	}
	return nil
}
