package relay

import (
	"bytes"
	"expvar"
	"io"
	"strconv"
	"strings"

	"tailscale.com/metrics"
)

// packetsDropped is the name of derpserver's counter of packets that it did not
// deliver, by reason and kind.
const packetsDropped = "derp_packets_dropped"

// processMetrics are the metrics that derpserver publishes for the whole process,
// and not in [derpserver.Server.ExpVar].
var processMetrics = []string{packetsDropped, "derp_bytes_dropped", "derp_websocket_accepts"}

// ProcessMetrics returns the metrics that derpserver counts for all relays of this
// process together, with the names that derper uses.
func ProcessMetrics() []expvar.KeyValue {
	var list []expvar.KeyValue
	for _, name := range processMetrics {
		if v := expvar.Get(name); v != nil {
			list = append(list, expvar.KeyValue{Key: name, Value: v})
		}
	}
	return list
}

// Packets are numbers of packets since the start.
type Packets struct {
	Received int64            // from clients and from other nodes of the mesh
	Dropped  map[string]int64 // not delivered, by derpserver's reason, or "large_backlog"
}

// Packets returns the numbers of packets so far. Dropped leaves out disco packets
// for nodes that are not connected: nodes send them to find out whether another
// node is there.
func (r *Relay) Packets() Packets {
	large := r.Excess().LargePackets
	p := Packets{Received: large, Dropped: map[string]int64{"large_backlog": large}}
	if counters, ok := r.server.ExpVar(false).(*metrics.Set); ok {
		for _, name := range []string{"packets_received", "packets_forwarded_in"} {
			if n, ok := counters.Get(name).(*expvar.Int); ok {
				p.Received += n.Value()
			}
		}
	}
	// The labels have a type that derpserver does not export.
	var text bytes.Buffer
	if v, ok := expvar.Get(packetsDropped).(interface{ WritePrometheus(io.Writer, string) }); ok {
		v.WritePrometheus(&text, packetsDropped)
	}
	for line := range strings.Lines(text.String()) {
		_, value, ok := strings.Cut(strings.TrimSpace(line), "} ")
		n, err := strconv.ParseInt(value, 10, 64)
		reason := label(line, "reason")
		if !ok || err != nil || strings.HasPrefix(reason, "unknown_dest") && label(line, "kind") == "disco" {
			continue
		}
		p.Dropped[reason] += n
	}
	return p
}

// Served returns the number of connected clients, and of packets sent to them since the
// start.
func (r *Relay) Served() (clients, packets int64) {
	counters, ok := r.server.ExpVar(false).(*metrics.Set)
	if !ok {
		return 0, 0
	}
	value := func(name string) int64 {
		n, ok := counters.Get(name).(*expvar.Int)
		if !ok {
			return 0
		}
		return n.Value()
	}
	return value("gauge_current_connections"), value("packets_sent")
}

// label returns the value of a label in a line of Prometheus' text format.
func label(line, name string) string {
	_, value, _ := strings.Cut(line, name+`="`)
	value, _, _ = strings.Cut(value, `"`)
	return value
}
