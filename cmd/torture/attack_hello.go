//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"derpd/internal/testrelay"
)

func init() { attackers["hellos"] = attackHellos }

// attackDialers is the number of connections that an attacker opens at the same time.
const attackDialers = 64

// attackHellos sends Go's own ClientHello, with a key share of X25519MLKEM768, on a new
// connection each time, and reads nothing. The oldest connection is reset when more than
// AtOnce are open. The server makes a whole flight for each hello.
func attackHellos(ctx context.Context, l load, c *counts) error {
	hello, err := clientHello()
	if err != nil {
		return err
	}
	c.highest("bytes", int64(len(hello)))
	open := make(chan net.Conn, l.AtOnce)
	defer func() {
		for {
			select {
			case conn := <-open:
				reset(conn)
			default:
				return
			}
		}
	}()
	return l.each(ctx, attackDialers, func(ctx context.Context, i int) error {
		c.add("tried", 1)
		conn, err := testrelay.DialTCP(ctx, l.HTTPS, l.from(i))
		if err != nil {
			c.add("refused", 1)
			return nil
		}
		if _, err := conn.Write(hello); err != nil {
			c.add("closed", 1)
			reset(conn)
			return nil
		}
		c.add("sent", 1)
		for {
			select {
			case open <- conn:
				c.highest("open", int64(len(open)))
				return nil
			default:
			}
			select {
			case oldest := <-open:
				reset(oldest)
			default:
			}
		}
	})
}

// each calls f for each connection at the rate of the attack, in as many goroutines as
// workers, until the attack ends. The last number is Connections-1, or none if that is 0.
func (l load) each(ctx context.Context, workers int, f func(ctx context.Context, i int) error) error {
	next := make(chan int)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(next)
		begun := time.Now()
		for i := 0; l.Connections == 0 || i < l.Connections; i++ {
			if l.Rate > 0 {
				due := begun.Add(time.Duration(float64(i) / l.Rate * float64(time.Second)))
				if left := time.Until(due); left > 0 {
					testrelay.Pause(left)
				}
			}
			select {
			case next <- i:
			case <-gctx.Done():
				return nil
			}
		}
		return nil
	})
	for range workers {
		g.Go(func() error {
			for i := range next {
				if err := f(gctx, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// reset closes a connection with a TCP reset, so that neither end keeps its port.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// clientHello returns the first record of a TLS client.
func clientHello() ([]byte, error) {
	var sent recorder
	client := tls.Client(&sent, &tls.Config{ServerName: testrelay.Hostname, MinVersion: tls.VersionTLS13})
	if err := client.HandshakeContext(context.Background()); !errors.Is(err, errRecorded) {
		return nil, err
	}
	return sent.bytes, nil
}

// recorder is a connection that keeps what is written until the first read.
type recorder struct {
	net.Conn
	bytes []byte
}

var errRecorded = errors.New("recorded")

func (r *recorder) Write(b []byte) (int, error) {
	r.bytes = append(r.bytes, b...)
	return len(b), nil
}

func (r *recorder) Read([]byte) (int, error)    { return 0, errRecorded }
func (r *recorder) SetDeadline(time.Time) error { return nil }
func (r *recorder) Close() error                { return nil }
