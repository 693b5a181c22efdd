package nodelimits

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"derpd/relay"
)

const (
	// leastRate is 128 kbit/s in bytes. A node with less does not keep up with its own
	// keepalives and handshakes, and looks broken.
	leastRate = 128_000 / 8

	mostRate = 100_000_000_000 / 8 // 100 Gbit/s

	// A burst is at least leastBurst, and what the rate sends in leastBurstTime. With
	// less, the timers of a busy machine would lower the rate.
	leastBurst     = 16 << 10
	leastBurstTime = 10 * time.Millisecond

	// The default of a burst is what the rate sends in defaultBurstTime, between
	// defaultBurst and maxDefaultBurst.
	defaultBurst     = 64 << 10
	maxDefaultBurst  = 64 << 20
	defaultBurstTime = 250 * time.Millisecond

	mostBurst = 1 << 30

	mostConnections = 100_000
)

// Unlimited is the value for no limit. off means the same, as in other variables.
const Unlimited = "unlimited"

func isUnlimited(value string) bool {
	return strings.EqualFold(value, Unlimited) || strings.EqualFold(value, "off")
}

// Rate parses a rate in bits per second, such as 20Mbit, and returns bytes.
func Rate(value string) (bytes int64, err error) {
	if isUnlimited(value) {
		return 0, nil
	}
	number, unit := split(strings.TrimSuffix(strings.ToLower(value), "/s"))
	size, ok := map[string]float64{"": 1, "bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}[unit]
	bits, ok2 := decimal(number)
	switch {
	case !ok || !ok2:
		return 0, fmt.Errorf("want a rate in bits per second such as 20Mbit, 1.5Mbit, 512kbit or 1Gbit, or %s, got %q", Unlimited, value)
	case bits*size < leastRate*8:
		return 0, fmt.Errorf("want at least 128kbit, or a node seems broken, got %q; write %s for no limit", value, Unlimited)
	case bits*size > mostRate*8:
		return 0, fmt.Errorf("want at most 100Gbit, got %q; write %s for no limit", value, Unlimited)
	}
	return int64(math.Round(bits * size / 8)), nil
}

// Burst parses a size in bytes, such as 256KiB, for a rate.
func Burst(value string, rate int64) (bytes int, err error) {
	number, unit := split(strings.ToLower(value))
	size, ok := map[string]float64{"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "kib": 1 << 10, "mib": 1 << 20}[unit]
	n, ok2 := decimal(number)
	least := max(leastBurst, int(float64(rate)*leastBurstTime.Seconds()))
	switch {
	case !ok || !ok2:
		return 0, fmt.Errorf("want a size in bytes such as 256KiB or 1MiB, got %q", value)
	case n*size < float64(least):
		return 0, fmt.Errorf("want at least %s for this rate, got %q", formatSize(least), value)
	case n*size > mostBurst:
		return 0, fmt.Errorf("want at most 1024MiB, got %q", value)
	}
	return int(n * size), nil
}

// DefaultBurst is the burst of a rate without one.
func DefaultBurst(rate int64) int {
	return int(min(max(rate/int64(time.Second/defaultBurstTime), defaultBurst), maxDefaultBurst))
}

// Connections parses a number of connections. 0, unlimited and off are no limit.
func Connections(value string) (int, error) {
	if isUnlimited(value) {
		return 0, nil
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 0 || n > mostConnections {
		return 0, fmt.Errorf("want a number of connections from 1 to %d, or %s, got %q", mostConnections, Unlimited, value)
	}
	return n, nil
}

// Defaults returns the limit of nodes without a line. Each error is about the value of
// that name.
func Defaults(rate, burst, connections string) (l relay.NodeLimit, rateErr, burstErr, connectionsErr error) {
	if rate != "" {
		l.Rate, rateErr = Rate(rate)
	}
	switch {
	case rateErr != nil:
	case burst != "" && l.Rate == 0:
		burstErr = errors.New("is only used with a rate, but DERP_CLIENT_RATE has none; set a rate there, or remove this")
	case burst != "":
		l.Burst, burstErr = Burst(burst, l.Rate)
	case l.Rate > 0:
		l.Burst = DefaultBurst(l.Rate)
	}
	l.Connections, connectionsErr = Connections(connections)
	return l, rateErr, burstErr, connectionsErr
}

// split splits a value into its number and its unit.
func split(value string) (number, unit string) {
	i := strings.IndexFunc(value, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if i < 0 {
		return value, ""
	}
	return value[:i], strings.TrimSpace(value[i:])
}

// decimal parses digits with at most one point.
func decimal(s string) (float64, bool) {
	if s == "" || strings.Trim(s, "0123456789.") != "" {
		return 0, false
	}
	n, err := strconv.ParseFloat(s, 64)
	return n, err == nil
}

// formatSize prints a size in the form that Burst reads.
func formatSize(bytes int) string {
	switch {
	case bytes >= 1<<20 && bytes%(1<<20) == 0:
		return fmt.Sprintf("%dMiB", bytes>>20)
	case bytes >= 1<<10:
		return fmt.Sprintf("%dKiB", (bytes+1<<10-1)>>10)
	}
	return strconv.Itoa(bytes)
}
