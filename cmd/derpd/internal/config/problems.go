package config

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"derpd/internal/redact"
)

// problems collects what is wrong with the environment.
type problems struct {
	found  []problem
	hidden []string // values that no message may show: secrets, and contents of files
}

// hide keeps a value out of all messages, but for its first characters. A file may be
// another than the operator meant, and hold a secret. Short values are also words of
// messages.
func (p *problems) hide(value string) {
	for _, item := range append(splitList(value), value) {
		if len(item) > 7 {
			p.hidden = append(p.hidden, item)
		}
	}
}

type problem struct {
	variable string
	err      error
}

// add records a problem. Its text begins with the name of the variable.
func (p *problems) add(variable, format string, args ...any) {
	p.found = append(p.found, problem{variable, oneLine{fmt.Errorf("%s: %w", variable, fmt.Errorf(format, args...)), &p.hidden}})
}

// has reports whether a variable, or its file, has a problem already.
func (p *problems) has(variable string) bool {
	return slices.ContainsFunc(p.found, func(one problem) bool { return one.variable == variable || one.variable == variable+"_FILE" })
}

// err joins the problems in the order of the documentation, and those of
// variables that are not documented first, by name. It is nil if there are none.
func (p *problems) err(order map[string]int) error {
	position := func(variable string) int {
		if i, ok := order[variable]; ok {
			return i
		}
		if i, ok := order[strings.TrimSuffix(variable, "_FILE")]; ok {
			return i
		}
		return -1
	}
	slices.SortStableFunc(p.found, func(a, b problem) int {
		if d := position(a.variable) - position(b.variable); d != 0 {
			return d
		}
		if position(a.variable) == -1 {
			return strings.Compare(a.variable, b.variable)
		}
		return 0
	})
	var errs []error
	for _, one := range p.found {
		errs = append(errs, one.err)
	}
	return errors.Join(errs...)
}

// oneLine is an error whose text has no secret, and no line breaks, since each problem
// is one line. Names and paths may have some.
type oneLine struct {
	error
	hidden *[]string // of the problems
}

// Error implements error.
func (e oneLine) Error() string {
	text := redact.Secrets(e.error.Error())
	for _, value := range *e.hidden {
		text = strings.ReplaceAll(text, value, redact.Value(value))
	}
	return strings.NewReplacer("\n", `\n`, "\r", `\r`).Replace(text)
}

// Unwrap returns the error as it was.
func (e oneLine) Unwrap() error { return e.error }

// readHint is the fix for a file that is missing or may not be read.
func readHint(err error) string {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "; create it, or correct the path (for a container: its path inside)"
	case errors.Is(err, os.ErrPermission):
		return fmt.Sprintf("; derpd runs as uid %d, which must be able to read it (a secret with mode 0600 that root owns cannot be)", os.Getuid())
	}
	return ""
}
