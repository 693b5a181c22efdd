package relay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go4.org/mem"
	"tailscale.com/derp"
	"tailscale.com/tstime/mono"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"derpd/internal/testkit"
)

// frameOf returns a frame with a payload of the given length that begins with keys.
func frameOf(kind derp.FrameType, length int, keys ...key.NodePublic) []byte {
	f := append(binary.BigEndian.AppendUint32([]byte{byte(kind)}, uint32(length)), random(length)...)
	for i, k := range keys {
		copy(f[derp.FrameHeaderLen+i*derp.KeyLen:], k.AppendTo(nil))
	}
	return f
}

// A first frame that is too long, or no client info, is refused when its header is
// complete, before derpserver gets a byte of it.
func TestFirstFrame(t *testing.T) {
	node := key.NewNode().Public()
	for name, tt := range map[string]struct {
		first   []byte
		refused bool
	}{
		"shortest":                     {frameOf(derp.FrameClientInfo, 0), false},
		"longest":                      {frameOf(derp.FrameClientInfo, 4096, node), false},
		"too long":                     {frameOf(derp.FrameClientInfo, 4097, node), true},
		"too long, the header alone":   {frameOf(derp.FrameClientInfo, 256<<10)[:derp.FrameHeaderLen], true},
		"longest length":               {[]byte{byte(derp.FrameClientInfo), 0xff, 0xff, 0xff, 0xff}, true},
		"another type":                 {frameOf(derp.FrameSendPacket, 100, node), true},
		"another type, header alone":   {frameOf(derp.FramePing, 8)[:derp.FrameHeaderLen], true},
		"an incomplete header":         {frameOf(derp.FrameClientInfo, 256<<10)[:derp.FrameHeaderLen-1], false},
		"then a frame of another type": {append(frameOf(derp.FrameClientInfo, 50, node), frameOf(derp.FramePing, 5000)...), false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, before := range []int{0, 1, derp.FrameHeaderLen, greetingLength, len(tt.first)} {
				for _, size := range []int{1, 4, 7, 1024} {
					before := min(before, len(tt.first), 4096) // the buffer of sessionOf
					near, far := net.Pipe()
					go func() {
						for _, b := range tt.first[before:] {
							_, _ = far.Write([]byte{b})
						}
						if !tt.refused {
							_ = far.Close()
						}
					}()
					s := sessionOf(near, tt.first[:before])
					got, err := io.ReadAll(readerOf{s, size})
					want := tt.first
					if tt.refused {
						want = nil
					}
					if !bytes.Equal(got, want) || errors.Is(err, errFirstFrame) != tt.refused || s.all.refusedFirst.Load() > 0 != tt.refused {
						t.Errorf("%d bytes before, reads of %d: read %d bytes, %v, counted %d", before, size, len(got), err, s.all.refusedFirst.Load())
					}
					if _, end := s.state(); tt.refused && !errors.Is(end, errFirstFrame) {
						t.Errorf("the session ended with %v", end)
					}
					_ = s.Close()
					_ = far.Close()
				}
			}
		})
	}
}

// fastStart is the request of a client that sends its first frame at once.
const fastStart = "GET /derp HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n"

// The relay ends the connection of such a client at once, with TLS, without, and over
// a WebSocket.
func TestFirstFrameIsRefused(t *testing.T) {
	cert, getCertificate := certificate(t)
	claimed := frameOf(derp.FrameClientInfo, 256<<10)[:greetingLength]
	plain, secure := listen(t), listen(t)
	plainRelay := start(t, Config{Log: zerolog.Nop()}, plain)
	secureRelay := start(t, Config{Log: zerolog.Nop(), GetCertificate: getCertificate}, secure)
	for name, tt := range map[string]struct {
		relay *Relay
		conn  func() net.Conn
		sent  []byte
	}{
		"plain":     {plainRelay, func() net.Conn { return scan(t, plain.Addr().String()) }, append([]byte(fastStart), claimed...)},
		"TLS":       {secureRelay, func() net.Conn { return dialTLS(t, secure, testkit.Trust(testkit.Pool(cert))) }, append([]byte(fastStart), claimed...)},
		"WebSocket": {plainRelay, func() net.Conn { return upgradeToWebSocket(t, plain.Addr().String()) }, append(messageHeader(binaryMessage, 256<<10), claimed...)},
	} {
		t.Run(name, func(t *testing.T) {
			before := tt.relay.Excess().FirstFrames
			conn := tt.conn()
			if _, err := conn.Write(tt.sent); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() {
				_, err := io.Copy(io.Discard, conn)
				ended <- err
			}()
			_ = testkit.Receive(t, "the end of the connection", ended)
			if got := tt.relay.Excess().FirstFrames - before; got != 1 {
				t.Errorf("%d first frames counted, want 1", got)
			}
		})
	}
	a, b := connect(t, secure, cert, key.NewNode()), connect(t, secure, cert, key.NewNode())
	testkit.Exchange(t, a, b)
	if got := secureRelay.Excess().FirstFrames; got != 1 {
		t.Errorf("%d first frames refused of two clients of Tailscale and one attacker", got)
	}
}

