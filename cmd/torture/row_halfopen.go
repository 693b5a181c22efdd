//go:build linux

package main

import (
	"context"
	"fmt"
	"time"
)

func init() {
	register(row{
		name: "halfopen", attack: "connections that fall silent at every stage before admission",
		short: true, upstream: true, light: true, run: runHalfOpen,
	})
}

// halfOpen is a stage and the time after which the server closes such a connection.
type halfOpen struct {
	what, stage string
	within      time.Duration
	proxy       bool // the server waits for a PROXY header first
}

var halfOpens = []halfOpen{
	{"TCP silent", silentTCP, 5 * time.Second, false},
	{"one byte of a TLS record", silentByte, 5 * time.Second, false},
	{"TLS done, silent", silentTLS, 5 * time.Second, false},
	{"header, a byte each second", slowHeader, 5 * time.Second, false},
	{"request answered, silent", silentKeepalive, 5 * time.Second, false},
	{"DERP, silent", silentDERP, 10 * time.Second, false},
	{"WebSocket, silent", silentWebSocket, 10 * time.Second, false},
	{"PROXY header missing", silentTCP, 10 * time.Second, true}, // it may be left out, and the TLS handshake has its own 5 s
}

const (
	halfOpenCount = 10              // connections of each stage
	halfOpenGrace = 2 * time.Second // of a busy machine, and of a server that looks once a second
)

func runHalfOpen(ctx context.Context, l *lab) ([]measured, error) {
	plain, err := l.start(ctx, setup{})
	if err != nil {
		return nil, err
	}
	behind := plain
	if l.isDerpd() {
		if behind, err = l.start(ctx, setup{env: []string{"DERP_TRUSTED_PROXIES=127.0.0.0/8", "DERP_PROXY_PROTOCOL=true"}}); err != nil {
			return nil, err
		}
	}
	// The kernel or Go may close a connection first, so the wait is longer than any of
	// their usual timeouts.
	span := pick(l, 70*time.Second, 14*time.Second)
	assaults := make([]*assault, len(halfOpens))
	for i, h := range halfOpens {
		to := plain
		if h.proxy {
			to = behind
		}
		if assaults[i], err = l.attack(ctx, to, load{
			Kind: "hold", Stage: h.stage, Connections: halfOpenCount, AtOnce: halfOpenCount,
			Addresses: halfOpenCount, FirstAddr: halfOpenCount * i, Hold: span, For: span + 5*time.Second,
		}); err != nil {
			return nil, err
		}
	}
	var lines []measured
	for i, h := range halfOpens {
		t, err := assaults[i].wait(ctx)
		if err != nil {
			return nil, err
		}
		if h.proxy && !l.isDerpd() {
			continue
		}
		lines = append(lines, l.timely(h.judge(t, span)))
	}
	return lines, nil
}

// judge returns the line of a stage.
func (h halfOpen) judge(t tally, span time.Duration) measured {
	longest := time.Duration(t.counts["longestMillis"]) * time.Millisecond
	value := fmt.Sprintf("%.1f s at most", longest.Seconds())
	closed, opened := t.counts["closed"], t.counts["opened"]
	if closed < opened {
		value = fmt.Sprintf("%d of %d open after %.0f s", opened-closed, opened, span.Seconds())
	}
	if opened < halfOpenCount {
		value += fmt.Sprintf(", %d refused", halfOpenCount-opened)
	}
	return promise(fmt.Sprintf("%s: closed within %.0f s", h.what, h.within.Seconds()),
		closed == opened && opened > 0 && longest < h.within+halfOpenGrace, "%s", value)
}
