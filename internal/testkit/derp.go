package testkit

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
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

// RegionClient makes a client that finds the relay by a region of the DERP map
// alone, as tailscaled does. The client connects when it is first used, and is
// closed when the test ends.
func RegionClient(t testing.TB, region *tailcfg.DERPRegion, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	c := derphttp.NewRegionClient(private, logger.Discard, netmon.NewStatic(), func() *tailcfg.DERPRegion { return region })
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// URLClient makes a client that finds the relay by the URL of /derp. The client
// is closed when the test ends.
func URLClient(t testing.TB, url string, private key.NodePrivate) *derphttp.Client {
	t.Helper()
	c, err := derphttp.NewClient(private, url, logger.Discard, netmon.NewStatic())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
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
	if _, ok := message.(derp.ServerInfoMessage); !ok {
		return fmt.Errorf("the first message is %T, want derp.ServerInfoMessage", message)
	}
	return nil
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

// Exchange passes a packet each way between two clients, which need not be
// connected yet. The test fails when a connection ends, or when a packet
// arrives that no Exchange or Reach has sent.
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

// marker begins every packet of pass, so that a packet of an earlier call that
// arrives late can be told from a forged one.
var marker = []byte("testkit:")

// resendEvery is the interval at which pass sends its packet again.
const resendEvery = 20 * time.Millisecond

// pass sends a random packet until it arrives. One Send is not enough: a relay
// drops packets for a client that it has not registered yet, and for one whose
// queue is full. Errors of the connections count only if they may not end.
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