// Clients of Tailscale send first frames that are much shorter than the limit, those of
// a mesh too.
func TestFirstFrameOfClients(t *testing.T) {
	server := key.NewNode().Public()
	for name, options := range map[string][]derp.ClientOpt{
		"node": {derp.CanAckPings(true), derp.IsProber(true)},
		"mesh": {derp.MeshKey(meshKey(t, "a passphrase for one test only"))},
	} {
		near, far := net.Pipe()
		go func() {
			both := bufio.NewReadWriter(bufio.NewReader(far), bufio.NewWriter(far))
			_, _ = derp.NewClient(key.NewNode(), far, both, logger.Discard, append(options, derp.ServerPublicKey(server))...)
		}()
		header := make([]byte, derp.FrameHeaderLen)
		if _, err := io.ReadFull(near, header); err != nil {
			t.Fatal(err)
		}
		length := binary.BigEndian.Uint32(header[1:])
		t.Logf("%s: %d bytes", name, length)
		if length > longestClientInfo/8 {
			t.Errorf("%s: the first frame has %d bytes", name, length)
		}
		_ = near.Close()
	}
}

// chunks is a connection whose reads return the bytes in pieces.
type chunks struct {
	net.Conn
	stream []byte
	pieces []byte // lengths, in turn
	next   int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.stream) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), len(c.stream), int(c.pieces[c.next%len(c.pieces)])*9+1)
	c.next++
	copy(p, c.stream[:n])
	c.stream = c.stream[n:]
	return n, nil
}

func (*chunks) Close() error { return nil }

// delivered returns what derpserver must get of a stream: all frames but large packets
// for full.
func delivered(stream []byte, full key.NodePublic) (want []byte, refused bool) {
	for first := true; len(stream) > 0; first = false {
		if len(stream) < derp.FrameHeaderLen {
			return append(want, stream...), false
		}
		kind, length := derp.FrameType(stream[0]), uint64(binary.BigEndian.Uint32(stream[1:]))
		if first && (kind != derp.FrameClientInfo || length > 4096) {
			return want, true
		}
		frame := stream[:min(uint64(len(stream)), derp.FrameHeaderLen+length)]
		keys := map[derp.FrameType]int{derp.FrameSendPacket: 1, derp.FrameForwardPacket: 2}[kind] * derp.KeyLen
		large := !first && keys > 0 && length > uint64(2048+keys) && length <= uint64(derp.MaxPacketSize+keys)
		if to := derp.FrameHeaderLen + keys; !large || len(frame) < to || !bytes.Equal(frame[to-derp.KeyLen:to], full.AppendTo(nil)) {
			want = append(want, frame...)
		}
		stream = stream[len(frame):]
	}
	return want, false
}

// FuzzIncoming reads a stream in pieces. derpserver gets the stream without the frames
// that are dropped.
func FuzzIncoming(f *testing.F) {
	full := key.NodePublicFromRaw32(mem.S(strings.Repeat("k", derp.KeyLen)))
	info := frameOf(derp.FrameClientInfo, 100)
	large, forwarded := frameOf(derp.FrameSendPacket, 3000, full), frameOf(derp.FrameForwardPacket, 3000, full, full)
	f.Add(slices.Concat(info, large, frameOf(derp.FrameSendPacket, 1300, full), large, large), []byte{3, 200, 7}, byte(100))
	f.Add(slices.Concat(info, forwarded, frameOf(derp.FrameForwardPacket, 3000, full, key.NewNode().Public()), frameOf(derp.FramePing, 8), large), []byte{255, 255}, byte(255))
	f.Add(slices.Concat(info, large, large[:20]), []byte{0}, byte(0))
	f.Add(slices.Concat(info, frameOf(derp.FrameSendPacket, 2080, full), frameOf(derp.FrameSendPacket, 2081, full), frameOf(derp.FrameForwardPacket, 2112, full, full), frameOf(derp.FrameForwardPacket, 2113, full, full)), []byte{40, 1}, byte(7))
	f.Add([]byte("\x02\xff\xff\xff\xffx"), []byte{1}, byte(9))
	f.Add(append(info, "\x04\xff\xff\xff\xffx"...), []byte{1}, byte(30))
	f.Fuzz(func(t *testing.T, stream, pieces []byte, size byte) {
		if len(pieces) == 0 {
			return
		}
		s := sessionOf(&chunks{stream: bytes.Clone(stream), pieces: pieces}, nil)
		s.all.nodes[full] = &limitedNode{sessions: []*session{s}, backlog: backlog{size: longestBacklog, changed: mono.Now().Add(time.Hour)}}
		got, err := io.ReadAll(readerOf{s, int(size)*9 + 1})
		want, refused := delivered(stream, full)
		if !bytes.Equal(got, want) || errors.Is(err, errFirstFrame) != refused || !refused && err != nil {
			t.Fatalf("derpserver gets %d bytes, want %d of %d; %v, want refused %v", len(got), len(want), len(stream), err, refused)
		}
	})
}

func TestIncomingAllocatesNothing(t *testing.T) {
	stream := bytes.Repeat(slices.Concat(frameOf(derp.FrameSendPacket, 1312), frameOf(derp.FrameSendPacket, 9000)), 10)
	below := &chunks{pieces: []byte{255}, stream: frameOf(derp.FrameClientInfo, 100)}
	s := sessionOf(below, nil)
	p := make([]byte, 1024)
	if _, err := s.Read(p); err != nil {
		t.Fatal(err)
	}
	if got := testing.AllocsPerRun(100, func() {
		below.stream = stream
		for len(below.stream) > 0 {
			_, _ = s.Read(p)
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}
