package admit

import (
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/miekg/dns"
)

// resolver asks a DNS server that answers each question with the records of its type.
// A type without an element is not answered with records, and "SERVFAIL" is a failure.
func resolver(t *testing.T, records map[uint16]string, failures int) func(context.Context, string, string) (net.Conn, error) {
	t.Helper()
	conn, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	asked := make(map[uint16]int) // guarded by mu
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		answer := new(dns.Msg).SetReply(r)
		answer.RecursionAvailable = true
		kind := r.Question[0].Qtype
		mu.Lock()
		defer mu.Unlock()
		asked[kind]++
		text, fails := strings.CutPrefix(records[kind], "SERVFAIL")
		switch {
		case fails && asked[kind] <= failures:
			answer.Rcode = dns.RcodeServerFailure
		case text != "":
			for _, addr := range strings.Fields(text) {
				record, err := dns.NewRR("verify.example.com. 1 IN " + dns.TypeToString[kind] + " " + addr)
				if err != nil {
					t.Error(err)
				}
				answer.Answer = append(answer.Answer, record)
			}
		}
		_ = w.WriteMsg(answer)
	})}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.ActivateAndServe() }()
	t.Cleanup(func() { _ = conn.Close(); <-ended })
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}
}

// FailOpen admits only if every address of the URL is plainly down, in both families,
// and if DNS has answered for both.
func TestURLFailOpenOfAllAddresses(t *testing.T) {
	const (
		four, six = "192.0.2.1", "2001:db8::1"
		nobody    = 1000 // failures
		down      = syscall.ECONNREFUSED
		noRoute   = syscall.ENETUNREACH
	)
	for name, tt := range map[string]struct {
		a, aaaa  string
		failures int // of DNS, at most
		errs     map[string]syscall.Errno
		admits   bool
	}{
		"both are down":                        {four, six, 0, map[string]syscall.Errno{four: down, six: noRoute}, true},
		"no IPv6, and IPv4 does not answer":    {four, six, 0, map[string]syscall.Errno{four: syscall.ETIMEDOUT, six: noRoute}, false},
		"no IPv6, and too many open files":     {four, six, 0, map[string]syscall.Errno{four: syscall.EMFILE, six: noRoute}, false},
		"no IPv4, and IPv6 does not answer":    {four, six, 0, map[string]syscall.Errno{four: noRoute, six: syscall.ETIMEDOUT}, false},
		"the second IPv4 address does not":     {four + " 192.0.2.2", "", 0, map[string]syscall.Errno{four: down, "192.0.2.2": syscall.ETIMEDOUT}, false},
		"both IPv4 addresses are down":         {four + " 192.0.2.2", "", 0, map[string]syscall.Errno{four: down, "192.0.2.2": down}, true},
		"a container without IPv6":             {four, six, 0, map[string]syscall.Errno{four: down, six: syscall.EADDRNOTAVAIL}, true},
		"a kernel without IPv6":                {four, six, 0, map[string]syscall.Errno{four: down, six: syscall.EAFNOSUPPORT}, true},
		"no port is left for IPv4":             {four, six, 0, map[string]syscall.Errno{four: syscall.EADDRNOTAVAIL, six: down}, false},
		"no port is left for another address":  {four + " 192.0.2.2", "", 0, map[string]syscall.Errno{four: down, "192.0.2.2": syscall.EADDRNOTAVAIL}, false},
		"no such name":                         {"", "", 0, nil, true},
		"no IPv6 record, and DNS fails":        {"SERVFAIL", "", nobody, nil, false},
		"no IPv4 record, and DNS fails":        {"", "SERVFAIL", nobody, nil, false},
		"DNS fails at first, no IPv6 record":   {"SERVFAIL " + four, "", 2, nil, false},
		"DNS fails for IPv4, no IPv6":          {"SERVFAIL", six, nobody, map[string]syscall.Errno{six: noRoute}, false},
		"DNS fails for IPv4 at first, no IPv6": {"SERVFAIL " + four, six, 2, map[string]syscall.Errno{four: syscall.ETIMEDOUT, six: noRoute}, false},
	} {
		t.Run(name, func(t *testing.T) {
			u := newAdmissionURL(URLConfig{Target: "http://verify.example.com/verify", FailOpen: true})
			u.strict.Dial = resolver(t, map[uint16]string{dns.TypeA: tt.a, dns.TypeAAAA: tt.aaaa}, tt.failures)
			u.client.Transport.(*http.Transport).DialContext = (&net.Dialer{
				Resolver: &net.Resolver{PreferGo: true, Dial: u.strict.Dial},
				ControlContext: func(_ context.Context, _, addr string, _ syscall.RawConn) error {
					host, _, _ := net.SplitHostPort(addr)
					return tt.errs[host]
				},
			}).DialContext
			if err := u.answer(t); (err == nil) != tt.admits {
				t.Errorf("%v, want admitted %t", err, tt.admits)
			}
		})
	}
}
