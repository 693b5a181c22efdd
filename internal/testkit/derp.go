package testkit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/net/wsconn"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// Client is the part of a DERP client that exchanges packets. *derphttp.Client
// implements it; a *derp.Client lacks SelfPublicKey.
type Client interface {
	Send(to key.NodePublic, packet []byte) error
	Recv() (derp.ReceivedMessage, error)
	SelfPublicKey() key.NodePublic
}

// RegionClient returns a client that has only a region of the DERP map, as
// tailscaled does. The client connects when it is first used, and is closed when
// the test ends.
func RegionClient(t testing.TB, region *tailcfg.DERPRegion, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	c := derphttp.NewRegionClient(private, logger.Discard, netmon.NewStatic(), func() *tailcfg.DERPRegion { return region })
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// URLClient returns a client for the URL of /derp. The client is closed when the test
// ends.
func URLClient(t testing.TB, url string, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	c, err := derphttp.NewClient(private, url, logger.Discard, netmon.NewStatic())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// WebSocket is a DERP client over a WebSocket, as in a browser: derphttp dials
// WebSockets only when it is compiled for a browser.
type WebSocket struct {
	*derp.Client
	public key.NodePublic
}

// SelfPublicKey implements [Client].
func (w WebSocket) SelfPublicKey() key.NodePublic { return w.public }

// WebSocketClient connects to the URL of /derp through transport, and waits until
// the relay has admitted the client. The connection ends with the test.
func WebSocketClient(t testing.TB, url string, transport *http.Transport, header http.Header) WebSocket {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	ws, res, err := websocket.Dial(ctx, url, &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: transport}, HTTPHeader: header, Subprotocols: []string{"derp"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if res.Body != nil {
		_ = res.Body.Close()
	}
	t.Cleanup(func() { _ = ws.CloseNow() })
	conn := wsconn.NetConn(context.Background(), ws, websocket.MessageBinary, "relay")
	private := key.NewNode()
	c, err := derp.NewClient(private, conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), logger.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if message, err := c.Recv(); err != nil {
		t.Fatal(err)
	} else if _, ok := message.(derp.ServerInfoMessage); !ok {
		t.Fatalf("the first message is %T, want derp.ServerInfoMessage", message)
	}
	return WebSocket{c, private.Public()}
}

// Admitted connects a client, and returns why the relay refuses it, or nil.
//
// Connect of derphttp returns before the relay has registered the client, and
// before the relay has refused it. Admitted therefore waits for the first
// message: a relay sends it only to clients that it has admitted.
func Admitted(t testing.TB, c *derphttp.Client) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), Patience)
	defer cancel()
	if err := c.Connect(ctx); err != nil {
		return err
	}
	message, err := c.Recv()
	if err != nil {
		return err
	}
	switch m := message.(type) {
	case derp.ServerInfoMessage:
		return nil
	case derp.HealthMessage:
		return fmt.Errorf("refused with the text %q", m.Problem)
	}
	return fmt.Errorf("the first message is %T, want derp.ServerInfoMessage", message)
}

// MustAdmit is [Admitted] for clients that the relay must admit.
func MustAdmit(t testing.TB, clients ...*derphttp.Client) {
	t.Helper()
	for _, c := range clients {
		if err := Admitted(t, c); err != nil {
			t.Fatalf("%s is refused: %v", c.SelfPublicKey().ShortString(), err)
		}
	}
}

// Exchange passes a packet each way between two clients. The clients need not be
// connected yet. The test fails when a connection ends, or when a packet arrives
// that no Exchange or Reach has sent.
func Exchange(t testing.TB, a, b Client) {
	t.Helper()
	for _, way := range [][2]Client{{a, b}, {b, a}} {
		if _, err := pass(t, way[0], way[1], false); err != nil {
			t.Fatal(err)
		}
	}
}

// Reach passes a packet one way, and returns the time until its arrival.
// Connections may end meanwhile: derphttp dials again by itself.
func Reach(t testing.TB, from, to Client) time.Duration {
	t.Helper()
	took, err := pass(t, from, to, true)
	if err != nil {
		t.Fatal(err)
	}
	return took
}

// marker begins every packet of pass. It distinguishes late packets of earlier calls
// from forged packets.
var marker = []byte("testkit:")

// resendEvery is the interval at which pass sends its packet again.
const resendEvery = 20 * time.Millisecond

// pass sends a random packet until it arrives. One Send is not enough: a relay drops
// packets for a client that is not registered yet, or has a full queue. Errors of the
// connections are ignored with mayEnd.
func pass(t testing.TB, from, to Client, mayEnd bool) (took time.Duration, err error) {
	t.Helper()
	packet := make([]byte, 1280)
	_, _ = rand.Read(packet[copy(packet, marker):])
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	received := make(chan error, 1)
	go func() { received <- receive(ctx, to, from.SelfPublicKey(), packet, mayEnd) }()
	begun, tick := time.Now(), time.NewTicker(resendEvery)
	defer tick.Stop()
	for {
		if err := from.Send(to.SelfPublicKey(), packet); err != nil && !mayEnd {
			return 0, fmt.Errorf("sending a packet: %w", err)
		}
		select {
		case err := <-received:
			return time.Since(begun), err
		case <-ctx.Done():
			return 0, fmt.Errorf("no packet from %s to %s within %v", from.SelfPublicKey().ShortString(), to.SelfPublicKey().ShortString(), Patience)
		case <-tick.C:
		}
	}
}

// receive returns nil once the packet has arrived.
func receive(ctx context.Context, to Client, source key.NodePublic, packet []byte, mayEnd bool) error {
	tick := time.NewTicker(resendEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		message, err := to.Recv()
		if err != nil {
			if !mayEnd {
				return fmt.Errorf("receiving a packet: %w", err)
			}
			select { // the next Recv dials again
			case <-tick.C:
			case <-ctx.Done():
			}
			continue
		}
		got, ok := message.(derp.ReceivedPacket)
		switch {
		case !ok:
		case got.Source == source && bytes.Equal(got.Data, packet):
			return nil
		case !bytes.HasPrefix(got.Data, marker):
			return errors.New("another packet arrives than was sent")
		}
	}
	return ctx.Err()
}
