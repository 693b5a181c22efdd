package config

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ListenEnv are the listeners.
type ListenEnv struct {
	Addr       string `envconfig:"DERP_ADDR" default:":443" desc:"HTTPS listen address, host:port" zh:"HTTPS 监听地址，host:port"`
	HTTPPort   string `envconfig:"DERP_HTTP_PORT" desc:"plain HTTP port, for the captive portal check and ACME's HTTP-01; -1 is off" zh:"明文 HTTP 端口，用于强制门户检测和 ACME HTTP-01；-1 为关闭" or:"80; -1 when DERP_CERT_MODE is off" zhor:"80；DERP_CERT_MODE 为 off 时是 -1"`
	STUN       string `envconfig:"DERP_STUN" default:"true" desc:"whether to answer STUN" zh:"是否提供 STUN"`
	STUNPort   string `envconfig:"DERP_STUN_PORT" default:"3478" desc:"STUN port, UDP" zh:"STUN 的 UDP 端口"`
	STUNAddr   string `envconfig:"DERP_STUN_ADDR" desc:"host or address that STUN listens on (fly-global-services on Fly.io)" zh:"STUN 监听的主机名或地址（Fly.io 上是 fly-global-services）" or:"the host of DERP_ADDR" zhor:"DERP_ADDR 的主机部分"`
	Health     string `envconfig:"DERP_HEALTH_ADDR" desc:"listen address for a platform's health check: GET /readyz answers ready or not ready, and nothing else is there" zh:"供平台健康检查询问 GET /readyz 的监听地址：只回答就绪或未就绪" or:"none; on Fly.io :8081, on Railway :PORT" zhor:"无；Fly.io 上是 :8081，Railway 上是 :PORT"`
	Admin      string `envconfig:"DERP_ADMIN_ADDR" default:"127.0.0.1:9090" desc:"listen address for health, metrics and the map; never on the public listener" zh:"健康检查、指标和 DERPMap 的监听地址；不会出现在公网端口上"`
	Congestion string `envconfig:"DERP_TCP_CONGESTION" desc:"congestion control of clients' connections, such as bbr; the kernel must have it" zh:"客户端连接使用的 TCP 拥塞控制算法，例如 bbr；内核必须支持" or:"the kernel's" zhor:"内核的默认值"`
	Unsent     string `envconfig:"DERP_TCP_UNSENT" default:"16384" desc:"bytes for a client that may wait unsent in the kernel; a small number keeps the latency of a slow client low while it downloads; 0 is no limit" zh:"每个客户端在内核中等待发送的最大字节数；值小时，慢速客户端在下载时延迟仍然低；0 表示不限"`
}

// Listen are the addresses to listen on, host:port.
type Listen struct {
	HTTPS  string
	HTTP   string // empty when off
	STUN   string // UDP; empty when off
	Admin  string
	Health string // empty when off

	TCP TCP // of clients' connections
}

// TCP are options of TCP connections.
type TCP struct {
	Congestion string // congestion control; empty for the kernel's
	Unsent     int    // bytes that may wait unsent in the kernel; 0 is no limit
}

// parseListen parses the addresses. If TLS is off, the plain HTTP listener is off
// by default: the program that terminates TLS has port 80 too.
func parseListen(p *problems, env ListenEnv, tlsOff bool) Listen {
	l := Listen{
		HTTPS: p.hostPort("DERP_ADDR", env.Addr),
		Admin: p.hostPort("DERP_ADMIN_ADDR", env.Admin),
		TCP:   TCP{parseCongestion(p, env.Congestion), parseUnsent(p, env.Unsent)},
	}
	if env.Health != "" {
		l.Health = p.hostPort("DERP_HEALTH_ADDR", env.Health)
	}
	host, _, _ := net.SplitHostPort(l.HTTPS)
	httpPort := env.HTTPPort
	if httpPort == "" {
		httpPort = "80"
		if tlsOff {
			httpPort = "-1"
		}
	}
	if n, ok := p.port("DERP_HTTP_PORT", httpPort, -1); ok && n != -1 {
		l.HTTP = net.JoinHostPort(host, strconv.Itoa(n))
	}
	if p.boolean("DERP_STUN", env.STUN) {
		l.STUN = parseSTUN(p, env, host)
	}
	refuseSamePort(p, l)
	return l
}

// parseSTUN returns the address of the STUN server, by default on the same host
// as the HTTPS listener.
func parseSTUN(p *problems, env ListenEnv, host string) string {
	if env.STUNAddr != "" {
		host = strings.Trim(env.STUNAddr, "[]")
		if _, err := netip.ParseAddr(host); err != nil && !isHostName(host) {
			p.add("DERP_STUN_ADDR", "want a host name or an address, without port, got %q; the port goes into DERP_STUN_PORT", env.STUNAddr)
		}
	}
	n, ok := p.port("DERP_STUN_PORT", env.STUNPort, 0)
	if !ok {
		return ""
	}
	return net.JoinHostPort(host, strconv.Itoa(n))
}

// refuseSamePort refuses two TCP listeners on one port. Port 0 is any free port.
func refuseSamePort(p *problems, l Listen) {
	listeners := []struct{ name, addr string }{
		{"DERP_ADDR", l.HTTPS},
		{"DERP_HTTP_PORT", l.HTTP},
		{"DERP_ADMIN_ADDR", l.Admin},
		{"DERP_HEALTH_ADDR", l.Health},
	}
	for i, later := range listeners {
		for _, earlier := range listeners[:i] {
			if port := PortOf(later.addr); port != 0 && port == PortOf(earlier.addr) {
				p.add(later.name, "port %d is taken by %s; choose another port", port, earlier.name)
			}
		}
	}
}

// congestionControls lists what the kernel has loaded. Only root may load others.
const congestionControls = "/proc/sys/net/ipv4/tcp_available_congestion_control"

func parseCongestion(p *problems, name string) string {
	if name == "" {
		return ""
	}
	data, err := os.ReadFile(congestionControls)
	if err != nil {
		p.add("DERP_TCP_CONGESTION", "%w", err)
		return name
	}
	if available := strings.Fields(string(data)); !slices.Contains(available, name) {
		p.add("DERP_TCP_CONGESTION", "want one that the kernel has loaded (%s), got %q; on the host: modprobe tcp_%s",
			strings.Join(available, ", "), name, name)
	}
	return name
}

// leastUnsent is the smallest limit. A smaller one would cost a system call for each
// segment.
const leastUnsent = 4 << 10

func parseUnsent(p *problems, value string) int {
	n, err := strconv.ParseInt(value, 10, 32)
	if err != nil || n != 0 && n < leastUnsent {
		p.add("DERP_TCP_UNSENT", "want a number of bytes from %d, such as 16384, or 0 for no limit, got %q", leastUnsent, value)
		return 0
	}
	return int(n)
}
