package acmetest

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// FreePort finds a port of 127.0.0.1 that is free for UDP and TCP, for servers
// that bind for themselves.
func FreePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		tcp, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", tcp.Addr().String())
		_ = tcp.Close()
		if err != nil {
			continue
		}
		_ = udp.Close()
		_, port, _ := net.SplitHostPort(tcp.Addr().String())
		return port
	}
	t.Fatal("no free port")
	return ""
}

// KeyName and Key are the TSIG key (hmac-sha256) by which the zones of [Named]
// may be changed.
const (
	KeyName = "derpd"
	Key     = "ZGVycGQgdGVzdCBrZXksIG5vdCBhIHNlY3JldCBvbmU="
)

// Recursion is on because BIND follows a CNAME into another of its zones only
// then; no test asks for a name that it does not hold.
const namedConfig = `
options {
	directory "DIR"; pid-file none; session-keyfile "DIR/session.key";
	listen-on port PORT { 127.0.0.1; }; listen-on-v6 { none; };
	recursion yes; dnssec-validation no;
};
controls { };
key "KEYNAME." { algorithm hmac-sha256; secret "SECRET"; };
zone "example.com" { type primary; file "example.com.zone"; allow-update { key KEYNAME.; }; };
zone "example.org" { type primary; file "example.org.zone"; };
zone "acme.example.net" { type primary; file "acme.example.net.zone"; allow-update { key KEYNAME.; }; };
`

// Named is a running BIND. It holds example.com, which may be changed by RFC
// 2136; example.org, which may not, and where the challenge of derp is a CNAME
// to derp.acme.example.net; and acme.example.net, which may.
type Named struct {
	Addr string // UDP and TCP
}

// StartNamed starts a server of its own for a test.
func StartNamed(t *testing.T) Named {
	t.Helper()
	installed, err := exec.LookPath("named")
	if err != nil {
		installed = "/usr/sbin/named"
	}
	binary, err := os.ReadFile(installed)
	if err != nil {
		t.Fatalf("this test needs BIND's named: install the Debian package bind9 (%v)", err)
	}
	dir, port := t.TempDir(), FreePort(t)
	zone := func(name, records string) {
		content := "$TTL 60\n@ SOA ns." + name + ". root." + name + ". 1 60 60 600 1\n@ NS ns." + name + ".\nns A 127.0.0.1\n" + records
		if err := os.WriteFile(filepath.Join(dir, name+".zone"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	zone("example.com", "derp A 127.0.0.1\n")
	zone("example.org", "derp A 127.0.0.1\n_acme-challenge.derp CNAME derp.acme.example.net.\n")
	zone("acme.example.net", "")
	config := strings.NewReplacer("DIR", dir, "PORT", port, "SECRET", Key, "KEYNAME", KeyName).Replace(namedConfig)
	if err := os.WriteFile(filepath.Join(dir, "named.conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// AppArmor's profile for /usr/sbin/named keeps it from reading
	// temporary directories; it does not know a copy.
	program := filepath.Join(dir, "named")
	if err := os.WriteFile(program, binary, 0o700); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	ctx, cancel := context.WithCancel(context.Background())
	command := exec.CommandContext(ctx, program, "-g", "-n", "1", "-c", filepath.Join(dir, "named.conf"))
	command.Stdout, command.Stderr = &log, &log
	if err := command.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = command.Wait()
		if t.Failed() {
			t.Logf("named:\n%s", &log)
		}
	})
	server := Named{net.JoinHostPort("127.0.0.1", port)}
	deadline, tick := time.After(30*time.Second), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for server.Lookup(t, "example.com", dns.TypeSOA) == "" {
		select {
		case <-deadline:
			t.Fatal("named does not answer")
		case <-tick.C:
		}
	}
	return server
}

// Lookup gives the answer of the server, or nothing when it has none.
func (n Named) Lookup(t *testing.T, name string, kind uint16) string {
	t.Helper()
	question := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	answer, _, err := (&dns.Client{Net: "tcp"}).ExchangeContext(t.Context(), question, n.Addr)
	if err != nil || len(answer.Answer) == 0 {
		return ""
	}
	return answer.Answer[0].String()
}
