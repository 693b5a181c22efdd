package admin

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"derpd/internal/redact"
	"derpd/relay/admit"
)

// admissionType is the media type of an [Admission].
const admissionType = "application/vnd.derpd.admission+json"

// Admission is the decision about one node key, with the answer of each source.
type Admission struct {
	Admitted bool
	Reason   string
	Sources  []SourceAnswer `json:",omitzero"` // none for an open relay
	Limit    string         `json:",omitzero"` // what the node may send, and by which line; empty for a refused node
}

// SourceAnswer is what one source of admission says about a node.
type SourceAnswer struct {
	Source string
	Answer string    // yes, no, or why the source is unavailable
	AsOf   time.Time // time of the source's information, zero if it has none
}

// OpenAdmission is the decision of a relay without sources.
func OpenAdmission() Admission {
	return Admission{Admitted: true, Reason: "this relay is open: anybody may use it"}
}

// NewAdmission describes the result of [admit.Gate.AskAll]. grace is how long an
// admitted node stays admitted while a source is unavailable.
func NewAdmission(answers []admit.Answer, err error, grace time.Duration) Admission {
	a := Admission{Admitted: err == nil}
	yes := false
	for _, answer := range answers {
		line := SourceAnswer{Source: answer.Source, AsOf: answer.AsOf, Answer: "yes"}
		switch {
		case errors.Is(answer.Err, admit.ErrRefused):
			line.Answer = "no"
		case answer.Err != nil:
			line.Answer = redact.Secrets(fmt.Sprintf("unavailable: %v", answer.Err)) // the text of another program
		default:
			yes = true
		}
		a.Sources = append(a.Sources, line)
	}
	switch {
	case yes:
		a.Reason = "a source says yes"
	case err == nil:
		a.Reason = fmt.Sprintf("a source is unavailable, and it admitted the node within the last %s (DERP_VERIFY_GRACE)", grace)
	case errors.Is(err, admit.ErrRefused):
		a.Reason = "every source says no"
	default:
		a.Reason = "no source says yes, and a source is unavailable"
	}
	return a
}

// String is a line for each source, the decision, and the limit.
func (a Admission) String() string {
	var b strings.Builder
	for _, s := range a.Sources {
		fmt.Fprintf(&b, "%s: %s", s.Source, s.Answer)
		if !s.AsOf.IsZero() && time.Since(s.AsOf) > time.Minute {
			fmt.Fprintf(&b, " (as of %s ago)", time.Since(s.AsOf).Round(time.Second))
		}
		b.WriteByte('\n')
	}
	decision := "refused"
	if a.Admitted {
		decision = "admitted"
	}
	fmt.Fprintf(&b, "%s: %s\n", decision, a.Reason)
	if a.Limit != "" {
		fmt.Fprintf(&b, "limit: %s\n", a.Limit)
	}
	return b.String()
}
