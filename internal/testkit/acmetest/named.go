package acmetest

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"derpd/internal/testkit"
)

// KeyName and Key are the TSIG key (hmac-sha256) that may change the zones of
// [Named].
const (
	KeyName = "derpd"
	Key     = "ZGVycGQgdGVzdCBrZXksIG5vdCBhIHNlY3JldCBvbmU="
)

// namedConfig enables recursion, because BIND otherwise does not follow a CNAME into
// another of its own zones. No test queries a name outside the zones.
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

// Named is a running BIND with three zones. Updates (RFC 2136) may change
// example.com and acme.example.net, but not example.org. In example.org the
// challenge of derp is a CNAME to derp.acme.example.net.
type Named struct {
	Addr string // address for UDP and TCP
}

// StartNamed starts a server with fresh zones, and waits until it answers.
func StartNamed(t testing.TB) Named {
	t.Helper()
	installed, err := exec.LookPath("named")
	if err != nil {
		installed = "/usr/sbin/named"
	}
	binary, err := os.ReadFile(installed)
	if err != nil {
		t.Fatalf("this test needs BIND's named: install the Debian package bind9 (%v)", err)
	}
	dir, port := t.TempDir(), strconv.Itoa(testkit.FreePort(t))
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
	// AppArmor's profile for /usr/sbin/named forbids temporary directories. The
	// profile does not apply to a copy of the program.
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
	testkit.Until(t, "named answers", func() bool { return server.Lookup(t, "example.com", dns.TypeSOA) != "" })
	return server
}

// Lookup returns the first record of the server's answer, or an empty string.
func (n Named) Lookup(t testing.TB, name string, kind uint16) string {
	t.Helper()
	question := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	answer, _, err := (&dns.Client{Net: "tcp"}).ExchangeContext(t.Context(), question, n.Addr)
	if err != nil || len(answer.Answer) == 0 {
		return ""
	}
	return answer.Answer[0].String()
}
