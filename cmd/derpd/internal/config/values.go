package config

import (
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// list splits a comma-separated value. A value of commas alone is refused: it
// would switch off without notice what the variable is for, such as admission.
func (p *problems) list(name, value string) []string {
	items := splitList(value)
	if value != "" && len(items) == 0 {
		p.add(name, "want a comma-separated list, got %q", value)
	}
	return items
}

// splitList splits a comma-separated list, and leaves out empty items.
func splitList(s string) []string {
	var list []string
	for item := range strings.SplitSeq(s, ",") {
		if item = strings.TrimSpace(item); item != "" {
			list = append(list, item)
		}
	}
	return list
}

// boolean parses true or false, in any case.
func (p *problems) boolean(name, value string) bool {
	b, err := strconv.ParseBool(strings.ToLower(value))
	if err != nil {
		p.add(name, "want true or false, got %q", value)
	}
	return b
}

// duration parses a time span of at least lowest.
func (p *problems) duration(name, value, examples string, lowest time.Duration) time.Duration {
	d, err := time.ParseDuration(value)
	switch {
	case err != nil || d < 0:
		p.add(name, "want a duration such as %s, got %q", examples, value)
	case d < lowest:
		p.add(name, "want at least %s, such as %s, got %q", strings.TrimSuffix(lowest.String(), "0m0s"), examples, value)
	}
	return d
}

// path refuses a path that depends on the working directory, which an image, a
// service manager or a shell may change. It returns the absolute form.
func (p *problems) path(name, value string) string {
	if value == "" || filepath.IsAbs(value) {
		return value
	}
	absolute, err := filepath.Abs(value)
	if err != nil {
		p.add(name, "want an absolute path, got %q", value)
		return value
	}
	p.add(name, "want an absolute path, got %q; write %s", value, absolute)
	return absolute
}

// hostPort checks a TCP listen address, and brings its port into one form.
func (p *problems) hostPort(name, value string) string {
	host, port, err := net.SplitHostPort(value)
	if err != nil {
		p.add(name, "want host:port or :port, got %q", value)
		return ""
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" && !isHostName(host) {
		p.add(name, "want a host name or an address before the port, got %q", value)
		return ""
	}
	n, ok := p.port(name, port, 0)
	if !ok {
		return ""
	}
	return net.JoinHostPort(host, strconv.Itoa(n))
}

// port parses a port. lowest is the lowest value that is allowed: 1, 0 (any free
// port) or -1 (off).
func (p *problems) port(name, value string, lowest int) (int, bool) {
	n, err := strconv.Atoi(value)
	if err != nil || n < lowest || n > 65535 {
		off := ""
		if lowest == -1 {
			off = ", or -1 for off"
		}
		p.add(name, "want a port from 1 to 65535%s, got %q", off, value)
		return 0, false
	}
	return n, true
}

// PortOf is the port of a validated address. It is 0 if the address is empty.
func PortOf(addr string) int {
	_, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	return n
}

// isServer reports whether s is the HOST:PORT of a server. Ports are numbers,
// since the image has no list of their names.
func isServer(s string) bool {
	host, port, err := net.SplitHostPort(s)
	n, notNumber := strconv.ParseUint(port, 10, 16)
	return err == nil && host != "" && notNumber == nil && n != 0
}

var (
	hostLabel   = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$`)
	recordLabel = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_-]*[a-zA-Z0-9])?$`)

	// incompleteAddress matches a name whose last label is a number, such as
	// 10.0.0: no top-level domain is a number (RFC 3696 §2).
	incompleteAddress = regexp.MustCompile(`(^|\.)[0-9]+\.?$`)
)

// isHostName reports whether s is a host name (RFC 1123 §2.1).
func isHostName(s string) bool { return hasLabels(strings.TrimSuffix(s, "."), hostLabel) }

// isRecordName reports whether s is the name of a DNS record: several labels,
// which may have underscores, except the last.
func isRecordName(s string) bool {
	last := strings.LastIndex(s, ".")
	return last >= 0 && hasLabels(s[:last], recordLabel) && hasLabels(s[last+1:], hostLabel)
}

// hasLabels reports whether every label of s matches kind, and has at most 63
// bytes.
func hasLabels(s string, kind *regexp.Regexp) bool {
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 || !kind.MatchString(label) {
			return false
		}
	}
	return true
}

// parseURL parses an http or https URL.
func parseURL(value string) (*url.URL, bool) {
	u, err := url.Parse(value)
	return u, err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https")
}

// isClear reports whether everybody on the way to a URL can read and change what is
// sent: it is http, and not to this machine.
func isClear(u *url.URL) bool {
	if u.Scheme != "http" || u.Hostname() == "localhost" {
		return false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return err != nil || !addr.Unmap().IsLoopback()
}

// either joins words for a sentence: "a, b or c".
func either(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}
