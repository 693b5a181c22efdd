package config

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"derpd/relay/admit"
)

func init() {
	registerSource(sourceKind{name: "tailscaled", closes: "DERP_VERIFY_CLIENTS=true", env: func() sourceEnv { return new(TailscaledEnv) }})
}

// TailscaledEnv are the tailscaled to ask.
type TailscaledEnv struct {
	Verify  string `envconfig:"DERP_VERIFY_CLIENTS" default:"auto" desc:"auto: use the tailscaled socket once it exists, and close the relay from then on; true: require it, and refuse new clients while it does not answer; false: do not use it" zh:"auto：tailscaled 的 socket 一旦存在就用，中继从此不再开放；true：必须用 socket，它不回答时拒绝新客户端；false：不用 socket"`
	Sockets string `envconfig:"DERP_TAILSCALED_SOCKET" default:"/var/run/tailscale/tailscaled.sock" desc:"absolute paths of tailscaled sockets, one for each tailnet, comma-separated" zh:"tailscaled 的 socket 的绝对路径，每个 tailnet 一个，逗号分隔"`
}

// parse returns the sockets. auto leaves out those that are not there: they close the
// relay later, when one appears. Anything else in the place of a socket is an error
// with auto too: the operator meant to close the relay, and it would be open.
func (env *TailscaledEnv) parse(p *problems, shared sharedByAll) parsedSources {
	sockets := p.list("DERP_TAILSCALED_SOCKET", env.Sockets)
	for i, socket := range sockets {
		sockets[i] = p.path("DERP_TAILSCALED_SOCKET", socket)
	}
	verify := strings.ToLower(env.Verify)
	use, err := strconv.ParseBool(verify)
	auto := verify == "auto"
	switch {
	case err != nil && !auto:
		p.add("DERP_VERIFY_CLIENTS", "want auto, true or false, got %q", env.Verify)
		return parsedSources{}
	case !use && !auto:
		return parsedSources{open: true}
	}
	var parsed parsedSources
	for _, socket := range sockets {
		source := Source{
			Name:     "tailscaled",
			Variable: "DERP_TAILSCALED_SOCKET",
			Target:   socket,
			New:      opened(admit.Tailscaled(socket, shared.grace)),
		}
		switch err := admit.CheckSocket(socket); {
		case socket == "": // reported
			continue
		case auto && IsMissing(socket):
			parsed.later = append(parsed.later, source)
			continue
		case err != nil && (auto || !errors.Is(err, fs.ErrNotExist)):
			p.add("DERP_TAILSCALED_SOCKET", "%s: %w; or set DERP_VERIFY_CLIENTS=false to use no tailscaled", socket, err)
			continue
		}
		parsed.list = append(parsed.list, source)
	}
	return parsed
}

// IsMissing reports whether nothing is at a path, not even a link. An error such as
// EACCES hides what is there.
func IsMissing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}
