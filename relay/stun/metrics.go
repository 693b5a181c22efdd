package stun

import (
	"expvar"

	"tailscale.com/metrics"
)

// counters are the counters of derper's stunserver. They leave out requests to a
// closed server and from a gateway.
type counters struct {
	set                                                 metrics.Set
	readError, notSTUN, writeError, success, ipv4, ipv6 *expvar.Int
	noLocalAddr                                         expvar.Int // the kernel chose the source of the reply
}

func (c *counters) init() {
	disposition := c.set.NewLabelMap("counter_requests", "disposition")
	c.readError, c.notSTUN = disposition.Get("read_error"), disposition.Get("not_stun")
	c.writeError, c.success = disposition.Get("write_error"), disposition.Get("success")
	family := c.set.NewLabelMap("counter_addrfamily", "family")
	c.ipv4, c.ipv6 = family.Get("ipv4"), family.Get("ipv6")
	c.set.Set("counter_no_local_addr", &c.noLocalAddr)
}

// Metrics returns the counters. Published as "stun", they have derper's names.
func (s *Server) Metrics() expvar.Var { return &s.counters.set }
