package admit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/types/key"
)

// Tailscaled admits the nodes that the tailscaled behind the unix socket knows
// (derper's --verify-clients). The socket may appear later: until then nobody
// is admitted by it.
func Tailscaled(socket string) Source {
	client := &local.Client{Socket: socket, UseSocketOnly: true}
	return Source{
		Name: "tailscaled " + socket,
		Ask: func(ctx context.Context, node key.NodePublic, _ netip.Addr) (time.Time, error) {
			_, err := client.WhoIsNodeKey(ctx, node)
			switch {
			case err == nil:
				return time.Now(), nil
			case errors.Is(err, local.ErrPeerNotFound):
				return time.Now(), ErrRefused
			case strings.Contains(err.Error(), "invalid 'addr' parameter"):
				// tailscale/tailscale#12617
				return time.Time{}, errors.New("tailscaled is too old to be asked about node keys; update it")
			}
			return time.Time{}, fmt.Errorf("asking tailscaled: %w", err)
		},
	}
}
