package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/mholt/acmez/v3/acme"
)

// remedies are the likely cause of each ACME problem (RFC 8555 §6.7), and the fix.
// Each follows the authority's own message, which often contains the address that
// the authority connected to, and the answer.
var remedies = map[string]string{
	acme.ProblemTypeDNS:                     "no address was found for this name; add an A or AAAA record that points to this machine",
	acme.ProblemTypeConnection:              "the authority could not connect; open TCP 80 (http) or TCP 443 (tls-alpn) to everybody, and check that DNS points to this machine",
	acme.ProblemTypeUnauthorized:            "another server answered; check that DNS points to this machine, and that no proxy is in front of it",
	acme.ProblemTypeTLS:                     "another server answered on TCP 443; check that DNS points to this machine, and that no proxy is in front of it",
	acme.ProblemTypeRateLimited:             "wait until the time in the message, if there is one; derpd tries again by itself; use DERP_ACME_CA=letsencrypt-staging for experiments",
	acme.ProblemTypeCAA:                     "a CAA record in DNS allows only other authorities; add this authority to the record, or choose another with DERP_ACME_CA",
	acme.ProblemTypeExternalAccountRequired: "the authority requires an account binding; set DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY",
	acme.ProblemTypeRejectedIdentifier:      "the authority does not sign this name, and a public authority signs public names only; correct DERP_DOMAIN, or choose another authority with DERP_ACME_CA",
	acme.ProblemTypeUserActionRequired:      "the owner of the account must act; open the address in the message",
	acme.ProblemTypeServerInternal:          "the authority has an internal error; derpd tries again by itself",
}

// accountRemedy follows an unauthorized problem that is about the account.
const accountRemedy = "the authority refuses this account; check DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY"

// challengeProblems are the problems of an authority that did not find the relay
// at the address in DNS.
var challengeProblems = []string{acme.ProblemTypeDNS, acme.ProblemTypeConnection, acme.ProblemTypeUnauthorized, acme.ProblemTypeTLS}

// lookupTimeout limits the lookup of a name after a failed challenge.
const lookupTimeout = 2 * time.Second

// LookupFunc finds the addresses of a DNS name, as [net.Resolver.LookupNetIP]
// does.
type LookupFunc func(ctx context.Context, network, host string) ([]netip.Addr, error)

// resolved returns the end of an error message after a failed challenge: the
// addresses of name in DNS. The authority's own message often lacks the address that
// the authority connected to. The result is empty when DNS gives no answer.
func resolved(ctx context.Context, name string, err error, lookup LookupFunc) string {
	problem, ok := errors.AsType[acme.Problem](err)
	if !ok || problem.Resource == nil || !slices.Contains(challengeProblems, problem.Type) || net.ParseIP(name) != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := lookup(ctx, "ip", name)
	if missing, ok := errors.AsType[*net.DNSError](err); ok && missing.IsNotFound {
		return fmt.Sprintf("; DNS has no address for %s", name)
	}
	if err != nil || len(found) == 0 {
		return ""
	}
	var addresses []string
	for _, a := range found {
		addresses = append(addresses, a.Unmap().String())
	}
	slices.Sort(addresses)
	return fmt.Sprintf("; DNS has %s for %s", strings.Join(addresses, " and "), name)
}

// explain returns an error of certmagic with the authority's message, the likely
// cause and the remedy. The error stays in the chain.
func explain(name string, err error) *explained {
	if problem, ok := errors.AsType[acme.Problem](err); ok {
		words := problem.Detail
		for _, sub := range problem.Subproblems {
			words += "; " + sub.Detail
		}
		remedy := remedies[problem.Type]
		switch {
		case problem.Type == acme.ProblemTypeUnauthorized && problem.Resource == nil:
			// A problem of a challenge has the challenge as its resource.
			remedy = accountRemedy
		case remedy == "":
			remedy = "derpd tries again by itself"
		}
		return &explained{problem.Type, fmt.Sprintf("%s: the authority says %q (%s): %s", name, words, strings.TrimPrefix(problem.Type, acme.ProblemTypeNamespace), remedy), err}
	}
	if untrusted, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &explained{"untrusted", fmt.Sprintf("%s: the certificate of the authority's server is not trusted: %v; if the authority is a private one, set DERP_CA_ROOTS to its roots", name, untrusted.Err), err}
	}
	if _, ok := errors.AsType[net.Error](err); ok && !errors.Is(err, context.Canceled) {
		return &explained{"unreachable", fmt.Sprintf("%s: the authority cannot be reached from here: %v; check the network and DNS of this machine; derpd tries again by itself", name, rootCause(err)), err}
	}
	words := fmt.Sprintf("%s: %v", name, err)
	return &explained{words, words, err}
}

// explained is an error with another message.
type explained struct {
	kind  string // equal for errors that differ only in a time or a token
	words string // the message
	err   error
}

func (e *explained) Error() string { return e.words }
func (e *explained) Unwrap() error { return e.err }

// rootCause returns the network's own error, without the errors that wrap it.
func rootCause(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return dns
	}
	return err
}
