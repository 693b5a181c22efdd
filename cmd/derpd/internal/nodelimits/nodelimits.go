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
