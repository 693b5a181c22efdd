package config

import (
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"derpd/relay/admit"
)

func init() {
	registerSource(sourceKind{name: "tailscaled", closes: "DERP_VERIFY_CLIENTS=true", env: func() sourceEnv { return new(TailscaledEnv) }})
}

// TailscaledEnv are the tailscaled to ask.
type TailscaledEnv struct {
	Verify  string `envconfig:"DERP_VERIFY_CLIENTS" default:"auto" desc:"auto: use the tailscaled socket if it exists; true: require it, and refuse new clients while it does not answer; false: do not use it" zh:"auto：tailscaled 的 socket 存在就用；true：必须用 socket，它不回答时拒绝新客户端；false：不用 socket"`
	Sockets string `envconfig:"DERP_TAILSCALED_SOCKET" default:"/var/run/tailscale/tailscaled.sock" desc:"absolute paths of tailscaled sockets, one for each tailnet, comma-separated" zh:"tailscaled 的 socket 的绝对路径，每个 tailnet 一个，逗号分隔"`
}

// parse returns the sockets. auto leaves out those that do not exist.
func (env *TailscaledEnv) parse(p *problems, shared sharedByAll) parsedSources {
	sockets := p.list("DERP_TAILSCALED_SOCKET", env.Sockets)
	for i, socket := range sockets {
		sockets[i] = p.path("DERP_TAILSCALED_SOCKET", socket)
	}
	verify := strings.ToLower(env.Verify)
	use, err := strconv.ParseBool(verify)
	switch {
	case verify == "auto":
		sockets = slices.DeleteFunc(sockets, func(socket string) bool { return !isSocket(socket) })
	case err != nil:
		p.add("DERP_VERIFY_CLIENTS", "want auto, true or false, got %q", env.Verify)
		return parsedSources{}
	case !use:
		return parsedSources{open: true}
	}
	var parsed parsedSources
	for _, socket := range sockets {
		parsed.list = append(parsed.list, Source{
			Name:     "tailscaled",
			Variable: "DERP_TAILSCALED_SOCKET",
			Target:   socket,
			New:      opened(admit.Tailscaled(socket, shared.grace)),
		})
	}
	return parsed
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}
