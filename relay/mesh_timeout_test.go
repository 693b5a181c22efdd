package relay

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// bufferedConn is a connection that is read through a buffer.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// serveMesh is another node of the mesh on a connection: the upgrade, the
// handshake, and with accepts the notice that the peer may watch. Then it answers
// every frame.
func serveMesh(conn net.Conn, accepts bool) {
	far := bufferedConn{conn, bufio.NewReader(conn)}
	if _, err := http.ReadRequest(far.r); err != nil {
		return
	}
	_, _ = io.WriteString(far, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n")
	greetMesh(far)
	if _, err := io.ReadFull(far, make([]byte, derp.FrameHeaderLen)); err != nil { // the request to watch
		return
	}
	if accepts {
		present := key.NewNode().Public().AppendTo(nil)
		present = append(present, make([]byte, 16+2+1)...)
		_, _ = far.Write(append(binary.BigEndian.AppendUint32([]byte{byte(derp.FramePeerPresent)}, uint32(len(present))), present...))
	}
	for {
		header := make([]byte, derp.FrameHeaderLen)
		if _, err := io.ReadFull(far, header); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, far, int64(binary.BigEndian.Uint32(header[1:]))); err != nil {
			return
		}
		if accepts {
			_, _ = far.Write(append([]byte{byte(derp.FramePong), 0, 0, 0, 8}, make([]byte, 8)...))
		}
	}
}

// warning is a connection of derpserver. A text for the client follows the second
// write, which is derpserver's info. A pipe has no buffer, so out is one.
type warning struct {
	net.Conn
	out    chan []byte
	writes int
}

func (c *warning) Write(p []byte) (int, error) {
	c.out <- bytes.Clone(p)
	if c.writes++; c.writes == 2 {
		c.out <- healthFrame("the certificate ends")
	}
	return len(p), nil
}

// serveWarnedMesh is another node, which sends a text to the clients that it admits.
func serveWarnedMesh(conn net.Conn, meshKey key.DERPMesh) {
	reader := bufio.NewReader(conn)
	if _, err := http.ReadRequest(reader); err != nil {
		return
	}
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n")
	server := derpserver.New(key.NewNode(), logger.Discard)
	_ = server.SetMeshKey(meshKey.String())
	far := &warning{Conn: conn, out: make(chan []byte, 1000)}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case p := <-far.out:
				_, _ = conn.Write(p)
			case <-ended:
				return
			}
		}
	}()
	server.Accept(context.Background(), far, bufio.NewReadWriter(bufio.NewReader(bufferedConn{far, reader}), nil), "127.0.0.1:0")
	_ = server.Close()
}

// A connect to a node that does not accept it within ten seconds ends. One that
// was accepted stays.
func TestMeshConnectTimeout(t *testing.T) {
	for name, tt := range map[string]struct {
		node func(net.Conn)
		want time.Duration // 0: it stays; -1: it ends at once
	}{
		"no answer":        {func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }, 10 * time.Second},
		"no acceptance":    {func(conn net.Conn) { serveMesh(conn, false) }, 10 * time.Second},
		"an accepted mesh": {func(conn net.Conn) { serveMesh(conn, true) }, 0},
		"a mesh with a text for clients": {func(conn net.Conn) {
			serveWarnedMesh(conn, meshKey(t, "correct horse battery"))
		}, 0},
		"a node hangs up": {func(conn net.Conn) { _ = conn.Close() }, -1},
		"no upgrade at all": {func(conn net.Conn) {
			_, _ = http.ReadRequest(bufio.NewReader(conn))
			_, _ = io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
		}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, err := New(Config{PrivateKey: key.NewNode(), Log: zerolog.Nop(), Home: http.NotFoundHandler(), BootstrapDNS: http.NotFoundHandler(), Mesh: MeshConfig{
					Key: meshKey(t, "correct horse battery"), Nodes: []MeshNode{{Host: "derp.example.com", Port: 443}},
				}})
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = r.Close() }()
				near, far := net.Pipe()
				go func() {
					defer func() { _ = far.Close() }()
					tt.node(far)
				}()
				ctx, hangUp := context.WithCancelCause(t.Context())
				context.AfterFunc(ctx, func() { _ = near.Close() })
				begun := time.Now()
				ended := make(chan error, 1)
				go func() { ended <- r.mesh.receive(ctx, hangUp, r.mesh.peers[0], near) }()
				select {
				case err := <-ended:
					if err == nil {
						t.Error("the connection ended without an error")
					}
					took, cause := time.Since(begun), context.Cause(ctx)
					if tt.want >= 0 && (took != tt.want || !errors.Is(cause, errSilent)) || tt.want < 0 && (took > 0 || cause != nil) {
						t.Errorf("ended after %s for %v, want %s", took, cause, tt.want)
					}
				case <-time.After(time.Hour):
					if tt.want != 0 || !r.mesh.States()[0].Up {
						t.Errorf("still connected, want the end after %s", tt.want)
					}
				}
				hangUp(nil)
				_ = near.Close()
				synctest.Wait()
			})
		})
	}
}

// Without a mesh the mesh key of the process is a secret: whoever has it may list
// and disconnect clients.
func TestMeshKeyOfNoMesh(t *testing.T) {
	first, second := newRelay(t, Config{Log: zerolog.Nop()}).server.MeshKey(), newRelay(t, Config{Log: zerolog.Nop()}).server.MeshKey()
	if first.IsZero() || first.Equal(second) || strings.Trim(first.String(), "0") == "" {
		t.Error("the mesh key of a relay without a mesh can be guessed")
	}
}
