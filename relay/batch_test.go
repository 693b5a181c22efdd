package relay

import (
	"encoding/binary"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/types/key"

	"derpd/internal/testkit"
)

// tapped is a listener. It counts the writes of TLS to its connections, and can stop
// them.
type tapped struct {
	net.Listener
	conns chan *tap
}

func (l tapped) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &tap{Conn: conn, open: make(chan struct{}), stopped: make(chan struct{}, 1)}
	close(c.open)
	l.conns <- c
	return c, nil
}

// tap is one connection. Its writes are the system calls of a socketConn.
type tap struct {
	net.Conn

	mu      sync.Mutex
	open    chan struct{} // closed while writes pass; guarded by mu
	writes  [][]byte      // guarded by mu
	stopped chan struct{} // receives when a write waits
}

// SetWriteDeadline does nothing: a write that waits does not time out.
func (c *tap) SetWriteDeadline(time.Time) error { return nil }

// SetDeadline sets the deadline for reading.
func (c *tap) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *tap) Write(p []byte) (int, error) {
	c.mu.Lock()
	open := c.open
	c.mu.Unlock()
	select {
	case <-open:
	default:
		c.stopped <- struct{}{}
		<-open
	}
	c.mu.Lock()
	c.writes = append(c.writes, slices.Clone(p))
	c.mu.Unlock()
	return c.Conn.Write(p)
}

// stop makes writes wait until the result is called.
func (c *tap) stop() (resume func()) {
	open := make(chan struct{})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = open
	return sync.OnceFunc(func() { close(open) })
}

// count returns the writes so far, and the TLS records in them.
func (c *tap) count() (writes, records int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for stream := slices.Concat(c.writes...); len(stream) >= 5; records++ {
		stream = stream[5+int(binary.BigEndian.Uint16(stream[3:])):]
	}
	return len(c.writes), records
}

// A batch of packets that derpserver writes is one TLS record and one system
// call. If a new derpserver writes in another way, this test finds out.
func TestBatchIsOneRecord(t *testing.T) {
	for name, tt := range map[string]struct {
		packets, size int
		want          int // records, and system calls
	}{
		"one packet":        {1, 1280, 1},
		"eight packets":     {8, 1280, 1},
		"twelve packets":    {12, 1280, 1},     // 15804 bytes
		"thirteen packets":  {13, 1280, 2},     // 17121 bytes
		"thirty packets":    {30, 1280, 3},     // 39510 bytes
		"thirty of 64":      {30, 64, 1},       // 3030 bytes
		"eight of 100":      {8, 100, 1},       // shorter than derpserver's buffer
		"two large packets": {2, 8192, 2},      // each bypasses derpserver's buffer
		"frame per buffer":  {4, 1024 - 37, 2}, // the buffer ends with a frame
		"largest packet":    {1, derp.MaxPacketSize, 65573/recordSize + 1},
	} {
		t.Run(name, func(t *testing.T) {
			cert, getCertificate := certificate(t)
			ln := tapped{listen(t), make(chan *tap, 2)}
			start(t, Config{GetCertificate: getCertificate, Log: zerolog.Nop()}, ln)
			to := key.NewNode()
			receiver := connect(t, ln, cert, to)
			below := testkit.Receive(t, "the receiver's connection", ln.conns)
			sender := connect(t, ln, cert, key.NewNode())

			resume := below.stop()
			t.Cleanup(resume)
			// The first packet stops the writer of derpserver. The batch queues
			// behind it.
			send(t, sender, to.Public(), 1, tt.size)
			testkit.Receive(t, "the first write", below.stopped)
			send(t, sender, to.Public(), tt.packets, tt.size)
			awaitPong(t, sender)
			writes, records := below.count()
			resume()
			receive(t, receiver, 1+tt.packets)
			writesAfter, recordsAfter := below.count()
			firstWrites := (tt.size + 37 + recordSize - 1) / recordSize
			if got := writesAfter - writes - firstWrites; got != tt.want {
				t.Errorf("%d system calls, want %d", got, tt.want)
			}
			if got := recordsAfter - records - firstWrites; got != tt.want {
				t.Errorf("%d TLS records, want %d", got, tt.want)
			}
		})
	}
}

// send sends packets.
func send(t *testing.T, c *derphttp.Client, to key.NodePublic, packets, size int) {
	t.Helper()
	for i := range packets {
		packet := random(size)
		packet[0] = byte(i)
		if err := c.Send(to, packet); err != nil {
			t.Fatal(err)
		}
	}
}

// awaitPong waits until derpserver has read what c has sent.
func awaitPong(t *testing.T, c *derphttp.Client) {
	t.Helper()
	want := [8]byte(random(8))
	if err := c.SendPing(want); err != nil {
		t.Fatal(err)
	}
	for {
		message, err := c.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if pong, ok := message.(derp.PongMessage); ok && pong == derp.PongMessage(want) {
			return
		}
	}
}

// receive waits for packets.
func receive(t *testing.T, c *derphttp.Client, packets int) {
	t.Helper()
	for packets > 0 {
		message, err := c.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := message.(derp.ReceivedPacket); ok {
			packets--
		}
	}
}
