//go:build linux

package main

import "fmt"

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
		{relay(1280, 1, 0), cpuPerPacket, 0.70, 0, "CPU for a million packets of 1280 bytes", "每百万个 1280 字节数据包的 CPU 时间", "s"},
		{relay(1280, 8, 0), cpuPerPacket, 0.45, 0, "the same, in bursts of 8", "同上,每 8 个一批", "s"},
		{relay(8192, 1, 0), cpuPerPacket, 0.85, 0, "the same, 8192 bytes", "同上,8192 字节", "s"},
		{relay(64, 1, 0), cpuPerPacket, notWorse, 0, "the same, 64 bytes", "同上,64 字节", "s"},
		{relay(1280, 1, 0), packetRate, 1.2, 0, "packets per second, 1280 bytes", "每秒数据包数,1280 字节", "/s"},
		{relay(1280, 8, 0), packetRate, 1.9, 0, "the same, in bursts of 8", "同上,每 8 个一批", "/s"},
		{relay(1280, 1, fixedRate), delayP99, notWorse, 0, "p99 latency at 10,000 packets per second", "每秒 10,000 个数据包时的 p99 延迟", "ms"},
		{relay(1280, 1, fixedRate), cpuPerPacket, notWorse, 0, "CPU for a million packets at that rate", "此速率下每百万个数据包的 CPU 时间", "s"},
		{connectName, cpuPerConnect, 0.92, 0, "CPU for a client that connects", "每个客户端连接的 CPU 时间", "ms"},
		{idleName(10000), memoryPerClient, notWorse, 0, "memory for an idle client, of 10,000", "每个空闲客户端的内存(共 10,000 个)", "KiB"},
		{stunName(stunBurst), answersPer, 3, 0, "STUN answers per CPU second, bursts of 16", "每 CPU 秒的 STUN 应答数,每 16 个一批", "/s"},
		{stunName(1), answersPer, 1.2, 0, "the same, one at a time", "同上,逐个请求", "/s"},
		{stunName(stunBurst), answerRate, 2.2, 0, "STUN answers per second, bursts of 16", "每秒 STUN 应答数,每 16 个一批", "/s"},
		{startName, startDERP, notWorse, 500, "from the start to the first client", "从启动到第一个客户端接入", "ms"},
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
		switch more := moreIsBetter(t.metric); {
		case t.limit == notWorse && more:
			v.Wanted, v.Reached = "not less", v.Ratio.Max >= 1
		case t.limit == notWorse:
			v.Wanted, v.Reached = "not more", v.Ratio.Min <= 1
		case more:
			v.Wanted, v.Reached = fmt.Sprintf("at least %.2f", t.limit), v.Ratio.Median >= t.limit
		default:
			v.Wanted, v.Reached = fmt.Sprintf("at most %.2f", t.limit), v.Ratio.Median <= t.limit
		}
		if t.most > 0 {
			v.Wanted += fmt.Sprintf(", and at most %.0f %s", t.most, t.unit)
			v.Reached = v.Reached && v.derpd <= t.most
		}
		list = append(list, v)
	}
	return list
}

// better is how many times as good as derper's derpd's value is.
func (v verdict) better(ratio float64) float64 {
	if moreIsBetter(v.target.metric) || ratio == 0 {
		return ratio
	}
	return 1 / ratio
}
