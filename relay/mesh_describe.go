package relay

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"derpd/relay/derpmap"
)

const (
	// meshPath serves the description of this node for the maps of the other
	// nodes. Requests without a token of the mesh key get the home page.
	meshPath        = "/derp/mesh"
	meshTokenHeader = "Derpd-Mesh"
	meshNodeType    = "application/vnd.derpd.node+json"

	// describeTimeout is short, since a person waits for the map.
	describeTimeout = 2 * time.Second

	// longestDescription is far above the length of a node in JSON.
	longestDescription = 64 << 10
)

var errNoDescription = errors.New("the node returned no description: it has another mesh key, or is no derpd")

// serveNode serves the description to nodes of the mesh. All other requests go
// to next.
func (m *Mesh) serveNode(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !provesKey(m.config.Key, r.Header.Values(meshTokenHeader)) {
			next.ServeHTTP(w, r)
			return
		}
		node, err := m.config.Describe(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", meshNodeType)
		_ = json.NewEncoder(w).Encode(node)
	})
}

// Description is the description of another node.
type Description struct {
	Node derpmap.Node // latest one; empty before the first
	From string       // the node's entry in the configuration
	Err  error        // failure of this request
}

// Descriptions requests the descriptions of the other nodes. For a failed node,
// Descriptions returns its latest description and the error.
func (m *Mesh) Descriptions(ctx context.Context) []Description {
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	list := make([]Description, len(m.peers))
	var all sync.WaitGroup
	for i, p := range m.peers {
		all.Go(func() {
			node, err := m.describe(ctx, p)
			p.mu.Lock()
			defer p.mu.Unlock()
			if err == nil {
				p.described = node
			}
			list[i] = Description{Node: p.described, From: p.String(), Err: err}
		})
	}
	all.Wait()
	return list
}

func (m *Mesh) describe(ctx context.Context, p *meshPeer) (node derpmap.Node, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.hostPort()+meshPath, http.NoBody)
	if err != nil {
		return node, err
	}
	req.Header.Set(meshTokenHeader, meshToken(m.config.Key))
	transport := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return p.dial(ctx, m.config.Roots)
		},
		DisableKeepAlives: true,
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return node, err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != meshNodeType {
		return node, errNoDescription
	}
	err = json.NewDecoder(io.LimitReader(res.Body, longestDescription)).Decode(&node)
	if err == nil && node.HostName == "" {
		err = errNoDescription
	}
	return node, err
}
