package relay

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

// derpHead is what Tailscale's client sends, as it sends it.
const derpHead = "GET /derp HTTP/1.1\r\nHost: derp.example.com\r\nUser-Agent: Go-http-client/1.1\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\nUpgrade: DERP\r\n\r\n"

func TestDERPRequest(t *testing.T) {
	r, length := derpRequest([]byte(derpHead + "frames"))
	if r == nil || length != len(derpHead) || r.Host != "derp.example.com" || r.Header.Get("Derp-Fast-Start") != "1" {
		t.Fatalf("%+v, %d bytes", r, length)
	}
	if r, _ := derpRequest([]byte(strings.Replace(derpHead, "User-Agent", "ideal-node", 1))); r == nil || r.Header.Get("Ideal-Node") == "" {
		t.Errorf("%+v", r)
	}
	replace := func(old, with string) string { return strings.Replace(derpHead, old, with, 1) }
	for name, head := range map[string]string{
		"nothing":              "",
		"a part":               derpHead[:len(derpHead)-1],
		"another path":         replace("/derp", "/derp/probe"),
		"a query":              replace("/derp", "/derp?x"),
		"an absolute URL":      replace("/derp", "https://derp.example.com/derp"),
		"another method":       replace("GET", "POST"),
		"HTTP/1.0":             replace("HTTP/1.1", "HTTP/1.0"),
		"a browser":            replace("Upgrade: DERP", "Upgrade: websocket"),
		"no upgrade":           replace("Upgrade: DERP\r\n", ""),
		"no connection":        replace("Connection: Upgrade\r\n", ""),
		"another connection":   replace("Connection: Upgrade", "Connection: keep-alive, Upgrade"),
		"no host":              replace("Host: derp.example.com\r\n", ""),
		"two hosts":            replace("User-Agent:", "host:"),
		"a body":               replace("User-Agent:", "Content-Length:"),
		"chunks":               replace("User-Agent: Go-http-client/1.1", "Transfer-Encoding: chunked"),
		"a proxy":              replace("User-Agent:", "X-Forwarded-For:"),
		"an empty value":       replace("Go-http-client/1.1", ""),
		"a space before":       replace("User-Agent: ", "User-Agent:  "),
		"a space behind":       replace("client/1.1", "client/1.1 "),
		"a space in a name":    replace("User-Agent:", "User-Agent :"),
		"a folded field":       replace("User-Agent:", " User-Agent:"),
		"a bare line feed":     replace("1.1\r\nConnection", "1.1\nConnection"),
		"a bare return":        replace("1.1\r\nConnection", "1.1\rConnection"),
		"a control character":  replace("Go-http", "Go\x00http"),
		"another alphabet":     replace("Go-http", "Gö-http"),
		"only a line":          "GET /derp HTTP/1.1\r\n\r\n",
		"a TLS record instead": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
	} {
		if r, _ := derpRequest([]byte(head)); r != nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// FuzzDERPRequest: what is taken for a DERP client, net/http reads in the same
// way.
func FuzzDERPRequest(f *testing.F) {
	f.Add([]byte(derpHead))
	f.Add([]byte(derpHead + "frames"))
	f.Add([]byte(strings.Replace(derpHead, "example.com", "example.com ", 1)))
	f.Add([]byte("GET /derp HTTP/1.1\r\nHost: [::1]:443\r\nConnection: upgrade\r\nUpgrade: derp\r\nIdeal-Node: 900a\r\n\r\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		got, length := derpRequest(p)
		if got == nil {
			return
		}
		reader := bufio.NewReader(bytes.NewReader(p))
		want, err := http.ReadRequest(reader)
		if err != nil {
			t.Fatalf("net/http: %v", err)
		}
		if got.Method != want.Method || got.URL.Path != want.URL.Path || got.Host != want.Host || want.ContentLength != 0 {
			t.Errorf("%+v, want %+v", got, want)
		}
		for name, values := range want.Header {
			if !reflect.DeepEqual(got.Header[name], values) {
				t.Errorf("%s: %q, want %q", name, got.Header[name], values)
			}
		}
		if rest, _ := io.ReadAll(reader); !bytes.Equal(rest, p[length:]) {
			t.Errorf("%q follows, want %q", p[length:], rest)
		}
	})
}

// A handler that does not take the connection over is answered for.
func TestUpgradeRefused(t *testing.T) {
	near, far := net.Pipe()
	w := &upgradeWriter{conn: near}
	http.Error(w, "not now", http.StatusServiceUnavailable)
	done := make(chan error)
	go func() { done <- w.finish(&http.Request{Method: http.MethodGet}) }()
	response, err := http.ReadResponse(bufio.NewReader(far), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusServiceUnavailable || string(body) != "not now\n" || !response.Close {
		t.Errorf("%s %q, %v", response.Status, body, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the answer: %v", err)
	}
}
