// Package nodelimits says which limit applies to a node: the defaults of the environment,
// or a line of a file (file.go) that operators write by hand (parse.go). values.go reads
// rates and sizes.
package nodelimits

import (
	"fmt"
	"slices"
	"strings"

	"tailscale.com/types/key"

	"derpd/relay"
	"derpd/relay/admit"
)

// kind is what a line names.
type kind string

const (
	byKey     kind = "nodekey"
	byComment kind = "comment"
	byTag     kind = "tag"
	byTailnet kind = "tailnet"
	all       kind = "*"
)

// Rule is one line: who, and the limit.
type Rule struct {
	Line  int
	Who   string // as written
	Limit relay.NodeLimit

	kind  kind
	node  key.NodePublic // of byKey
	value string         // of byComment, byTag and byTailnet
}

// fits reports whether the rule is for a node.
func (r Rule) fits(node key.NodePublic, d admit.Description) bool {
	switch r.kind {
	case byKey:
		return r.node == node
	case byComment:
		return r.value == d.Comment
	case byTag:
		return slices.Contains(d.Tags, r.value)
	case byTailnet:
		return strings.EqualFold(r.value, d.Tailnet) || strings.EqualFold(r.value, d.Domain())
	}
	return true
}

// Known is what the sources of admission say about nodes.
type Known struct {
	Comments bool // of DERP_ALLOW_KEYS
	Tags     bool // and names: of Tailscale's API or a tailscaled socket
}

// Useless returns a warning for the first line of each kind that fits no node, because
// no source says what the line is about.
func Useless(rules []Rule, known Known) (warnings []string) {
	warned := make(map[kind]bool)
	for _, r := range rules {
		from := ""
		switch {
		case r.kind == byComment && !known.Comments:
			from = "comments come from DERP_ALLOW_KEYS"
		case (r.kind == byTag || r.kind == byTailnet) && !known.Tags:
			from = "tags and tailnets come from Tailscale's API or a tailscaled socket"
		}
		if from != "" && !warned[r.kind] {
			warned[r.kind] = true
			warnings = append(warnings, fmt.Sprintf("line %d fits no node, because %s, and the relay does not use it; write nodekey:… in place of %q", r.Line, from, shown(r.Who)))
		}
	}
	return warnings
}

// Describe prints a limit for operators.
func Describe(l relay.NodeLimit) string {
	rate, connections := "no limit on what it sends", "any number of connections"
	if l.Rate > 0 {
		rate = fmt.Sprintf("sends at most %s, %s at once", relay.FormatRate(l.Rate), formatSize(l.Burst))
	}
	switch {
	case l.Connections == 1:
		connections = "1 connection"
	case l.Connections > 1:
		connections = fmt.Sprintf("%d connections", l.Connections)
	}
	return rate + ", " + connections
}
