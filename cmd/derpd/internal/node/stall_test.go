package node

import (
	"testing"
	"time"

	"tailscale.com/derp"

	"derpd/internal/testkit"
)

// A client whose link stalls for ten seconds while packets arrive for it keeps its
// connection, although the kernel takes few bytes for it.
func TestStalledClientStays(t *testing.T) {
	t.Parallel()
	n := begin(t, testkit.Environ(t))
	receiver, sender := exchangeOver(t, region(t, parsePolicy(t, n.printed)), nil)
	const during, after = 1, 2 // first byte of a packet
	sent := 0
	send := func(kind byte, packets int) {
		packet := make([]byte, 1280)
		packet[0] = kind
		for range packets {
			if err := sender.Send(receiver.SelfPublicKey(), packet); err != nil {
				t.Fatal(err)
			}
			sent++
		}
	}
	send(during, 2000) // more than all buffers hold
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for stalled := time.After(10 * time.Second); ; {
		select {
		case <-tick.C:
			send(during, 5)
			continue
		case <-stalled:
		}
		break
	}

	stop, stopped := make(chan struct{}), make(chan struct{})
	defer func() { close(stop); <-stopped }()
	total := sent
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				if err := sender.Send(receiver.SelfPublicKey(), []byte{after}); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for received := 0; ; {
		message, err := receiver.Recv()
		if err != nil {
			t.Fatalf("the client is disconnected: %v", err)
		}
		packet, ok := message.(derp.ReceivedPacket)
		if !ok {
			continue
		}
		if packet.Data[0] == after {
			if received == total {
				t.Error("no packet was dropped, so no write waited")
			}
			return
		}
		received++
	}
}
