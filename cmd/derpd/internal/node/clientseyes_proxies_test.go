package node

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"derpd/internal/testkit"
	"derpd/internal/testkit/acmetest"
)

// front ends TLS on a port of its own, and passes the bytes to the relay.
func (w *world) front(chain ...*tls.Certificate) {
	w.Helper()
	served := *chain[0]
	for _, c := range chain[1:] {
		served.Certificate = append(served.Certificate, c.Certificate[0])
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{served}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}})
	if err != nil {
		w.Fatal(err)
	}
	w.set("DERP_CERT_MODE=off", fmt.Sprintf("DERP_PUBLIC_PORT=%d", port(ln.Addr())))
	var running sync.WaitGroup
	w.Cleanup(running.Wait)
	w.Cleanup(func() { _ = ln.Close() })
	w.bound = func(n *Node) {
		running.Go(func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				running.Go(func() { w.forward(conn, n.listeners.https.Addr().String()) })
			}
		})
	}
}

// forward copies both ways until one side ends.
func (w *world) forward(conn net.Conn, addr string) {
	defer func() { _ = conn.Close() }()
	relay, err := new(net.Dialer).DialContext(w.Context(), "tcp", addr)
	if err != nil {
		return
	}
	defer func() { _ = relay.Close() }()
	ended := make(chan error, 2)
	for _, way := range [][2]net.Conn{{conn, relay}, {relay, conn}} {
		go func() {
			_, err := io.Copy(way[0], way[1])
			ended <- err
		}()
	}
	first := <-ended
	_, _ = conn.Close(), relay.Close()
	if second := <-ended; errors.Is(errors.Join(first, second), io.ErrUnexpectedEOF) {
		w.Log(first, second)
	}
}

// proxyRows are about what stands in front of the relay.
func proxyRows() []situation {
	return []situation{
		{
			name:  "TLS ends in front",
			begin: func(w *world) { w.front(w.chain(publicRoot)...) },
			note:  "what ends it must have a certificate for derp.example.com",
		},
		{
			name: "PROXY headers are allowed, and not sent",
			begin: func(w *world) {
				w.pinned()
				w.set("DERP_PROXY_PROTOCOL=true", "DERP_TRUSTED_PROXIES=127.0.0.1")
			},
		},
	}
}

// acmeRows are about authorities that issue by ACME. The authorities start before the
// rows, because they set the environment of the process.
func acmeRows(t *testing.T) []situation {
	t.Helper()
	private := func() (*acmetest.CA, func(*world)) {
		ca, httpPort, tlsPort := acmetest.Start(t), testkit.FreePort(t), testkit.FreePort(t)
		ca.Validate(t, httpPort, tlsPort)
		return ca, func(w *world) {
			w.set("DERP_CERT_MODE=letsencrypt", "DERP_ACME_CA="+ca.Directory, "DERP_ACME_CA_ROOTS="+ca.RootsFile,
				fmt.Sprintf("DERP_HTTP_PORT=%d", httpPort), fmt.Sprintf("DERP_ADDR=127.0.0.1:%d", tlsPort))
		}
	}
	first, beginFirst := private()
	_, beginSecond := private()
	return []situation{
		everywhere(`clients need "Pebble Root CA `, situation{
			name: "a private ACME authority that the client knows",
			begin: func(w *world) {
				beginFirst(w)
				w.client.AddCert(first.Root())
			},
		}),
		everywhere(`clients need "Pebble Root CA `, situation{
			name: "a private ACME authority that the client does not know", begin: beginSecond,
			client: "certificate signed by unknown authority", lacks: "Pebble Root CA ",
		}),
		{
			name:   "an ACME authority that is down",
			begin:  func(w *world) { w.set("DERP_CERT_MODE=letsencrypt", "DERP_ACME_CA=https://127.0.0.1:1/dir") },
			client: "tls: ", health: "waiting for derp.example.com", log: "connection refused",
		},
	}
}
