package node

import (
	"expvar"
	"slices"

	"tailscale.com/metrics"

	"derpd/internal/caught"
	"derpd/relay"
)

// metrics are all metrics of the relay. Metrics of derpserver and STUN keep the
// names that derper gives them (derp_bytes_sent and so on), so that dashboards
// made for derper keep working. Metrics of derpd begin with derpd_. A prefix
// gives the type to the exporter, which does not print it.
func (n *Node) metrics() []expvar.KeyValue {
	list := []expvar.KeyValue{
		{Key: "derp", Value: n.relay.Metrics()},
		{Key: "gauge_derpd_open", Value: number(n.gate.Load() == nil)},
		{Key: "counter_derpd_self_check_failures_total", Value: number(int64(n.selfCheck.State().Failures))},
		{Key: "gauge_derpd_overloaded", Value: number(n.selfCheck.State().Overload != nil)},
		{Key: "gauge_derpd_handshakes_waiting", Value: number(n.relay.Handshakes().Waiting)},
		{Key: "counter_derpd_handshakes_refused_total", Value: number(int64(n.relay.Handshakes().Refused))},
	}
	if n.stun != nil {
		refused, _ := n.stun.Refused()
		list = append(list,
			expvar.KeyValue{Key: "stun", Value: n.stun.Metrics()},
			expvar.KeyValue{Key: "gauge_derpd_stun_open", Value: number(n.stun.Open())},
			expvar.KeyValue{Key: "counter_derpd_stun_gateway_refused_total", Value: number(int64(refused))})
	}
	if n.certs != nil {
		status := n.certs.Status()
		if status.Leaf != nil {
			list = append(list, expvar.KeyValue{Key: "gauge_derpd_certificate_not_after_timestamp_seconds", Value: number(status.Leaf.NotAfter.Unix())})
		}
		if record := n.mapCert.get(); !record.Changed.IsZero() {
			list = append(list, expvar.KeyValue{Key: "gauge_derpd_pin_changed_timestamp_seconds", Value: number(record.Changed.Unix())})
		}
		list = append(list,
			expvar.KeyValue{Key: "gauge_derpd_certificate_failing", Value: number(status.Err != nil)},
			expvar.KeyValue{Key: "counter_derpd_certificate_reloads_total", Value: number(int64(status.Reloads))},
			expvar.KeyValue{Key: "counter_derpd_certificate_reload_errors_total", Value: number(int64(status.ReloadErrors))})
	}
	misdirected := &metrics.MultiLabelMap[reasonLabel]{Type: "counter", Help: "Connections and requests that cannot work because of what is in front of the relay, those of scanners included."}
	for _, s := range n.relay.Misdirected() {
		misdirected.Set(reasonLabel{string(s.Misdirection)}, number(int64(s.Count)))
	}
	list = append(list, expvar.KeyValue{Key: "derpd_misdirected_total", Value: misdirected})
	excess := n.relay.Excess()
	list = append(list,
		expvar.KeyValue{Key: "counter_derpd_first_frames_refused_total", Value: number(excess.FirstFrames)},
		expvar.KeyValue{Key: "counter_derpd_large_packets_dropped_total", Value: number(excess.LargePackets)})
	if n.updates != nil {
		if answer, asOf, _ := n.updates.last(); !asOf.IsZero() {
			list = append(list,
				expvar.KeyValue{Key: "gauge_derpd_update_available", Value: number(answer.Newer)},
				expvar.KeyValue{Key: "gauge_derpd_update_answer_timestamp_seconds", Value: number(asOf.Unix())})
		}
	}
	return slices.Concat(list, n.listenerMetrics(), relay.ProcessMetrics(), n.toldMetrics(), n.connectionMetrics(), n.nodeLimitMetrics(), n.admissionMetrics(), n.meshMetrics())
}

// The types are labels of metrics.
type (
	decisionLabel struct{ Decision string }
	sourceLabel   struct{ Source string }
	nodeLabel     struct{ Node string }
	reasonLabel   struct{ Reason string }
	listenerLabel struct{ Listener string }
	limitLabel    struct{ Limit string }
)

func (n *Node) listenerMetrics() []expvar.KeyValue {
	failed := &metrics.MultiLabelMap[listenerLabel]{Type: "counter", Help: "Errors of accept since the start, after which the listener went on."}
	refused := &metrics.MultiLabelMap[listenerLabel]{Type: "counter", Help: "Connections closed at once since the start, because the descriptors left are a reserve."}
	for _, l := range n.listeners.retried {
		failed.Set(listenerLabel{l.Name()}, number(int64(l.Failures())))
		refused.Set(listenerLabel{l.Name()}, number(int64(l.Refused())))
	}
	return []expvar.KeyValue{
		{Key: "derpd_accept_errors_total", Value: failed},
		{Key: "derpd_accept_refused_total", Value: refused},
		{Key: "counter_derpd_panics_total", Value: number(int64(caught.Count()))},
	}
}

func (n *Node) admissionMetrics() []expvar.KeyValue {
	gate := n.gate.Load()
	if gate == nil {
		return nil
	}
	counts := gate.Counts()
	decisions := &metrics.MultiLabelMap[decisionLabel]{Type: "counter", Help: "Decisions about nodes since the start. Disconnected nodes had been admitted before."}
	for decision, count := range map[string]uint64{
		"admitted": counts.Admitted, "kept": counts.Kept, "refused": counts.Refused,
		"unavailable": counts.Unavailable, "limited": counts.Limited, "disconnected": counts.Disconnected,
	} {
		decisions.Set(decisionLabel{decision}, number(int64(count)))
	}
	up := &metrics.MultiLabelMap[sourceLabel]{Type: "gauge", Help: "Whether the source answered the last question."}
	asOf := &metrics.MultiLabelMap[sourceLabel]{Type: "gauge", Help: "Time of the source's information."}
	for _, s := range gate.States() {
		label := sourceLabel{s.Source}
		up.Set(label, number(s.Err == nil && s.Problem == nil))
		if !s.AsOf.IsZero() {
			asOf.Set(label, number(s.AsOf.Unix()))
		}
	}
	return []expvar.KeyValue{
		{Key: "derpd_admission_decisions_total", Value: decisions},
		{Key: "derpd_admission_source_up", Value: up},
		{Key: "derpd_admission_source_timestamp_seconds", Value: asOf},
		{Key: "gauge_derpd_clients", Value: number(len(n.connected()))},
	}
}

func (n *Node) meshMetrics() []expvar.KeyValue {
	if !n.config.Meshed() {
		return nil
	}
	up := &metrics.MultiLabelMap[nodeLabel]{Type: "gauge", Help: "Whether packets are forwarded to the node."}
	clients := &metrics.MultiLabelMap[nodeLabel]{Type: "gauge", Help: "Clients that are connected to the node."}
	for _, s := range n.relay.Mesh().States() {
		if s.Self {
			continue
		}
		up.Set(nodeLabel{s.Node}, number(s.Up))
		clients.Set(nodeLabel{s.Node}, number(s.Clients))
	}
	return []expvar.KeyValue{{Key: "derpd_mesh_up", Value: up}, {Key: "derpd_mesh_clients", Value: clients}}
}

// number is a metric with one value.
func number[T bool | int | int64](v T) expvar.Var {
	i := new(expvar.Int)
	switch v := any(v).(type) {
	case bool:
		if v {
			i.Set(1)
		}
	case int:
		i.Set(int64(v))
	case int64:
		i.Set(v)
	}
	return i
}
