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

// remedies say what most often is behind an authority's problem (RFC 8555
// §6.7), and what to do about it. The authority's own words come first: they
// name the address it found and what answered there.
var remedies = map[string]string{
	acme.ProblemTypeDNS:                     "it found no address for this name: add an A or AAAA record that points here",
	acme.ProblemTypeConnection:              "it could not connect: open TCP 80 (http) or TCP 443 (tls-alpn) to everybody, and see whether DNS points here",
	acme.ProblemTypeUnauthorized:            "something else answered: DNS points to another machine, or a proxy stands before this one",
	acme.ProblemTypeTLS:                     "something else answered on TCP 443: DNS points to another machine, or a proxy stands before this one",
	acme.ProblemTypeRateLimited:             "wait until the time it names, if it names one; derpd tries again by itself; try things out with DERP_ACME_CA=letsencrypt-staging",
	acme.ProblemTypeCAA:                     "a CAA record in DNS allows other authorities only: add this one, or choose another with DERP_ACME_CA",
	acme.ProblemTypeExternalAccountRequired: "it wants an account binding: set DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY",
	acme.ProblemTypeRejectedIdentifier:      "it does not sign this name; a public authority signs public names only",
	acme.ProblemTypeUserActionRequired:      "it wants something of its account's owner, at the address it names",
	acme.ProblemTypeServerInternal:          "the fault is on its side; derpd tries again by itself",
}

// challengeProblems are what an authority says when it did not find the relay
// where it looked.
var challengeProblems = []string{acme.ProblemTypeDNS, acme.ProblemTypeConnection, acme.ProblemTypeUnauthorized, acme.ProblemTypeTLS}

// lookupTimeout bounds the look into DNS.
const lookupTimeout = 2 * time.Second

// LookupFunc finds the addresses of a DNS name, as [net.Resolver.LookupNetIP]
// does.
type LookupFunc func(ctx context.Context, network, host string) ([]netip.Addr, error)

// whereTo says where DNS leads, after a challenge that failed: the authority
// often does not name the address that it tried.
func whereTo(ctx context.Context, name string, err error, lookup LookupFunc) string {
	problem, ok := errors.AsType[acme.Problem](err)
	if !ok || problem.Resource == nil || !slices.Contains(challengeProblems, problem.Type) || net.ParseIP(name) != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := lookup(ctx, "ip", name)
	if missing, ok := errors.AsType[*net.DNSError](err); ok && missing.IsNotFound {
		return fmt.Sprintf("; DNS says that %s has no address", name)
	}
	if err != nil || len(found) == 0 {
		return ""
	}
	var addresses []string
	for _, a := range found {
		addresses = append(addresses, a.Unmap().String())
	}
	slices.Sort(addresses)
	return fmt.Sprintf("; DNS says %s is %s", name, strings.Join(addresses, " and "))
}

// explain puts an error of certmagic into the words of the authority, and adds
// the likely cause. The error is still in the chain.
func explain(name string, err error) *explained {
	if problem, ok := errors.AsType[acme.Problem](err); ok {
		words := problem.Detail
		for _, sub := range problem.Subproblems {
			words += "; " + sub.Detail
		}
		remedy := remedies[problem.Type]
		switch {
		case problem.Type == acme.ProblemTypeUnauthorized && problem.Resource == nil:
			// Not about a challenge, which would be the resource.
			remedy = "it does not take this account: see DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY"
		case remedy == "":
			remedy = "derpd tries again by itself"
		}
		return &explained{problem.Type, fmt.Sprintf("%s: the authority says %q (%s): %s", name, words, strings.TrimPrefix(problem.Type, acme.ProblemTypeNamespace), remedy), err}
	}
	if untrusted, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &explained{"untrusted", fmt.Sprintf("%s: the authority's own certificate is not trusted here: %v; a private authority's roots go into DERP_ACME_CA_ROOTS", name, untrusted.Err), err}
	}
	if _, ok := errors.AsType[net.Error](err); ok && !errors.Is(err, context.Canceled) {
		return &explained{"unreachable", fmt.Sprintf("%s: the authority cannot be reached from here: %v; derpd tries again by itself", name, rootCause(err)), err}
	}
	words := fmt.Sprintf("%s: %v", name, err)
	return &explained{words, words, err}
}

// explained is an error in other words.
type explained struct {
	kind  string // the same for errors that differ only in a time or a token
	words string
	err   error
}

func (e *explained) Error() string { return e.words }
func (e *explained) Unwrap() error { return e.err }

// rootCause is the innermost error of a chain: what the network said, without
// the list of who passed it on.
func rootCause(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return dns
	}
	return err
}
