//go:build linux

package main

import (
	"fmt"
	"math"
)

// target is a row of the documents' table: a ratio of derpd to derper and its
// limit.
type target struct {
	measurement string
	metric      metric
	limit       float64 // at most, or at least where more is better; 0 is no limit
	en, zh      string  // label in each language
	unit        string
}

// targets is the only list of the limits that derpd must keep.
func targets() []target {
	relay := func(size, burst, rate int) string {
		return load{size: size, pairs: 8, burst: burst, rate: rate}.name()
	}
	return []target{
		{relay(1280, 1, 0), cpuPerPacket, 0.36, "CPU, a million packets of 1280 bytes", "CPU 时间，每百万个 1280 字节的数据包", "s"},
		{relay(1280, 8, 0), cpuPerPacket, 0.36, "CPU, 1280 bytes, bursts of 8", "CPU 时间，1280 字节，每批 8 个", "s"},
		{relay(64, 1, 0), cpuPerPacket, 0.80, "CPU, 64 bytes", "CPU 时间，64 字节", "s"},
		{relay(1280, 1, 0), packetRate, 2.8, "packets/s, 1280 bytes", "每秒数据包，1280 字节", "/s"},
		{relay(1280, 1, fixedRate), cpuPerPacket, 0.75, "CPU, a million packets at 10,000 packets/s", "CPU 时间，每秒 10,000 个时每百万个数据包", "s"},
		{connectName, cpuPerConnect, 1.02, "CPU, a client that connects", "CPU 时间，每个接入的客户端", "ms"},
		{idleName(10000), memoryPerClient, 1.03, "memory, an idle client (of 10,000)", "内存，每个空闲客户端（共 10,000 个）", "KiB"},
		{stunName(1), answersPer, 1.5, "STUN answers per CPU s, one at a time", "每 CPU 秒的 STUN 应答，逐个请求", "/s"},
		{stunName(stunBurst), answersPer, 0, "STUN answers per CPU s, 16 clients at once", "每 CPU 秒的 STUN 应答，16 个客户端同时请求", "/s"},
		{startName, startDERP, 1.15, "start to the first client", "从启动到第一个客户端接入", "ms"},
	}
}

// verdict is the result for one target.
type verdict struct {
	What    string  `json:"what"`
	Ratio   spread  `json:"ratio"`
	Wanted  string  `json:"wanted"`
	Reached bool    `json:"reached"`
	target  target  // the target itself
	derper  float64 // median
	derpd   float64 // median
}

// verdicts returns a verdict for each measured target. It compares the median of the
// ratios, rounded as in the report.
func verdicts(r *report) []verdict {
	var list []verdict
	for _, t := range targets() {
		found := r.find(t.measurement, t.metric)
		if found == nil || found.Ratio == nil {
			continue
		}
		v := verdict{What: string(t.metric) + "; " + t.measurement, Ratio: *found.Ratio, target: t}
		v.derper, v.derpd = spreadOf(found.Derper).Median, spreadOf(found.Derpd).Median
		switch ratio := shown(v.Ratio.Median); {
		case t.limit == 0:
			v.Wanted, v.Reached = "as measured", true
		case moreIsBetter(t.metric):
			v.Wanted, v.Reached = fmt.Sprintf("at least %.2f", t.limit), ratio >= t.limit
		default:
			v.Wanted, v.Reached = fmt.Sprintf("at most %.2f", t.limit), ratio <= t.limit
		}
		list = append(list, v)
	}
	return list
}

// shown rounds a ratio as [spread.String] does.
func shown(ratio float64) float64 { return math.Round(ratio*100) / 100 }

// better returns how many times as good as derper derpd is at a ratio.
func (v verdict) better(ratio float64) float64 {
	if moreIsBetter(v.target.metric) || ratio == 0 {
		return ratio
	}
	return 1 / ratio
}
