//go:build linux

package main

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

// connected is the status of a tailscaled that has its network map.
const connected = `{"Version":"1.102.5","BackendState":"Running","Self":{"InNetworkMap":true,"Online":true}}`

// tailscaledSocket is the name of the socket in the directory of a row.
const tailscaledSocket = "tailscaled.sock"

// tailscaled serves the source on a socket, as a tailscaled that knows its members. It
// returns the socket's path. Only the status takes the delay of the source.
func (l *lab) tailscaled(ctx context.Context, s *source) (socket string, err error) {
	socket = filepath.Join(l.Dir, tailscaledSocket)
	listener, err := new(net.ListenConfig).Listen(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: http.HandlerFunc(s.serveLocalAPI), ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	l.onClose(func() { _ = server.Close() })
	return socket, nil
}

func (s *source) serveLocalAPI(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	var node key.NodePublic
	switch {
	case r.URL.Path == "/localapi/v0/status":
		s.mu.Lock()
		delay := s.delay
		s.mu.Unlock()
		if testrelay.Wait(r.Context(), delay) == nil {
			_, _ = w.Write([]byte(connected))
		}
	case r.URL.Path != "/localapi/v0/whois", node.UnmarshalText([]byte(r.FormValue("addr"))) != nil:
		http.Error(w, "invalid 'addr' parameter", http.StatusBadRequest)
	case !s.askedAbout(node):
		http.Error(w, "no match for IP:port", http.StatusNotFound)
	default:
		_, _ = w.Write([]byte(`{"Node":{"ID":1},"UserProfile":{"ID":1}}`))
	}
}

// askedAbout notes a question, and answers it.
func (s *source) askedAbout(node key.NodePublic) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.questions = append(s.questions, question{time.Now(), node, s.members[node]})
	return s.open || s.members[node]
}
