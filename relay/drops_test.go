package relay

import (
	"context"
	"errors"
	"testing"

	"github.com/rs/zerolog"
	"tailscale.com/disco"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// Packets counts what clients send and what is dropped, without disco packets for
// nodes that are not there.
func TestPackets(t *testing.T) {
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop()}, ln)
	c := connect(t, ln, nil, key.NewNode())
	before := r.Packets() // the drops are of all tests
	absent, question := key.NewNode().Public(), make([]byte, 200)
	copy(question, disco.Magic)
	for range 7 {
		if err := c.Send(absent, question); err != nil {
			t.Fatal(err)
		}
	}
	send(t, c, absent, 5, 200)
	awaitPong(t, c) // after the packets
	after := r.Packets()
	if got := after.Received - before.Received; got != 12 {
		t.Errorf("%d packets received, want 12", got)
	}
	for reason, count := range after.Dropped {
		want := int64(0)
		if reason == "unknown_dest" {
			want = 5
		}
		if got := count - before.Dropped[reason]; got != want {
			t.Errorf("%d packets dropped for %s, want %d", got, reason, want)
		}
	}
	if reasons := len(after.Dropped); reasons < 7 {
		t.Errorf("%d reasons, want derpserver's 7", reasons)
	}

	// Both kinds of packets count, disco packets too.
	idle := connect(t, ln, nil, key.NewNode()) // never reads
	packet := make([]byte, longestOrdinary)
	copy(packet, disco.Magic)
	testkit.Wait(t, "a drop for the full queue", func(context.Context) error {
		for range 1000 {
			if err := c.Send(idle.SelfPublicKey(), packet); err != nil {
				t.Fatal(err)
			}
		}
		if r.Packets().Dropped["queue_head"] == after.Dropped["queue_head"] {
			return errors.New("none")
		}
		return nil
	})
}
