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
	bootstrapTimeout = time.Minute      // for one round of look-ups
)

// BootstrapDNS answers /bootstrap-dns: clients whose DNS is broken ask a relay
// for the addresses of their control server (derper's --bootstrap-dns-names).
type BootstrapDNS struct {
	names    []string
	log      zerolog.Logger
	resolver *net.Resolver
	answer   atomic.Pointer[[]byte] // JSON: name to addresses
}

// NewBootstrapDNS answers for the given names; with none, always with an empty
// object.
func NewBootstrapDNS(names []string, log zerolog.Logger) *BootstrapDNS {
	b := &BootstrapDNS{names: names, log: log, resolver: net.DefaultResolver}
	b.answer.Store(&[]byte{'{', '}'})
	return b
}

// Run looks the names up every ten minutes until ctx ends.
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
		// Clients take the first address: without a shuffle they would all
		// prefer the same family.
		rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		found[name] = addrs
	}
	if len(found) == 0 {
		return // what was found last time is better than nothing
	}
	answer, err := json.MarshalIndent(found, "", "\t")
	if err != nil {
		b.log.Error().Err(err).Msg("encoding bootstrap DNS answer failed")
		return
	}
	b.answer.Store(&answer)
}

// ServeHTTP implements [http.Handler].
func (b *BootstrapDNS) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	// Asked once, from far away: a connection kept open helps nobody.
	w.Header().Set("Connection", "close")
	_, _ = w.Write(*b.answer.Load())
}
