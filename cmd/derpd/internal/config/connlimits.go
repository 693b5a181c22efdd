package config

import (
	"fmt"
	"strconv"

	"derpd/cmd/derpd/internal/host"
	"derpd/relay"
)

// LimitsEnv are the limits of connections.
type LimitsEnv struct {
	MaxConnections string `envconfig:"DERP_MAX_CONNECTIONS" desc:"most connections to the HTTPS and HTTP listeners together; on a closed relay, an eighth is for addresses from which an admitted node came; off is no limit" zh:"HTTPS 和 HTTP 端口的连接总数上限；中继不开放时，其中八分之一留给有节点被放行过的地址；off 表示不限制" or:"one for each 64 KiB of the container's memory limit, or else of half the machine's memory, as far as open files allow" zhor:"容器内存上限（没有时为机器内存的一半）每 64 KiB 一个，且不超过打开文件数的限制"`
	MaxStrangers   string `envconfig:"DERP_MAX_STRANGERS" desc:"most connections whose node is not admitted yet; one more closes an older one of the address that has the most; off is no limit" zh:"节点尚未被放行的连接数上限；再多一个，就关闭占用最多的地址上较旧的一个；off 表示不限制" or:"a third of DERP_MAX_CONNECTIONS" zhor:"DERP_MAX_CONNECTIONS 的三分之一"`
	MaxPerAddress  string `envconfig:"DERP_MAX_PER_ADDRESS" desc:"most connections from one IPv4 address or IPv6 /64 whose node is not admitted yet; on an open relay, all connections count; off is no limit" zh:"同一个 IPv4 地址或 IPv6 /64 网段上，节点尚未被放行的连接数上限；中继开放时计算全部连接；off 表示不限制" or:"an eighth of DERP_MAX_CONNECTIONS, at least 64" zhor:"DERP_MAX_CONNECTIONS 的八分之一，至少 64"`
	AcceptRate     string `envconfig:"DERP_ACCEPT_RATE" default:"50" desc:"most new connections a second from one IPv4 address or IPv6 /64; five times as many may come at once after a pause; off is no limit" zh:"同一个 IPv4 地址或 IPv6 /64 网段每秒新建连接数的上限；停顿之后可一次新建五倍；off 表示不限制"`
}

// Each connection takes up to connectionMemory: a client that does nothing takes 36 KiB with
// what the kernel keeps, and a WebSocket 65. The rest of the program takes ownMemory.
const (
	connectionMemory = 64 << 10
	ownMemory        = 32 << 20

	// burstSeconds is the number of seconds of the rate that an address may use at once.
	// A campus behind one address connects again at once after a restart.
	burstSeconds = 5
)

// machine is what the defaults of limits depend on.
type machine struct {
	memory      int64 // in bytes
	connections int   // that the limit of open files allows
}

func thisMachine() machine { return machine{host.Memory(), host.MaxConnections()} }

// parseLimits returns the limits, and a warning about one that the machine cannot hold.
func parseLimits(p *problems, env LimitsEnv, m machine) (l relay.Limits, warnings []string) {
	derived := int(min(max((m.memory-ownMemory)/connectionMemory, 64), int64(m.connections)))
	l.Connections = p.limit("DERP_MAX_CONNECTIONS", env.MaxConnections, "connections", 16, derived)
	if l.Connections > 0 {
		derived = l.Connections
	}
	l.Strangers = p.limit("DERP_MAX_STRANGERS", env.MaxStrangers, "connections", 4, max(derived/3, 4))
	l.PerAddress = p.limit("DERP_MAX_PER_ADDRESS", env.MaxPerAddress, "connections", 4, min(max(derived/8, 64), derived))
	l.AcceptRate = p.limit("DERP_ACCEPT_RATE", env.AcceptRate, "connections a second", 1, 0)
	l.AcceptBurst = burstSeconds * l.AcceptRate
	if l.Connections > 0 {
		p.refuseAbove("DERP_MAX_STRANGERS", env.MaxStrangers, l.Strangers, l.Connections)
		p.refuseAbove("DERP_MAX_PER_ADDRESS", env.MaxPerAddress, l.PerAddress, l.Connections)
	}
	if l.Connections > m.connections {
		warnings = append(warnings, fmt.Sprintf("DERP_MAX_CONNECTIONS is %d, but the limit of open files leaves %d connections; raise the limit of open files to %d",
			l.Connections, m.connections, host.OpenFilesFor(l.Connections)))
	}
	return l, warnings
}

// maxLimit keeps products of limits within 32 bits.
const maxLimit = 100_000_000

// limit parses a limit. It returns 0 for off, and derived for an empty value.
func (p *problems) limit(name, value, of string, lowest, derived int) int {
	switch value {
	case "":
		return derived
	case "off":
		return 0
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < lowest || n > maxLimit {
		p.add(name, "want a number of %s from %d to %d, or off for no limit, got %q", of, lowest, maxLimit, value)
	}
	return n
}

// refuseAbove refuses a limit that was given and can never be reached.
func (p *problems) refuseAbove(name, value string, limit, connections int) {
	if value != "" && limit > connections && !p.has(name) && !p.has("DERP_MAX_CONNECTIONS") {
		p.add(name, "want at most DERP_MAX_CONNECTIONS, which is %d, got %q; lower this, or raise that", connections, value)
	}
}

// formatLimit returns a limit as a value of its variable.
func formatLimit(limit int) string {
	if limit == 0 {
		return "off"
	}
	return strconv.Itoa(limit)
}
