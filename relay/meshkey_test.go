package relay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"tailscale.com/derp"
	"tailscale.com/types/key"
)

func TestParseMeshKey(t *testing.T) {
	hexKey := strings.Repeat("0123456789abcdef", 4)
	for text, want := range map[string]string{
		hexKey:                  "",
		strings.ToUpper(hexKey): "",
		"correct horse battery": "",
		"中继一二三四五六七八九十甲乙丙丁戊己庚辛": "",
		"":                         "want 64 hex digits, got 0",
		"abc":                      "want 64 hex digits, got 3",
		hexKey[:63]:                "want 64 hex digits, got 63",
		hexKey + "0":               "want 64 hex digits, got 65",
		strings.Repeat("0", 64):    "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 64, 1 of them different",
		"correct horse":            "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 13, 8 of them different",
		"passwordpasswordpassword": "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 24, 7 of them different",
		"中继中继中继中继中继中继中继中继中继中继中继中继中继中继": "want 64 hex digits (openssl rand -hex 32) or a passphrase of at least 20 characters, 8 of them different; got 28, 2 of them different",
	} {
		k, err := ParseMeshKey(text)
		if want == "" && (err != nil || k.IsZero()) || want != "" && (err == nil || err.Error() != want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	// derper's key file has the same key.
	if k, _ := ParseMeshKey(strings.ToUpper(hexKey)); k.String() != hexKey {
		t.Error("the digits are not the key")
	}
	a, _ := ParseMeshKey("correct horse battery")
	b, _ := ParseMeshKey("correct horse battery staple")
	if a.Equal(b) {
		t.Error("two passphrases give one key")
	}
}

func meshKeys(t testing.TB) []key.DERPMesh {
	t.Helper()
	var keys []key.DERPMesh
	for _, text := range []string{"the first of the two keys", "and here is the other one"} {
		k, err := ParseMeshKey(text)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	return keys
}

// hello is the first frame of a client.
func hello(t testing.TB, client key.NodePrivate, server key.NodePublic, info derp.ClientInfo) []byte {
	t.Helper()
	text, err := json.Marshal(info)
	if err != nil {
		t.Fatal(err)
	}
	body := append(client.Public().AppendTo(nil), client.SealTo(server, text)...)
	frame := binary.BigEndian.AppendUint32([]byte{byte(derp.FrameClientInfo)}, uint32(len(body)))
	return append(frame, body...)
}

// through is what derpserver reads when a client sends sent, of which the HTTP
// server has read some already.
func through(t testing.TB, private key.NodePrivate, keys []key.DERPMesh, sent []byte, already int) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer func() { _ = ours.Close() }()
	go func() {
		_, _ = theirs.Write(sent[already:])
		_ = theirs.Close()
	}()
	before := bufio.NewReader(io.MultiReader(bytes.NewReader(sent[:already]), ours))
	_, _ = before.Peek(already)
	got, err := io.ReadAll(&meshKeyConn{Conn: ours, private: private, keys: keys, before: before})
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	return got
}

// The second key becomes the first; whatever else a client sends is left as
// it is, and so is what follows.
func TestSecondMeshKeyBecomesTheFirst(t *testing.T) {
	client, server, keys := key.NewNode(), key.NewNode(), meshKeys(t)
	rest := bytes.Repeat([]byte("what follows "), 1000)
	var unknown key.DERPMesh
	if err := unknown.UnmarshalJSON([]byte(`"` + strings.Repeat("12", 32) + `"`)); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ has, want key.DERPMesh }{
		"first":   {keys[0], keys[0]},
		"second":  {keys[1], keys[0]},
		"unknown": {unknown, unknown},
		"none":    {},
	} {
		info := derp.ClientInfo{MeshKey: tt.has, Version: derp.ProtocolVersion, CanAckPings: true, IsProber: true, AppName: "app"}
		frame := hello(t, client, server.Public(), info)
		for _, already := range []int{0, 3, len(frame) - 1, len(frame), len(frame) + 20} {
			got := through(t, server, keys, append(bytes.Clone(frame), rest...), already)
			size := frameHeader + int(binary.BigEndian.Uint32(got[1:]))
			text, ok := server.OpenFrom(client.Public(), got[frameHeader+derp.KeyLen:size])
			var read derp.ClientInfo
			if !ok || json.Unmarshal(text, &read) != nil || !bytes.Equal(got[size:], rest) {
				t.Fatalf("%s, %d bytes read before: unreadable", name, already)
			}
			want := info
			want.MeshKey = tt.want
			if !read.Equal(&want) {
				t.Errorf("%s: derpserver reads %+v", name, read)
			}
			if name != "second" && !bytes.Equal(got[:size], frame) {
				t.Errorf("%s: the frame was changed without need", name)
			}
		}
	}
}

// A stranger sends what he likes: he gets neither a panic nor the key.
func FuzzMeshKeyConn(f *testing.F) {
	client, server, keys := key.NewNode(), key.NewNode(), meshKeys(f)
	good := hello(f, client, server.Public(), derp.ClientInfo{})
	f.Add(good, 0)
	f.Add(good[:40], 7)
	f.Add([]byte{byte(derp.FrameClientInfo), 0, 0, 0, 1, 0}, 1)
	f.Add([]byte{byte(derp.FrameClientInfo), 255, 255, 255, 255}, 5)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), 3)
	f.Fuzz(func(t *testing.T, sent []byte, already int) {
		if already < 0 || already > len(sent) || already > 4000 {
			t.Skip()
		}
		got := through(t, server, keys, sent, already)
		if !bytes.HasPrefix(sent, got) || len(got) != len(sent) && len(got) != 0 {
			t.Errorf("%q became %q", sent, got)
		}
	})
}
