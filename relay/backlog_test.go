package relay

import (
	"bufio"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/disco"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
)

// backlogOf returns the memory of the large packets for a node.
func (all *sessions) backlogOf(node key.NodePublic) int {
	all.mu.Lock()
	defer all.mu.Unlock()
	n := all.nodes[node]
	if n == nil || len(n.sessions) == 0 {
		return -1
	}
	return n.backlog.size
}

// derpserver holds few large packets for a client that does not read, in both of its
// queues, and all ordinary ones. Later the client gets large packets again.
func TestBacklog(t *testing.T) {
	for name, tt := range map[string]struct {
		size, passed int // of sixty, with the one that is being written
	}{
		"64 KiB":                 {64 << 10, 2},
		"above 32 KiB":           {32<<10 + 1, 2},
		"32 KiB":                 {32 << 10, 4},
		"9 KB":                   {9000, 8},
		"above 4 KiB":            {4<<10 + 1, 16},
		"2 KiB, which is usual":  {2 << 10, 60},
		"usual, one queue of 32": {1280, 60},
	} {
		t.Run(name, func(t *testing.T) {
			cert, getCertificate := certificate(t)
			ln := tapped{listen(t), make(chan *tap, 2)}
			r := start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
			receiver := connect(t, ln, cert, key.NewNode())
			below := testkit.Receive(t, "the receiver's connection", ln.conns)
			sender := connect(t, ln, cert, key.NewNode())
			node := receiver.SelfPublicKey()

			resume := below.stop()
			t.Cleanup(resume)
			packet := make([]byte, tt.size)
			for i := range 60 {
				clear(packet)
				if i%2 == 1 {
					copy(packet, disco.Magic)
				}
				if err := sender.Send(node, packet); err != nil {
					t.Fatal(err)
				}
			}
			awaitPong(t, sender)
			if got := r.Excess().LargePackets; got != int64(60-tt.passed) {
				t.Errorf("%d packets dropped, want %d", got, 60-tt.passed)
			}
			if got := r.sessions.backlogOf(node); got > longestBacklog {
				t.Errorf("the backlog is %d", got)
			}
			resume()
			receive(t, receiver, tt.passed)
			testkit.Until(t, "the backlog is empty", func() bool { return r.sessions.backlogOf(node) == 0 })
			send(t, sender, node, 1, tt.size)
			receive(t, receiver, 1)
		})
	}
}

// A client that keeps up gets each large packet.
func TestBacklogOfFastClient(t *testing.T) {
	cert, getCertificate := certificate(t)
	ln := listen(t)
	r := start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
	receiver, sender := connect(t, ln, cert, key.NewNode()), connect(t, ln, cert, key.NewNode())
	for range 200 {
		send(t, sender, receiver.SelfPublicKey(), 1, derp.MaxPacketSize)
		receive(t, receiver, 1)
		send(t, sender, receiver.SelfPublicKey(), 4, 9000)
		receive(t, receiver, 4)
	}
	if got := r.Excess().LargePackets; got != 0 {
		t.Errorf("%d packets dropped", got)
	}
}

// The backlog of a node is that of all its connections, and ends with the last.
func TestBacklogConnections(t *testing.T) {
	all := newSessions(zerolog.Nop())
	node := key.NewNode().Public()
	open := func() *session {
		s := newSession(all, new(recorder), nil, nil)
		s.node = node
		all.add(s)
		all.admitted(s)
		return s
	}
	first, second := open(), open()
	b, drop := all.queue(node, 16<<10)
	if drop || b != first.backlog || b != second.backlog {
		t.Fatalf("backlog %p of %p and %p, dropped %v", b, first.backlog, second.backlog, drop)
	}
	_, _ = first.Close(), first.Close()
	if got := all.backlogOf(node); got != 16<<10 {
		t.Errorf("the backlog is %d with one of two connections", got)
	}
	_ = second.Close()
	all.admitted(second) // after Close
	if got := all.backlogOf(node); got != -1 {
		t.Errorf("the backlog is %d without a connection", got)
	}
	if _, drop := all.queue(node, derp.MaxPacketSize); drop {
		t.Error("a packet for an absent node is dropped")
	}
}

// derpserver may drop packets of the backlog. A backlog that does not change is
// forgotten.
func TestBacklogIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := newSessions(zerolog.Nop())
		node := key.NewNode().Public()
		s := newSession(all, new(recorder), nil, nil)
		s.node = node
		all.add(s)
		all.admitted(s)
		thirdDropped := []bool{false, false, true}
		dropped := func() bool {
			_, drop := all.queue(node, derp.MaxPacketSize)
			return drop
		}
		if list := []bool{dropped(), dropped(), dropped()}; !slices.Equal(list, thirdDropped) {
			t.Fatalf("dropped %v, want the third packet dropped", list)
		}
		<-time.After(backlogForgotten - 1)
		if !dropped() {
			t.Error("the backlog is forgotten early")
		}
		all.unqueue(s.backlog, 1)
		<-time.After(backlogForgotten - 1)
		if !dropped() {
			t.Error("the backlog is forgotten early after a change")
		}
		<-time.After(1)
		if list := []bool{dropped(), dropped(), dropped()}; !slices.Equal(list, thirdDropped) {
			t.Errorf("dropped %v, want the backlog forgotten", list)
		}
		all.unqueue(s.backlog, 1<<30)
		if got := all.backlogOf(node); got != 0 {
			t.Errorf("the backlog is %d", got)
		}
		// derpserver refuses such a packet, and closes the sender's connection.
		if b, drop := all.queue(node, 2*derp.MaxPacketSize); b != nil || drop {
			t.Error("a packet that is too long counts")
		}
	})
}

// A sender that ends within a large packet leaves no backlog.
func TestBacklogOfIncompletePacket(t *testing.T) {
	ln := listen(t)
	r := start(t, Config{Log: zerolog.Nop()}, ln)
	receiver := connect(t, ln, nil, key.NewNode())
	node := receiver.SelfPublicKey()
	conn := scan(t, ln.Addr().String())
	if _, err := io.WriteString(conn, fastStart); err != nil {
		t.Fatal(err)
	}
	both := bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	if _, err := derp.NewClient(key.NewNode(), conn, both, logger.Discard, derp.ServerPublicKey(r.PublicKey())); err != nil {
		t.Fatal(err)
	}
	packet := frameOf(derp.FrameSendPacket, 9000, node)
	for _, part := range [][]byte{packet, packet, packet[:5000]} {
		if _, err := conn.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	receive(t, receiver, 2)
	testkit.Until(t, "the last packet counts alone", func() bool { return r.sessions.backlogOf(node) == 16<<10 })
	_ = conn.Close()
	testkit.Until(t, "the packet does not count", func() bool { return r.sessions.backlogOf(node) == 0 })
}
