package relay

import (
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/types/key"

	"derpd/internal/caught"
	"derpd/internal/testkit"
)

// pipes is a listener of connections in memory.
type pipes struct {
	accepted chan net.Conn
	closed   chan struct{}
	close    func()
}

func newPipes() pipes {
	l := pipes{accepted: make(chan net.Conn), closed: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

func (l pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-l.accepted:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l pipes) Close() error {
	l.close()
	return nil
}

func (pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443} }

// connect returns the client's end of a new connection, and a channel that is closed
// when the server has closed its end.
func (l pipes) connect() (client net.Conn, ended chan struct{}) {
	client, server := net.Pipe()
	ended = make(chan struct{})
	l.accepted <- endingConn{server, sync.OnceFunc(func() { close(ended) })}
	return client, ended
}

// endingConn is a connection that reports its first Close.
type endingConn struct {
	net.Conn
	closed func()
}

func (c endingConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

func (endingConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4000} }

// FuzzStranger sends any bytes to a whole relay: in place of a request, after the
// upgrade to DERP or to a WebSocket, and as an admitted client. Nothing panics, and the
// relay ends the connection after the client.
func FuzzStranger(f *testing.F) {
	ln := newPipes()
	r := start(f, Config{
		PrivateKey: key.NewNode(), Home: http.NotFoundHandler(), TellClients: true, DisallowApps: []string{"app"},
		Log: zerolog.Nop(),
	}, ln)
	client := key.NewNode()
	info := client.SealTo(r.PublicKey(), []byte(`{"version":2}`))
	admitted := slices.Concat(binary.BigEndian.AppendUint32([]byte{byte(derp.FrameClientInfo)}, uint32(derp.KeyLen+len(info))), client.Public().AppendTo(nil), info)
	const webSocket = "GET /derp HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: derp\r\n\r\n"
	before := []string{
		"",
		fastStart,
		webSocket,
		fastStart + string(admitted),
		webSocket + string(messageHeader(binaryMessage, len(admitted))) + string(admitted),
	}
	for i := range before {
		at := byte(i)
		f.Add(at, []byte(fastStart))
		f.Add(at, admitted)
		f.Add(at, frameOf(derp.FrameSendPacket, 3000, client.Public()))
		f.Add(at, frameOf(derp.FrameForwardPacket, 100, client.Public(), client.Public()))
		f.Add(at, slices.Concat(frameOf(derp.FramePing, 8), frameOf(derp.FrameNotePreferred, 1), frameOf(derp.FrameWatchConns, 0)))
		f.Add(at, append(messageHeader(binaryMessage, 13), frameOf(derp.FramePing, 8)...))
		f.Add(at, append(messageHeader(textMessage, 1<<30), "text"...))
	}
	f.Add(byte(0), []byte("POST /derp HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))
	f.Add(byte(0), []byte("GET /generate_204 HTTP/1.1\r\nHost: a\r\nX-Tailscale-Challenge: a\r\n\r\nGET / HTTP/1.0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, at byte, sent []byte) {
		panics := caught.Count()
		conn, ended := ln.connect()
		var reading sync.WaitGroup
		reading.Go(func() { _, _ = io.Copy(io.Discard, conn) })
		_ = conn.SetWriteDeadline(time.Now().Add(testkit.Patience))
		_, _ = io.WriteString(conn, before[int(at)%len(before)])
		_, _ = conn.Write(sent)
		_ = conn.Close()
		testkit.Receive(t, "the end of the connection", ended)
		reading.Wait()
		if got := caught.Count() - panics; got > 0 {
			t.Errorf("%d panics", got)
		}
	})
}

// FuzzDisallowed opens first frames. Only a whole client info with the name of a
// refused app is disallowed.
func FuzzDisallowed(f *testing.F) {
	private, client := key.NewNode(), key.NewNode()
	f.Add([]byte(`{"AppName":"refused"}`), uint16(1000))
	f.Add([]byte(`{"appName":"refused","version":2}`), uint16(60))
	f.Add([]byte(`{"AppName":"other"}`), uint16(1000))
	f.Add([]byte(`[]`), uint16(4))
	f.Fuzz(func(t *testing.T, text []byte, length uint16) {
		box := client.SealTo(private.Public(), text)
		frame := slices.Concat(binary.BigEndian.AppendUint32([]byte{byte(derp.FrameClientInfo)}, uint32(derp.KeyLen+len(box))), client.Public().AppendTo(nil), box)
		seen := frame[:min(int(length), len(frame))]
		var info derp.ClientInfo
		want := len(seen) == len(frame) && json.Unmarshal(text, &info) == nil && info.AppName == "refused"
		s := sessionOf(&firstBytes{bytes: seen}, nil)
		s.Conn = &firstBytes{bytes: seen}
		if got := (&teller{private: private, disallowApps: []string{"refused"}}).disallowed(s, client.Public()); got != want {
			t.Errorf("%q, %d of %d bytes: disallowed %v, want %v", text, len(seen), len(frame), got, want)
		}
	})
}

// FuzzParseMeshKey reads any text. An error does not contain the text, and no key is
// zero.
func FuzzParseMeshKey(f *testing.F) {
	f.Add(strings.Repeat("0123456789abcdef", 4))
	f.Add(strings.Repeat("0", 64))
	f.Add("a passphrase for one test only")
	f.Add("\xff\xfe")
	f.Fuzz(func(t *testing.T, text string) {
		k, err := ParseMeshKey(text)
		if k.IsZero() != (err != nil) {
			t.Errorf("key is zero %v, %v", k.IsZero(), err)
		}
		if err != nil && len(text) > 20 && strings.Contains(err.Error(), text) {
			t.Errorf("the error contains the text: %v", err)
		}
	})
}

// FuzzLoadKey reads a file with any content. A key that is read survives a second
// start, and an error does not contain the content.
func FuzzLoadKey(f *testing.F) {
	text, err := json.Marshal(keyFile{key.NewNode()})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"PrivateKey":"privkey:0"}`))
	f.Add([]byte(`{"PrivateKey":"privkey:` + strings.Repeat("0", 64) + `"}`))
	f.Add([]byte("null"))
	path := filepath.Join(f.TempDir(), "node.key")
	f.Fuzz(func(t *testing.T, content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		private, err := LoadKey(path)
		if private.IsZero() != (err != nil) {
			t.Errorf("key is zero %v, %v", private.IsZero(), err)
		}
		if err != nil && len(content) > 20 && strings.Contains(err.Error(), string(content)) {
			t.Errorf("the error contains the content: %v", err)
		}
		if again, err := LoadOrCreateKey(path); !again.Equal(private) {
			t.Errorf("another key at the second start, %v", err)
		}
		if kept, err := os.ReadFile(path); err != nil || string(kept) != string(content) {
			t.Errorf("the file was changed, %v", err)
		}
	})
}
