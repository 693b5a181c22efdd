package relay

import (
	"net/netip"
	"testing"
)

// X-Forwarded-For is read from the right, up to the first address that is not a
// proxy.
func TestForwardedFor(t *testing.T) {
	for _, tt := range []struct {
		peer, want string
		lines      []string
	}{
		{"10.0.0.1:5", "192.0.2.7:0", []string{"192.0.2.7"}},
		{"10.0.0.1:5", "192.0.2.7:0", []string{"192.0.2.7, 10.0.0.2"}},
		{"10.0.0.1:5", "192.0.2.7:0", []string{"192.0.2.7", "10.0.0.3,10.0.0.2"}},
		{"10.0.0.1:5", "192.0.2.7:0", []string{"198.51.100.1,\t192.0.2.7\t,  10.0.0.2 "}},
		{"[::ffff:10.0.0.1]:5", "192.0.2.7:0", []string{"192.0.2.7"}},
		{"10.0.0.1:5", "192.0.2.7:0", []string{"::ffff:192.0.2.7"}},
		{"10.0.0.1:5", "192.0.2.7:81", []string{"192.0.2.7:81"}},
		{"[2001:db8::1]:5", "[2001:dead::7]:0", []string{"2001:dead::7"}},
		{"10.0.0.1:5", "[2001:dead::7]:0", []string{"[2001:dead::7]"}},
		{"10.0.0.1:5", "[2001:dead::7]:81", []string{"[2001:dead::7]:81"}},
		{"10.0.0.1:5", "10.0.0.2:0", []string{"10.0.0.2"}}, // a request of the proxy itself

		// Addresses that a client has sent itself.
		{"10.0.0.1:5", "192.0.2.7:0", []string{"198.51.100.1, 192.0.2.7"}},
		{"10.0.0.1:5", "192.0.2.7:0", []string{"10.0.0.9", "192.0.2.7"}},
		{"10.0.0.1:5", "192.0.2.7:0", []string{"unknown,,;, 192.0.2.7"}},
		{"192.0.2.7:5", "192.0.2.7:5", []string{"198.51.100.1"}},
		{"192.0.2.7:5", "192.0.2.7:5", []string{"198.51.100.1, 10.0.0.1"}},

		// Malformed entries.
		{"10.0.0.1:5", "10.0.0.1:5", nil},
		{"10.0.0.1:5", "10.0.0.1:5", []string{""}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"192.0.2.7,"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"unknown"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"192.0.2"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"192.0.2.07"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"192.0.2.7:99999"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"[2001:dead::7"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"fe80::1%eth0"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"0.0.0.0"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"::"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"224.0.0.1"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{"[ff02::1]:80"}},
		{"10.0.0.1:5", "10.0.0.1:5", []string{`for="192.0.2.7"`}},
		{"10.0.0.1:5", "10.0.0.2:0", []string{"192.0.2.7, unknown, 10.0.0.2"}},
	} {
		if got := forwardedFor(proxies, netip.MustParseAddrPort(tt.peer), tt.lines); got.String() != tt.want {
			t.Errorf("%s with %q: %s, want %s", tt.peer, tt.lines, got, tt.want)
		}
	}
}

// FuzzForwardedFor puts any text before the address that the proxy appends. The
// result does not depend on the text.
func FuzzForwardedFor(f *testing.F) {
	f.Add("198.51.100.1, 10.0.0.2")
	f.Add("[2001:db8::1]:80,")
	f.Fuzz(func(t *testing.T, invented string) {
		peer := netip.MustParseAddrPort("10.0.0.1:5")
		for _, lines := range [][]string{{invented + ",192.0.2.7"}, {invented, "192.0.2.7"}, {invented + ",192.0.2.7, 10.0.0.2"}} {
			if got := forwardedFor(proxies, peer, lines); got.String() != "192.0.2.7:0" {
				t.Errorf("%q: %s", lines, got)
			}
		}
		if got := forwardedFor(proxies, peer, []string{invented}); !got.IsValid() {
			t.Errorf("%q: %s", invented, got)
		}
	})
}
