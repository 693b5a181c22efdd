package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"tailscale.com/types/key"

	"derpd/relay/admit"
)

// admitReport is what the running relay says about one node key.
type admitReport struct {
	Welcome bool
	Open    bool `json:",omitzero"` // there are no sources
	Reason  string
	Sources []sourceReport `json:",omitzero"`
}

type sourceReport struct {
	Source string
	Answer string // yes, no, or why it cannot tell
	AsOf   time.Time
}

// serveAdmit answers `derpd admit`.
func (n *node) serveAdmit(w http.ResponseWriter, r *http.Request) {
	var node key.NodePublic
	if err := node.UnmarshalText([]byte(r.FormValue("node"))); err != nil || node.IsZero() {
		http.Error(w, "want node=nodekey:…", http.StatusBadRequest)
		return
	}
	report := n.admitReport(r.Context(), node)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(report)
}

func (n *node) admitReport(ctx context.Context, node key.NodePublic) admitReport {
	if n.gate == nil {
		return admitReport{Welcome: true, Open: true, Reason: "this relay is open: anybody may use it"}
	}
	answers, err := n.gate.AskAll(ctx, node)
	report := admitReport{Welcome: err == nil}
	said := false
	for _, a := range answers {
		line := sourceReport{Source: a.Source, AsOf: a.AsOf, Answer: "yes"}
		switch {
		case errors.Is(a.Err, admit.ErrRefused):
			line.Answer = "no"
		case a.Err != nil:
			line.Answer = fmt.Sprintf("cannot tell: %v", a.Err)
		default:
			said = true
		}
		report.Sources = append(report.Sources, line)
	}
	switch {
	case said:
		report.Reason = "a source says yes"
	case err == nil:
		report.Reason = fmt.Sprintf("a source cannot tell, and the node was admitted within the last %s (DERP_VERIFY_GRACE)", n.config.grace)
	case errors.Is(err, admit.ErrRefused):
		report.Reason = "every source says no"
	default:
		report.Reason = "no source says yes, and a source cannot tell"
	}
	return report
}

// askAdmission is the command `derpd admit NODEKEY`.
func askAdmission(ctx context.Context, args, env []string, stdout, stderr io.Writer) error {
	flags := newFlags("admit", stderr)
	if err := flags.Parse(args); err != nil {
		return noStart{errQuiet}
	}
	var node key.NodePublic
	if flags.NArg() != 1 {
		return noStart{errors.New("admit: want one node key, as `tailscale status --json` shows it under PublicKey")}
	}
	if err := node.UnmarshalText([]byte(flags.Arg(0))); err != nil || node.IsZero() {
		return noStart{fmt.Errorf("admit: want nodekey: and 64 hex digits, as `tailscale status --json` shows it under PublicKey, got %q", flags.Arg(0))}
	}
	l, err := loadEnvironment(env)
	if err != nil {
		return configError(err)
	}
	res, err := askAdmin(ctx, l.Admin, "/admit?node="+node.String())
	if err != nil {
		return fmt.Errorf("no relay answers on %s, so nobody can be asked: %w", l.Admin, err)
	}
	defer func() { _ = res.Body.Close() }()
	var report admitReport
	if err := json.NewDecoder(res.Body).Decode(&report); err != nil || res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s is not a derpd, or of another version", l.Admin)
	}
	if _, err := io.WriteString(stdout, report.String()); err != nil {
		return err
	}
	if !report.Welcome {
		return errQuiet
	}
	return nil
}

// String is for people.
func (r admitReport) String() string {
	var b strings.Builder
	for _, s := range r.Sources {
		fmt.Fprintf(&b, "%s: %s", s.Source, s.Answer)
		if !s.AsOf.IsZero() && time.Since(s.AsOf) > time.Minute {
			fmt.Fprintf(&b, " (as of %s ago)", age(s.AsOf))
		}
		b.WriteByte('\n')
	}
	verdict := "refused"
	if r.Welcome {
		verdict = "admitted"
	}
	fmt.Fprintf(&b, "%s: %s\n", verdict, r.Reason)
	return b.String()
}
