package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

// port is the TCP and UDP port of serve.
const port = "9000"

const (
	chunk       = 64 << 10 // bytes written or compared at once
	echoEvery   = 20 * time.Millisecond
	reportEvery = 50 * time.Millisecond
	// pace is the rate of flow in bytes per second. It leaves CPU time for the
	// programs under test.
	pace = 8 << 20
)

// content returns an endless pseudo-random stream, the same for every reader.
func content() io.Reader { return rand.NewChaCha8([32]byte{1}) }

// serve serves content by HTTP, and echoes UDP.
func serve(ctx context.Context, _ []string) (any, error) {
	conn, err := new(net.ListenConfig).ListenPacket(ctx, "udp", ":"+port)
	if err != nil {
		return nil, err
	}
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}()
	server := &http.Server{Addr: ":" + port, Handler: http.HandlerFunc(give), ReadHeaderTimeout: time.Minute}
	context.AfterFunc(ctx, func() {
		_ = conn.Close()
		_ = server.Close()
	})
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return nil, err
	}
	return nil, nil
}

// give writes as many bytes as the path says. For 0 it writes at the pace until the
// client disconnects.
func give(w http.ResponseWriter, r *http.Request) {
	size, err := strconv.ParseInt(r.URL.Path[1:], 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if size > 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		_, _ = io.CopyN(w, content(), size)
		return
	}
	source, tick := content(), time.NewTicker(time.Second*chunk/pace)
	defer tick.Stop()
	for {
		if _, err := io.CopyN(w, source, chunk); err != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
		}
	}
}

// fetch downloads content from a serving host and compares it: `copy HOST BYTES`.
func fetch(ctx context.Context, args []string) (any, error) {
	size, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return nil, err
	}
	started := time.Now()
	body, err := open(ctx, args[0], args[1])
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	got, want := sha256.New(), sha256.New()
	n, err := io.Copy(got, body)
	if err != nil {
		return nil, fmt.Errorf("after %d bytes: %w", n, err)
	}
	took := time.Since(started)
	if _, err := io.CopyN(want, content(), size); err != nil {
		return nil, err
	}
	if n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return nil, fmt.Errorf("got %d bytes with SHA-256 %x, want %d with %x", n, got.Sum(nil), size, want.Sum(nil))
	}
	return map[string]any{"bytes": n, "seconds": took.Seconds(), "sha256": fmt.Sprintf("%x", got.Sum(nil))}, nil
}

func open(ctx context.Context, host, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, errors.New(res.Status)
	}
	return res.Body, nil
}

// silence measures the longest time without data.
type silence struct {
	mu      sync.Mutex
	count   int64
	last    time.Time
	longest time.Duration
}

func (s *silence) heard(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.count > 0 {
		s.longest = max(s.longest, now.Sub(s.last))
	}
	s.count, s.last = s.count+int64(n), now
}

// state is a report of flow. Silences include the one that lasts at the moment of the
// report.
type state struct {
	Bytes      int64   `json:"bytes"`       // by TCP, all as expected
	Echoes     int64   `json:"echoes"`      // by UDP
	TCPSilence float64 `json:"tcp_silence"` // longest one, seconds
	UDPSilence float64 `json:"udp_silence"`
	TCPIdle    float64 `json:"tcp_idle"` // present one, seconds
	UDPIdle    float64 `json:"udp_idle"`
}

func (s *silence) report() (count int64, longest, idle float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == 0 {
		return 0, 0, 0
	}
	now := time.Since(s.last)
	return s.count, max(s.longest, now).Seconds(), now.Seconds()
}

// flow runs a TCP transfer and UDP echoes with a serving host, `flow HOST`. It reports
// periodically and ends with its standard input.
func flow(ctx context.Context, args []string) (any, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	var tcp, udp silence
	failed := make(chan error, 2)
	go func() { failed <- drain(ctx, args[0], &tcp) }()
	go func() { failed <- echo(ctx, args[0], &udp) }()

	out, tick := json.NewEncoder(os.Stdout), time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, nil
		case err := <-failed:
			if ctx.Err() != nil {
				return nil, nil
			}
			return nil, err
		case <-tick.C:
			var now state
			now.Bytes, now.TCPSilence, now.TCPIdle = tcp.report()
			now.Echoes, now.UDPSilence, now.UDPIdle = udp.report()
			if err := out.Encode(now); err != nil {
				return nil, err
			}
		}
	}
}

// drain reads from one connection and compares every byte. The connection must not
// end.
func drain(ctx context.Context, host string, s *silence) error {
	body, err := open(ctx, host, "0")
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	want, got, right := content(), make([]byte, chunk), make([]byte, chunk)
	for {
		n, err := body.Read(got)
		if err != nil {
			return fmt.Errorf("the TCP connection ended: %w", err)
		}
		if _, err := io.ReadFull(want, right[:n]); err != nil {
			return err
		}
		if !bytes.Equal(got[:n], right[:n]) {
			return errors.New("received bytes differ from the sent ones")
		}
		s.heard(n)
	}
}

func echo(ctx context.Context, host string, s *silence) error {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", net.JoinHostPort(host, port))
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 1500)
		for ctx.Err() == nil {
			if n, err := conn.Read(buf); err == nil && n == 8 {
				s.heard(1)
			}
		}
	}()
	tick := time.NewTicker(echoEvery)
	defer tick.Stop()
	for number := uint64(0); ; number++ {
		// An error is about an earlier datagram, which was lost.
		_, _ = conn.Write(binary.BigEndian.AppendUint64(nil, number))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
