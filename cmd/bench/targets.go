//go:build linux

package main

import (
	"fmt"
	"math"
)

// target is what derpd has to reach, as a ratio to derper.
type target struct {
	measurement string
	metric      metric
	limit       float64 // at most, or at least where more is better
	most        float64 // of derpd's value itself; 0 is any
	en, zh      string  // what it is, for people
	unit        string
}

// notWorse is the limit of what only has to stay as it is. It is reached when
// the rounds do not agree that derpd is worse.
const notWorse = 1

func targets() []target {
	relay := func(size, burst, rate int) string {
		return load{size: size, pairs: 8, burst: burst, rate: rate}.name()
	}
	return []target{
		{relay(1280, 1, 0), cpuPerPacket, 0.70, 0, "CPU, a million packets of 1280 bytes", "CPU 时间，每百万个 1280 字节的数据包", "s"},
		{relay(1280, 8, 0), cpuPerPacket, 0.45, 0, "CPU, 1280 bytes, bursts of 8", "CPU 时间，1280 字节，每批 8 个", "s"},
		{relay(8192, 1, 0), cpuPerPacket, 0.85, 0, "CPU, 8192 bytes", "CPU 时间，8192 字节", "s"},
		{relay(64, 1, 0), cpuPerPacket, notWorse, 0, "CPU, 64 bytes", "CPU 时间，64 字节", "s"},
		{relay(1280, 1, 0), packetRate, 1.2, 0, "packets/s, 1280 bytes", "每秒数据包，1280 字节", "/s"},
		{relay(1280, 8, 0), packetRate, 1.9, 0, "packets/s, 1280 bytes, bursts of 8", "每秒数据包，1280 字节，每批 8 个", "/s"},
		{relay(1280, 1, fixedRate), delayP99, notWorse, 0, "p99 latency at 10,000 packets/s", "p99 延迟，每秒 10,000 个数据包", "ms"},
		{relay(1280, 1, fixedRate), cpuPerPacket, notWorse, 0, "CPU, a million packets at that rate", "CPU 时间，同一速率下每百万个数据包", "s"},
		{connectName, cpuPerConnect, 0.92, 0, "CPU, a client that connects", "CPU 时间，每个接入的客户端", "ms"},
		{idleName(10000), memoryPerClient, notWorse, 0, "memory, an idle client (of 10,000)", "内存，每个空闲客户端（共 10,000 个）", "KiB"},
		{stunName(stunBurst), answersPer, 3, 0, "STUN answers per CPU s, bursts of 16", "每 CPU 秒的 STUN 应答，每批 16 个", "/s"},
		{stunName(1), answersPer, 1.2, 0, "STUN answers per CPU s, one at a time", "每 CPU 秒的 STUN 应答，逐个请求", "/s"},
		{stunName(stunBurst), answerRate, 2.2, 0, "STUN answers/s, bursts of 16", "每秒 STUN 应答，每批 16 个", "/s"},
		{startName, startDERP, notWorse, 500, "start to the first client", "从启动到第一个客户端接入", "ms"},
	}
}

// verdict is whether a target is reached.
type verdict struct {
	What    string  `json:"what"`
	Ratio   spread  `json:"ratio"`
	Wanted  string  `json:"wanted"`
	Reached bool    `json:"reached"`
	target  target  // what was to be reached
	derper  float64 // medians
	derpd   float64
}

// verdicts judges every target that was measured.
func verdicts(r *report) []verdict {
	var list []verdict
	for _, t := range targets() {
		found := r.find(t.measurement, t.metric)
		if found == nil || found.Ratio == nil {
			continue
		}
		v := verdict{What: string(t.metric) + "; " + t.measurement, Ratio: *found.Ratio, target: t}
		v.derper, v.derpd = spreadOf(found.Derper).Median, spreadOf(found.Derpd).Median
		// What is shown is what counts.
		ratio := spread{shown(v.Ratio.Median), shown(v.Ratio.Min), shown(v.Ratio.Max)}
		switch more := moreIsBetter(t.metric); {
		case t.limit == notWorse && more:
			v.Wanted, v.Reached = "not less", ratio.Max >= 1
		case t.limit == notWorse:
			v.Wanted, v.Reached = "not more", ratio.Min <= 1
		case more:
			v.Wanted, v.Reached = fmt.Sprintf("at least %.2f", t.limit), ratio.Median >= t.limit
		default:
			v.Wanted, v.Reached = fmt.Sprintf("at most %.2f", t.limit), ratio.Median <= t.limit
		}
		if t.most > 0 {
			v.Wanted += fmt.Sprintf(", and at most %.0f %s", t.most, t.unit)
			v.Reached = v.Reached && v.derpd <= t.most
		}
		list = append(list, v)
	}
	return list
}

// shown rounds as [spread.String] does.
func shown(ratio float64) float64 { return math.Round(ratio*100) / 100 }

// better is how many times as good as derper's derpd's value is.
func (v verdict) better(ratio float64) float64 {
	if moreIsBetter(v.target.metric) || ratio == 0 {
		return ratio
	}
	return 1 / ratio
}
