package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mholt/acmez/v3/acme"
)

func TestExplain(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:443")), Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	for _, tt := range []struct {
		name       string
		err        error
		kind, want string
	}{
		{"a challenge", acme.Problem{Type: acme.ProblemTypeUnauthorized, Detail: "404", Resource: acme.Challenge{}}, acme.ProblemTypeUnauthorized, `derp.example.com: the authority says "404" (unauthorized): another server answered; check that DNS points to this machine, and that no proxy is in front of it`},
		{"an account", acme.Problem{Type: acme.ProblemTypeUnauthorized, Detail: "no"}, acme.ProblemTypeUnauthorized, `derp.example.com: the authority says "no" (unauthorized): the authority refuses this account; check DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY`},
		{"with subproblems", acme.Problem{Type: acme.ProblemTypeCAA, Detail: "CAA", Subproblems: []acme.Subproblem{{Problem: acme.Problem{Detail: "one"}}, {Problem: acme.Problem{Detail: "two"}}}}, acme.ProblemTypeCAA, `derp.example.com: the authority says "CAA; one; two" (caa): a CAA record in DNS allows only other authorities; add this authority to the record, or choose another with DERP_ACME_CA`},
		{"another problem", acme.Problem{Type: acme.ProblemTypeNamespace + "compound", Detail: "x"}, acme.ProblemTypeNamespace + "compound", `derp.example.com: the authority says "x" (compound): derpd tries again by itself`},
		{"not trusted", &url.Error{Op: "Get", URL: "https://ca.example.com", Err: &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}}, "untrusted", "derp.example.com: the certificate of the authority's server is not trusted: x509: certificate signed by unknown authority; if the authority is a private one, set DERP_CA_ROOTS to its roots"},
		{"refused", &url.Error{Op: "Get", URL: "https://ca.example.com", Err: refused}, "unreachable", "derp.example.com: the authority cannot be reached from here: dial tcp 192.0.2.1:443: connect: connection refused; check the network and DNS of this machine; derpd tries again by itself"},
		{"no DNS", &url.Error{Op: "Get", URL: "https://ca.example.com", Err: &net.DNSError{Err: "no such host", Name: "ca.example.com"}}, "unreachable", "derp.example.com: the authority cannot be reached from here: lookup ca.example.com: no such host; check the network and DNS of this machine; derpd tries again by itself"},
		{"canceled", &url.Error{Op: "Get", URL: "https://ca.example.com", Err: context.Canceled}, `derp.example.com: Get "https://ca.example.com": context canceled`, `derp.example.com: Get "https://ca.example.com": context canceled`},
		{"anything else", errors.New("bad zone"), "derp.example.com: bad zone", "derp.example.com: bad zone"},
	} {
		wrapped := fmt.Errorf("obtaining: %w", tt.err)
		if tt.kind == tt.want {
			wrapped = tt.err // its own words are the message
		}
		got := explain("derp.example.com", wrapped)
		if got.Error() != tt.want || got.kind != tt.kind || !errors.Is(got, wrapped) {
			t.Errorf("%s: kind %s\n%s\nwant kind %s\n%s", tt.name, got.kind, got, tt.kind, tt.want)
		}
	}
}

// A failed challenge is followed by the addresses in DNS. A DNS server that gives
// no answer has not said that there is none.
func TestResolved(t *testing.T) {
	addresses := []netip.Addr{netip.MustParseAddr("2001:db8::9"), netip.MustParseAddr("::ffff:198.51.100.9")}
	challenge := func(kind string) error {
		return fmt.Errorf("obtaining: %w", acme.Problem{Type: kind, Resource: acme.Challenge{}})
	}
	const found = "; DNS has 198.51.100.9 and 2001:db8::9 for derp.example.com"
	for _, tt := range []struct {
		name, subject string
		problem       error
		found         []netip.Addr
		err           error
		want          string
	}{
		{"found", "derp.example.com", challenge(acme.ProblemTypeConnection), addresses, nil, found},
		{"found by another server", "derp.example.com", challenge(acme.ProblemTypeUnauthorized), addresses, nil, found},
		{"found by DNS", "derp.example.com", challenge(acme.ProblemTypeDNS), addresses, nil, found},
		{"found by TLS", "derp.example.com", challenge(acme.ProblemTypeTLS), addresses, nil, found},
		{"no such name", "derp.example.com", challenge(acme.ProblemTypeDNS), nil, &net.DNSError{Err: "no such host", IsNotFound: true}, "; DNS has no address for derp.example.com"},
		{"timeout", "derp.example.com", challenge(acme.ProblemTypeDNS), nil, &net.DNSError{Err: "i/o timeout", IsTimeout: true, IsTemporary: true}, ""},
		{"SERVFAIL", "derp.example.com", challenge(acme.ProblemTypeDNS), nil, &net.DNSError{Err: "server misbehaving", IsTemporary: true}, ""},
		{"an error with an answer", "derp.example.com", challenge(acme.ProblemTypeDNS), addresses, errors.New("half an answer"), ""},
		{"no answer", "derp.example.com", challenge(acme.ProblemTypeDNS), nil, nil, ""},
		{"an address", "192.0.2.1", challenge(acme.ProblemTypeConnection), addresses, nil, ""},
		{"no challenge", "derp.example.com", acme.Problem{Type: acme.ProblemTypeUnauthorized}, addresses, nil, ""},
		{"another problem", "derp.example.com", challenge(acme.ProblemTypeCAA), addresses, nil, ""},
		{"no problem", "derp.example.com", errors.New("down"), addresses, nil, ""},
	} {
		got := resolved(t.Context(), tt.subject, tt.problem, func(_ context.Context, network, host string) ([]netip.Addr, error) {
			if network != "ip" || host != tt.subject {
				t.Errorf("%s: lookup of %s %s", tt.name, network, host)
			}
			return tt.found, tt.err
		})
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// A lookup takes two seconds at most.
func TestResolvedTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		resolved(t.Context(), "derp.example.com", acme.Problem{Type: acme.ProblemTypeDNS, Resource: acme.Challenge{}}, func(ctx context.Context, _, _ string) ([]netip.Addr, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("took %s, want 2s", took)
		}
	})
}

// Each problem has a remedy.
func TestRemedies(t *testing.T) {
	for _, kind := range []string{
		acme.ProblemTypeDNS, acme.ProblemTypeConnection, acme.ProblemTypeUnauthorized, acme.ProblemTypeTLS,
		acme.ProblemTypeRateLimited, acme.ProblemTypeCAA, acme.ProblemTypeExternalAccountRequired,
		acme.ProblemTypeRejectedIdentifier, acme.ProblemTypeUserActionRequired, acme.ProblemTypeServerInternal,
	} {
		got := explain("derp.example.com", acme.Problem{Type: kind, Resource: acme.Challenge{}}).Error()
		if remedies[kind] == "" || !strings.HasSuffix(got, "): "+remedies[kind]) {
			t.Errorf("%s: %s", kind, got)
		}
	}
}
