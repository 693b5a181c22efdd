package relay

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"unicode/utf8"

	"go4.org/mem"
	"tailscale.com/derp"
	"tailscale.com/types/key"
)

// leastPassphrase and leastVariety keep out what can be guessed. Each guess is
// a connection to a node, so this need not hold against faster ones.
const (
	leastPassphrase = 20 // characters
	leastVariety    = 8  // different ones
)

// ParseMeshKey reads a mesh key: 64 hex digits, which are the key, or a
// passphrase, whose SHA-256 it is. The error does not tell the key.
func ParseMeshKey(s string) (key.DERPMesh, error) {
	different := make(map[rune]bool)
	onlyHex := true
	for _, c := range s {
		different[c] = true
		onlyHex = onlyHex && strings.ContainsRune("0123456789abcdefABCDEF", c)
	}
	length := utf8.RuneCountInString(s)
	switch {
	case onlyHex && length != 64:
		// Half a key, more likely than a passphrase.
		return key.DERPMesh{}, fmt.Errorf("want 64 hex digits, got %d", length)
	case length < leastPassphrase || len(different) < leastVariety:
		return key.DERPMesh{}, fmt.Errorf("want 64 hex digits (openssl rand -hex 32) or a passphrase of at least %d characters, %d of them different; got %d, %d of them different",
			leastPassphrase, leastVariety, length, len(different))
	case onlyHex:
		return key.ParseDERPMesh(s)
	}
	sum := sha256.Sum256([]byte("derpd mesh key\n" + s))
	return key.DERPMeshFromRaw32(mem.B(sum[:])), nil
}

// meshToken proves a mesh key without giving it away. It opens one document,
// which whoever has the map knows anyway, so it need not be a new one each
// time.
func meshToken(k key.DERPMesh) string {
	mac := hmac.New(sha256.New, []byte(k.String()))
	_, _ = mac.Write([]byte("derpd: the node tells about itself"))
	return hex.EncodeToString(mac.Sum(nil))
}

func tokenOfAny(keys []key.DERPMesh, tokens []string) bool {
	for _, k := range keys {
		want := []byte(meshToken(k))
		for _, token := range tokens {
			if hmac.Equal([]byte(token), want) {
				return true
			}
		}
	}
	return false
}

// acceptMeshKeys lets nodes in that have another of the keys than the first,
// which is the only one that derpserver knows.
//
// A client tells its mesh key in its first frame, in a box that it and the
// server can open and close alike, since both halves of the exchange give the
// same secret. So here, where the server's private key is, the box can be
// closed anew with the first key in it.
func acceptMeshKeys(private key.NodePrivate, keys []key.DERPMesh, next http.Handler) http.Handler {
	if len(keys) < 2 {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(meshKeyWriter{w, private, keys}, r)
	})
}

// meshKeyWriter is an [http.ResponseWriter] whose connection is a meshKeyConn.
type meshKeyWriter struct {
	http.ResponseWriter
	private key.NodePrivate
	keys    []key.DERPMesh
}

// Hijack implements [http.Hijacker].
func (w meshKeyWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, brw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	c := &meshKeyConn{Conn: conn, private: w.private, keys: w.keys, before: brw.Reader}
	return c, bufio.NewReadWriter(bufio.NewReader(c), brw.Writer), nil
}

// meshKeyConn changes the first frame of a client, if it has to.
type meshKeyConn struct {
	net.Conn
	private key.NodePrivate
	keys    []key.DERPMesh

	// Of the reader.
	before *bufio.Reader // nil once the first frame was read
	unread []byte
}

// Read implements [net.Conn].
func (c *meshKeyConn) Read(p []byte) (int, error) {
	if c.before != nil {
		frame, err := c.firstFrame()
		if err != nil {
			return 0, err
		}
		behind, _ := c.before.Peek(c.before.Buffered())
		c.unread, c.before = append(frame, behind...), nil
	}
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		if c.unread = c.unread[n:]; len(c.unread) == 0 {
			c.unread = nil // a connection lasts
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// NetConn is the connection below; see [batchConn.NetConn].
func (c *meshKeyConn) NetConn() net.Conn { return c.Conn }

// frameHeader is a type and a length.
const frameHeader = 1 + 4

// firstFrame reads what the client sent, as far as it has to be read: a frame
// that is none of a client is derpserver's to refuse.
func (c *meshKeyConn) firstFrame() ([]byte, error) {
	frame := make([]byte, frameHeader)
	if _, err := io.ReadFull(c.before, frame); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(frame[1:])
	// derpserver's bounds (recvClientKey).
	if derp.FrameType(frame[0]) != derp.FrameClientInfo || length < derp.KeyLen+derp.NonceLen || length > 256<<10 {
		return frame, nil
	}
	frame = append(frame, make([]byte, length)...)
	if _, err := io.ReadFull(c.before, frame[frameHeader:]); err != nil {
		return nil, err
	}
	return withFirstKey(frame, c.private, c.keys), nil
}

// withFirstKey is the frame with the first of the keys in place of another
// one; any other frame stays as it is.
func withFirstKey(frame []byte, private key.NodePrivate, keys []key.DERPMesh) []byte {
	head := frame[:frameHeader+derp.KeyLen]
	client := key.NodePublicFromRaw32(mem.B(head[frameHeader:]))
	text, ok := private.OpenFrom(client, frame[len(head):])
	if !ok {
		return frame
	}
	var info derp.ClientInfo
	if json.Unmarshal(text, &info) != nil {
		return frame
	}
	for _, k := range keys[1:] {
		if !k.Equal(info.MeshKey) {
			continue
		}
		info.MeshKey = keys[0]
		text, err := json.Marshal(info)
		if err != nil {
			return frame
		}
		box := private.SealTo(client, text)
		changed := append(bytes.Clone(head), box...)
		binary.BigEndian.PutUint32(changed[1:], uint32(len(changed)-frameHeader))
		return changed
	}
	return frame
}
