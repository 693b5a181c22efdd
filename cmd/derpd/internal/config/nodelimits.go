package config

import (
	"derpd/cmd/derpd/internal/nodelimits"
	"derpd/relay"
)

// NodeLimitsEnv are the limits of one node.
type NodeLimitsEnv struct {
	ClientRate  string `envconfig:"DERP_CLIENT_RATE" desc:"the rate at which a node may send through this relay, on all its connections together, in bits per second: 20Mbit, 512kbit, 1.5Gbit; at least 128kbit. DERP frames count, without TLS. A node that sends more is slowed down, and stays connected" zh:"单个节点（所有连接合计）通过本中继发送的速率，单位 bit/s：20Mbit、512kbit、1.5Gbit，最低 128kbit；按 DERP 帧计算，不含 TLS；超过时只会变慢，不会断开" or:"no limit" zhor:"不限"`
	ClientBurst string `envconfig:"DERP_CLIENT_BURST" desc:"what a node may send at once after a pause, in bytes: 256KiB, 1MiB. If packets get lost at the start of transfers, less may help: a receiver may not keep up with a burst" zh:"节点停顿之后可以一次性发送的数据量，单位字节：256KiB、1MiB；如果传输开始时丢包，可以调小：接收方可能跟不上突发" or:"250 ms of the rate, at least 64KiB" zhor:"速率乘以 250 毫秒，至少 64KiB"`
	LimitsFile  string `envconfig:"DERP_LIMITS_FILE" desc:"absolute path of a file with other limits for some nodes, read again when it changes. Each line is who and what, such as tag:guest rate=2Mbit connections=2; see docker/limits.example" zh:"为部分节点另设限制的文件（绝对路径），改动后自动重读；每行先写节点再写限制，例如 tag:guest rate=2Mbit connections=2；见 docker/limits.example" or:"none" zhor:"无"`
	MaxPerNode  string `envconfig:"DERP_MAX_PER_NODE" default:"16" desc:"connections of one node key; with one more, the oldest is closed, mostly one of a network that the node has left. off is no limit" zh:"同一节点公钥的连接数上限；超过时关闭最旧的一个（多半属于节点已经离开的网络）；off 表示不限制"`
}

// NodeLimits are the limits of nodes.
type NodeLimits struct {
	Defaults relay.NodeLimit
	File     string // of other limits; may be empty
}

// May reports whether a node may have a rate.
func (r NodeLimits) May() bool { return r.Defaults.Rate > 0 || r.File != "" }

// parseNodeLimits returns the limits, and warnings about lines of the file that fit no
// node of the sources.
func parseNodeLimits(p *problems, e *environment, sources []Source) (r NodeLimits, warnings []string) {
	var rate, burst, connections error
	r.Defaults, rate, burst, connections = nodelimits.Defaults(e.ClientRate, e.ClientBurst, e.MaxPerNode)
	if rate != nil {
		p.add("DERP_CLIENT_RATE", "%w", rate)
	}
	if burst != nil {
		p.add("DERP_CLIENT_BURST", "%w", burst)
	}
	if connections != nil {
		p.add("DERP_MAX_PER_NODE", "%w", connections)
	}
	r.File = p.path("DERP_LIMITS_FILE", e.LimitsFile)
	if r.File == "" || p.has("DERP_LIMITS_FILE") {
		return r, nil
	}
	rules, err := nodelimits.Load(r.File, r.Defaults)
	if err != nil {
		p.add("DERP_LIMITS_FILE", "%w%s", err, readHint(err))
		return r, nil
	}
	var known nodelimits.Known
	for _, s := range sources {
		known.Comments = known.Comments || s.Name == "keys"
		known.Tags = known.Tags || s.Name == "tailnet" || s.Name == "tailscaled"
	}
	for _, warning := range nodelimits.Useless(rules, known) {
		warnings = append(warnings, "DERP_LIMITS_FILE: "+warning)
	}
	return r, warnings
}
