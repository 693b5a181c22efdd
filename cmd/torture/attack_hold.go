//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() { attackers["hold"] = attackHold }

// Stages at which a connection of a stranger falls silent.
const (
	silentTCP       = "TCP"       // nothing is sent
	silentByte      = "byte"      // the first byte of a TLS record is sent
	silentTLS       = "TLS"       // the handshake is done
	slowHeader      = "header"    // a byte of a request's header each second
	silentKeepalive = "keepalive" // a request is answered
	silentDERP      = "DERP"      // the connection is a DERP client's, without its key
	silentWebSocket = "WebSocket" // the same in a WebSocket
	silentFrame     = "frame"     // 32 bytes of a first frame that claims Frame bytes
)

const (
	stageWithin = 10 * time.Second // of an attacker's patience until a stage is reached
	dripEvery   = time.Second
)

// attackHold opens connections up to a stage and keeps them until the server closes
// them, or Hold has passed. It opens another one for each that has ended.
func attackHold(ctx context.Context, l load, c *counts) error {
	var open atomic.Int64
	return l.each(ctx, l.AtOnce, func(ctx context.Context, i int) error {
		c.add("tried", 1)
		conn, err := testrelay.DialTCP(ctx, l.HTTPS, l.from(i))
		if err != nil {
			c.add("refused", 1)
			return nil
		}
		defer reset(conn)
		client, err := l.reach(ctx, conn)
		if err != nil {
			c.add("refused", 1)
			return nil
		}
		c.add("opened", 1)
		c.highest("open", open.Add(1))
		defer open.Add(-1)
		begun := time.Now()
		if l.untilClosed(ctx, conn, client) {
			c.add("closed", 1)
			c.add("closedMillis", time.Since(begun).Milliseconds())
			c.highest("longestMillis", time.Since(begun).Milliseconds())
		}
		return nil
	})
}

// untilClosed waits until the server closes the connection. It returns false if Hold or
// the attack ends before. It reads below TLS, which is cheaper.
func (l load) untilClosed(ctx context.Context, conn net.Conn, client io.Writer) bool {
	_ = conn.SetDeadline(time.Time{}) // that of reach
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	end := time.Now().Add(l.Hold)
	if l.Hold == 0 {
		end = time.Now().Add(time.Hour)
	}
	discard := make([]byte, 512)
	for ctx.Err() == nil && time.Now().Before(end) {
		until := end
		if l.Stage == slowHeader {
			until = time.Now().Add(dripEvery)
			if _, err := io.WriteString(client, "a"); err != nil {
				return true
			}
		}
		// AfterFunc has set another deadline if ctx ended meanwhile.
		_ = conn.SetReadDeadline(until)
		if ctx.Err() != nil {
			return false
		}
		if _, err := conn.Read(discard); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return ctx.Err() == nil
		}
	}
	return false
}

// reach brings a connection to the stage of the attack. It returns what the client
// writes on.
func (l load) reach(ctx context.Context, conn net.Conn) (io.Writer, error) {
	if err := conn.SetDeadline(time.Now().Add(stageWithin)); err != nil {
		return nil, err
	}
	switch l.Stage {
	case silentTCP:
		return conn, nil
	case silentByte:
		_, err := conn.Write([]byte{0x16})
		return conn, err
	}
	// The cheapest handshake for the attacker.
	client := tls.Client(conn, &tls.Config{
		ServerName: testrelay.Hostname, InsecureSkipVerify: true,
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519},
	})
	if err := client.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return client, l.speak(client)
}

// speak says what a client says until the stage of the attack.
func (l load) speak(client io.ReadWriter) error {
	const start = " HTTP/1.1\r\nHost: " + testrelay.Hostname + "\r\n"
	const upgrade = "GET /derp" + start + "Connection: Upgrade\r\nUpgrade: "
	var text string
	switch l.Stage {
	case silentTLS:
	case slowHeader:
		text = "GET /derp" + start + "X-Slow: "
	case silentKeepalive:
		text = "GET /generate_204" + start + "\r\n"
	case silentWebSocket:
		text = upgrade + "websocket\r\nSec-WebSocket-Protocol: derp\r\nSec-WebSocket-Version: 13\r\n" +
			"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
	case silentDERP, silentFrame:
		text = upgrade + "DERP\r\n" + derp.FastStartHeader + ": 1\r\n\r\n"
	default:
		return fmt.Errorf("no stage has the name %q", l.Stage)
	}
	if _, err := io.WriteString(client, text); err != nil {
		return err
	}
	switch l.Stage {
	case silentKeepalive, silentWebSocket, silentDERP, silentFrame:
		// The server answers first, with a response or with its key.
		if _, err := client.Read(make([]byte, 4<<10)); err != nil {
			return err
		}
	}
	if l.Stage != silentFrame {
		return nil
	}
	frame := binary.BigEndian.AppendUint32([]byte{byte(derp.FrameClientInfo)}, uint32(l.Frame))
	_, err := client.Write(key.NewNode().Public().AppendTo(frame))
	return err
}
