//go:build linux

package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

// source is the admission URL of both servers. Its answers and its delay may change at
// any time.
type source struct {
	url    string
	server *http.Server

	mu        sync.Mutex
	members   map[key.NodePublic]bool // who is admitted
	open      bool                    // admits everybody
	delay     time.Duration           // before each answer
	status    int                     // of every answer; 0 is 200
	questions []question

	// workers limits the answers under way; nil is no limit. The delay is part of an
	// answer, so 8 workers with 100 ms answer 80 questions a second.
	workers chan struct{}
}

// question is one question that was asked.
type question struct {
	at     time.Time
	who    key.NodePublic
	member bool // at that time
}

// newSource starts a source on loopback, which ends with the row. It admits nobody.
// workers limits the answers under way; 0 is no limit.
func (l *lab) newSource(ctx context.Context, workers int) (*source, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &source{url: "http://" + listener.Addr().String() + "/", members: map[key.NodePublic]bool{}}
	if workers > 0 {
		s.workers = make(chan struct{}, workers)
	}
	s.server = &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.server.Serve(listener) }()
	l.onClose(s.stop)
	return s, nil
}

// stop refuses connections from now on.
func (s *source) stop() { _ = s.server.Close() }

// ServeHTTP implements [http.Handler].
func (s *source) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var asked tailcfg.DERPAdmitClientRequest
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	s.questions = append(s.questions, question{time.Now(), asked.NodePublic, s.members[asked.NodePublic]})
	s.mu.Unlock()
	if s.workers != nil {
		select {
		case s.workers <- struct{}{}:
			defer func() { <-s.workers }()
		case <-r.Context().Done():
			return
		}
	}
	s.mu.Lock()
	delay := s.delay
	s.mu.Unlock()
	if testrelay.Wait(r.Context(), delay) != nil {
		return
	}
	s.mu.Lock()
	status, allow := s.status, s.open || s.members[asked.NodePublic]
	s.mu.Unlock()
	if status != 0 {
		w.WriteHeader(status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{Allow: allow})
}

// admit makes nodes members, or ends that.
func (s *source) admit(allowed bool, nodes ...key.NodePublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, node := range nodes {
		s.members[node] = allowed
	}
}

// answer sets the delay and the HTTP status of all answers. Status 0 is 200.
func (s *source) answer(delay time.Duration, status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delay, s.status = delay, status
}

// asked returns the questions since a time, with those for members or for strangers.
func (s *source) asked(since time.Time, members bool) []question {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []question
	for _, q := range s.questions {
		if q.member == members && !q.at.Before(since) {
			list = append(list, q)
		}
	}
	return list
}

// mostPerSecond returns the highest number of questions within any second.
func mostPerSecond(questions []question) int {
	most, first := 0, 0
	for i, q := range questions {
		for q.at.Sub(questions[first].at) >= time.Second {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// setOpen admits everybody, or the members only.
func (s *source) setOpen(open bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = open
}
