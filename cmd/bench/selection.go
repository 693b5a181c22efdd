//go:build linux

package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// measurement is a measurement of both servers in turn.
type measurement struct {
	name string
	// run measures a running server. A measurement that needs a new server starts
	// another one of the same program.
	run func(context.Context, *server) (sample, error)
	// again runs the measurement twice in a round.
	again bool
}

// metric is a value of a measurement.
type metric string

const (
	packetRate      metric = "packets/s"
	arrivedRate     metric = "Mbit/s that arrive"
	cpuPerPacket    metric = "CPU s per million packets"
	cpuPerByte      metric = "CPU s per GB"
	callsPer        metric = "reads and writes per packet"
	systemCallsPer  metric = "system calls per packet"
	delayMedian     metric = "p50 latency, ms"
	delayP99        metric = "p99 latency, ms"
	lostShare       metric = "share of packets lost"
	connectRate     metric = "connects/s"
	cpuPerConnect   metric = "CPU ms per connect"
	memoryPerClient metric = "KiB per connection"
	memoryAlone     metric = "MiB without clients"
	answerRate      metric = "answers/s"
	answersPer      metric = "answers per CPU s"
	startDERP       metric = "ms to the first DERP handshake"
	startSTUN       metric = "ms to the first STUN answer"

	// Metrics about the measurement itself, neither better nor worse.
	lostPackets metric = "packets lost"
	serverBusy  metric = "share of the server's CPUs in use"
	loadBusy    metric = "share of the load's CPUs in use"
	othersBusy  metric = "share of all CPUs that others used"
)

// metrics is the order of the report. The last ones are about the measurement
// itself.
var metrics = []metric{
	packetRate, arrivedRate, cpuPerPacket, cpuPerByte, callsPer, systemCallsPer, connectRate, cpuPerConnect,
	memoryPerClient, memoryAlone, answerRate, answersPer, delayMedian, delayP99, lostShare, startDERP, startSTUN,
	serverBusy, loadBusy, othersBusy, lostPackets,
}

func rank(m metric) int { return slices.Index(metrics, m) }

// isCompared reports whether the ratio of a metric shows the better server.
func isCompared(m metric) bool { return rank(m) < rank(serverBusy) }

func moreIsBetter(m metric) bool {
	return slices.Contains([]metric{packetRate, arrivedRate, connectRate, answerRate, answersPer}, m)
}

// sample contains the values of one measurement of one server.
type sample map[metric]float64

// setDelays adds the median and the 99th percentile, if there are any delays.
func (s sample) setDelays(delays []time.Duration) {
	if len(delays) == 0 {
		return
	}
	slices.Sort(delays)
	s[delayMedian] = quantile(delays, 0.50).Seconds() * 1e3
	s[delayP99] = quantile(delays, 0.99).Seconds() * 1e3
}

// Names of measurements other than [load.name] and [scenario.title].
const (
	connectName = "connect"
	startName   = "start"
)

func idleName(count int) string { return fmt.Sprintf("%d idle connections", count) }

func stunName(burst int) string {
	if burst > 1 {
		return fmt.Sprintf("STUN, %d clients at once", burst)
	}
	return "STUN, one at a time"
}

// selection returns the measurements that the options ask for.
func selection(o options) []measurement {
	span, idle, starts := time.Second, []int{1000, 5000, 10000}, 11
	loads := []load{
		{size: 64, pairs: 8, burst: 1},
		{size: 64, pairs: 8, burst: 8},
		{size: 1280, pairs: 8, burst: 1},
		{size: 1280, pairs: 8, burst: 8},
		{size: 1280, pairs: 1, burst: 8},
		{size: 1280, pairs: 64, burst: 8},
		{size: 1280, pairs: 8, burst: 1, alone: true},
		{size: 8192, pairs: 8, burst: 1},
		{size: 1280, pairs: 8, burst: 1, rate: fixedRate},
		{size: 1280, pairs: 8, burst: 8, rate: fixedRate},
	}
	switch {
	case o.quick:
		span, idle, starts = 300*time.Millisecond, []int{1000}, 5
		loads = []load{
			{size: 64, pairs: 8, burst: 1},
			{size: 1280, pairs: 8, burst: 1},
			{size: 1280, pairs: 8, burst: 8},
			{size: 1280, pairs: 8, burst: 1, rate: fixedRate},
		}
	case o.full:
		loads = []load{{size: 1280, pairs: 8, burst: 1, alone: true}}
		for _, rate := range []int{0, fixedRate} {
			for _, size := range []int{64, 1280, 8192} {
				for _, pairs := range []int{1, 8, 64} {
					for _, burst := range []int{1, 8} {
						loads = append(loads, load{size: size, pairs: pairs, burst: burst, rate: rate})
					}
				}
			}
		}
	}

	var list []measurement
	add := func(name string, again bool, run func(context.Context, *server) (sample, error)) {
		if o.only == nil || o.only.MatchString(name) {
			list = append(list, measurement{name, run, again})
		}
	}
	if o.path {
		for _, c := range scenarios() {
			for _, congestion := range allowedCongestion() {
				add(c.title(congestion), false, func(ctx context.Context, s *server) (sample, error) {
					return measureScenario(ctx, s.Program, c, congestion)
				})
			}
		}
		return list
	}
	for _, l := range loads {
		l.time = span
		add(l.name(), true, func(ctx context.Context, s *server) (sample, error) { return measureRelay(ctx, s, l) })
	}
	add(connectName, true, newConnects(span).measure)
	for _, burst := range []int{1, stunBurst} {
		add(stunName(burst), true, func(ctx context.Context, s *server) (sample, error) { return measureSTUN(ctx, s, burst, span) })
	}
	for _, count := range idle {
		add(idleName(count), false, func(ctx context.Context, s *server) (sample, error) {
			return measureIdle(ctx, s.Program, count, settle)
		})
	}
	add(startName, false, func(ctx context.Context, s *server) (sample, error) { return measureStart(ctx, s.Program, starts) })
	return list
}
