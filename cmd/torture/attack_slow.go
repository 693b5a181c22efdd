//go:build linux

package main

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() { attackers["slow"] = attackSlow }

const (
	slowSenders = 4 // clients 0 to 3 of the attack; the readers follow
	slowSmall   = 1280
	slowEvery   = 300 * time.Millisecond
	slowBytes   = 512 // read each time
	slowWindow  = 8 << 10
)

// attackSlow connects senders, AtOnce readers that read a little at a time, and Stopped
// readers that read nothing. The senders send packets of 64 KiB and of 1,280 bytes to
// all of them in turn. Until Hold has passed, all read what comes.
func attackSlow(ctx context.Context, l load, c *counts) error {
	certificate, err := x509.ParseCertificate(l.Certificate)
	if err != nil {
		return err
	}
	clients := make([]*testrelay.Client, slowSenders+l.AtOnce+l.Stopped)
	defer func() {
		for _, client := range clients {
			if client != nil {
				reset(client.Conn.NetConn())
			}
		}
	}()
	for i := range clients {
		to := testrelay.Target{HTTPS: l.HTTPS, Certificate: certificate}
		if clients[i], err = testrelay.Dial(ctx, to, key.NewNode(), l.from(i)); err != nil {
			return fmt.Errorf("connecting client %d: %w", i, err)
		}
		// The server's memory is to fill, not the reader's kernel.
		if err := clients[i].Conn.NetConn().(*net.TCPConn).SetReadBuffer(slowWindow); err != nil {
			return err
		}
		c.add("connected", 1)
	}
	senders, readers := clients[:slowSenders], clients[slowSenders:]
	slowAt := time.Now().Add(l.Hold)
	g, gctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(gctx, func() {
		for _, client := range clients {
			_ = client.Conn.NetConn().SetDeadline(time.Unix(1, 0))
		}
	})
	defer stop()
	for i, reader := range readers {
		g.Go(func() error {
			readFully(reader, slowAt)
			c.add("slow", 1)
			if i < l.AtOnce {
				readSlowly(gctx, reader.Conn.NetConn(), c)
			}
			return nil
		})
	}
	for i, sender := range senders {
		g.Go(func() error { return sendToAll(gctx, sender, i, readers, l.Rate/slowSenders, c) })
		g.Go(func() error { // what the server tells a sender
			_, _ = io.Copy(io.Discard, sender.Conn)
			return nil
		})
	}
	return g.Wait()
}

// readFully reads all that comes until a time.
func readFully(reader *testrelay.Client, until time.Time) {
	conn := reader.Conn.NetConn()
	_ = conn.SetReadDeadline(until)
	_, _ = io.Copy(io.Discard, conn) // below TLS, which is cheaper
	_ = conn.SetReadDeadline(time.Time{})
}

// readSlowly reads a little at a time until the connection ends.
func readSlowly(ctx context.Context, conn net.Conn, c *counts) {
	b := make([]byte, slowBytes)
	pace(ctx, slowEvery, slowEvery, func(time.Time) error {
		_, err := conn.Read(b)
		if err != nil && ctx.Err() == nil {
			c.add("closed", 1)
		}
		return err
	})
}

// sendToAll sends to the readers in turn, large and small packets alternately.
func sendToAll(ctx context.Context, sender *testrelay.Client, first int, readers []*testrelay.Client, rate float64, c *counts) error {
	payload := make([]byte, derp.MaxPacketSize)
	n := first
	pace(ctx, 0, time.Duration(float64(time.Second)/rate), func(time.Time) error {
		size := slowSmall
		if n/len(readers)%2 == 0 {
			size = len(payload)
		}
		header := binary.BigEndian.AppendUint32([]byte{byte(derp.FrameSendPacket)}, uint32(keyLen+size))
		header = readers[n%len(readers)].Public.AppendTo(header)
		n += slowSenders
		_, err := sender.Conn.Write(append(header, payload[:size]...))
		if err == nil {
			c.add("sent", 1)
			c.add("bytes", int64(size))
		}
		return err
	})
	return nil
}
