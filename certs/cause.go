package certs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

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
	acme.ProblemTypeRateLimited:             "wait until the time it names; try things out with DERP_ACME_CA=letsencrypt-staging",
	acme.ProblemTypeCAA:                     "a CAA record in DNS allows other authorities only: add this one, or choose another with DERP_ACME_CA",
	acme.ProblemTypeExternalAccountRequired: "it wants an account binding: set DERP_ACME_EAB_KID and DERP_ACME_EAB_KEY",
	acme.ProblemTypeRejectedIdentifier:      "it does not sign this name; a public authority signs public names only",
	acme.ProblemTypeUserActionRequired:      "it wants something of its account's owner, at the address it names",
	acme.ProblemTypeServerInternal:          "the fault is on its side; derpd tries again by itself",
}

// explain puts an error of certmagic into the words of the authority, and adds
// the likely cause. The error is still in the chain.
func explain(name string, err error) error {
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
		return &explained{fmt.Sprintf("%s: the authority says %q (%s): %s", name, words, strings.TrimPrefix(problem.Type, acme.ProblemTypeNamespace), remedy), err}
	}
	if _, ok := errors.AsType[net.Error](err); ok && !errors.Is(err, context.Canceled) {
		return &explained{fmt.Sprintf("%s: the authority cannot be reached from here: %v; derpd tries again by itself", name, rootCause(err)), err}
	}
	return &explained{fmt.Sprintf("%s: %v", name, err), err}
}

// explained is an error in other words.
type explained struct {
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
