package relay

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

const (
	bootstrapRefresh = 10 * time.Minute // as upstream's refreshBootstrapDNSLoop
	bootstrapTimeout = time.Minute      // for the look-ups of all names
)

// BootstrapDNS serves /bootstrap-dns (derper's --bootstrap-dns-names). Clients
// with broken DNS request the addresses of their control server there.
type BootstrapDNS struct {
	names    []string
	log      zerolog.Logger
	resolver *net.Resolver
	answer   atomic.Pointer[[]byte] // JSON object of names and addresses
}

// NewBootstrapDNS returns a handler for the given names. Its response is an
// empty object before the first look-up, and without names.
func NewBootstrapDNS(names []string, log zerolog.Logger) *BootstrapDNS {
	b := &BootstrapDNS{names: names, log: log, resolver: net.DefaultResolver}
	b.answer.Store(&[]byte{'{', '}'})
	return b
}

// Run looks up the names every ten minutes until ctx ends.
func (b *BootstrapDNS) Run(ctx context.Context) error {
	if len(b.names) == 0 {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(bootstrapRefresh)
	defer tick.Stop()
	for {
		b.refresh(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (b *BootstrapDNS) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	found := make(map[string][]net.IP, len(b.names))
	for _, name := range b.names {
		addrs, err := b.resolver.LookupIP(ctx, "ip", name)
		if err != nil {
			b.log.Warn().Err(err).Str("name", name).Msg("bootstrap DNS look-up failed")
			continue
		}
		// Clients use the first address. The resolver's order would give all
		// of them the same one.
		rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		found[name] = addrs
	}
	if len(found) == 0 {
		return // keep the previous addresses
	}
	answer, err := json.MarshalIndent(found, "", "\t")
	if err != nil {
		b.log.Error().Err(err).Msg("encoding the bootstrap DNS response failed")
		return
	}
	b.answer.Store(&answer)
}

// ServeHTTP implements [http.Handler].
func (b *BootstrapDNS) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	// A client sends one request only.
	w.Header().Set("Connection", "close")
	_, _ = w.Write(*b.answer.Load())
}
