package node

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"

	"github.com/pires/go-proxyproto"

	"derpd/internal/testkit"
)

// serving is the configuration of a TLS server with a chain.
func serving(chain ...*tls.Certificate) *tls.Config {
	served := *chain[0]
	served.Certificate = nil
	for _, c := range chain {
		served.Certificate = append(served.Certificate, c.Certificate[0])
	}
	return &tls.Config{Certificates: []tls.Certificate{served}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
}

// proxy listens on the public port. With a chain it ends TLS. The relay's own
// connections do not pass it.
func (w *world) proxy(serve func(ln net.Listener, n *Node), chain ...*tls.Certificate) {
	w.Helper()
	ln, err := new(net.ListenConfig).Listen(w.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		w.Fatal(err)
	}
	w.set(fmt.Sprintf("DERP_PUBLIC_PORT=%d", port(ln.Addr())))
	if len(chain) > 0 {
		ln = tls.NewListener(ln, serving(chain...))
	}
	var running sync.WaitGroup
	w.Cleanup(running.Wait)
	w.Cleanup(func() { _ = ln.Close() })
	w.bound = func(n *Node) { running.Go(func() { serve(ln, n) }) }
}

// forward passes the bytes of each connection to an address of the relay, after what
// before writes.
func (w *world) forward(to func(*Node) net.Addr, before func(relay net.Conn) error) func(net.Listener, *Node) {
	return func(ln net.Listener, n *Node) {
		var running sync.WaitGroup
		defer running.Wait()
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() { w.forwardOne(conn, to(n).String(), before) })
		}
	}
}

// forwardOne copies both ways until one side ends.
func (w *world) forwardOne(conn net.Conn, addr string, before func(net.Conn) error) {
	defer func() { _ = conn.Close() }()
	relay, err := new(net.Dialer).DialContext(w.Context(), "tcp", addr)
	if err != nil {
		return
	}
	defer func() { _ = relay.Close() }()
	if before != nil && before(relay) != nil {
		return
	}
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

func toHTTPS(n *Node) net.Addr { return n.listeners.https.Addr() }
func toHTTP(n *Node) net.Addr  { return n.listeners.http.Addr() }

// named writes a PROXY header.
func named(relay net.Conn) error {
	client := &net.TCPAddr{IP: net.IP{198, 51, 100, 1}, Port: 4000}
	_, err := proxyproto.HeaderProxyFromAddrs(2, client, relay.RemoteAddr()).WriteTo(relay)
	return err
}

// withoutUpgrade is a proxy of HTTP that drops Upgrade.
func (w *world) withoutUpgrade(ln net.Listener, n *Node) {
	relay := &url.URL{Scheme: "http", Host: n.listeners.https.Addr().String()}
	transport := &http.Transport{DisableKeepAlives: true}
	server := &http.Server{
		ReadHeaderTimeout: testkit.Patience,
		Handler: &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(relay)
			r.Out.Header.Del("Upgrade")
			r.Out.Header.Del("Connection")
		}},
	}
	w.Cleanup(func() { _ = server.Close() })
	_ = server.Serve(ln)
}

// proxyRows are about what stands in front of the relay.
func proxyRows() []situation {
	// A fault in front of the relay is a warning, since strangers cause it as well.
	broken := func(name, reason, fix string, begin func(*world)) situation {
		return situation{name: name, begin: begin, client: anyError, health: "(" + reason + ", the last one ", log: fix, lacks: fix}
	}
	return []situation{
		{
			name: "TLS ends in front",
			begin: func(w *world) {
				w.set("DERP_CERT_MODE=off")
				w.proxy(w.forward(toHTTPS, nil), w.chain(publicRoot)...)
			},
			note: "what ends it must have a certificate for derp.example.com",
		},
		{
			name: "TLS passes a proxy",
			begin: func(w *world) {
				w.pinned()
				w.proxy(w.forward(toHTTPS, nil))
			},
		},
		{
			name: "PROXY headers of a trusted proxy",
			begin: func(w *world) {
				w.pinned()
				w.set("DERP_PROXY_PROTOCOL=true", "DERP_TRUSTED_PROXIES=127.0.0.1")
				w.proxy(w.forward(toHTTPS, named))
			},
		},
		{
			name: "PROXY headers are allowed, and not sent",
			begin: func(w *world) {
				w.pinned()
				w.set("DERP_PROXY_PROTOCOL=true", "DERP_TRUSTED_PROXIES=127.0.0.1")
				w.proxy(w.forward(toHTTPS, nil))
			},
		},
		broken("PROXY headers of a proxy that is not trusted", "untrusted-proxy-header", "sends PROXY headers from an address that is not in DERP_TRUSTED_PROXIES", func(w *world) {
			w.pinned()
			w.set("DERP_PROXY_PROTOCOL=true", "DERP_TRUSTED_PROXIES=10.0.0.1")
			w.proxy(w.forward(toHTTPS, named))
		}),
		broken("PROXY headers that are not expected", "unexpected-proxy-header", "set DERP_PROXY_PROTOCOL=true", func(w *world) {
			w.pinned()
			w.proxy(w.forward(toHTTPS, named))
		}),
		broken("a proxy that drops Upgrade", "no-upgrade", "Websockets Support", func(w *world) {
			w.set("DERP_CERT_MODE=off")
			w.proxy(w.withoutUpgrade, w.chain(publicRoot)...)
		}),
		broken("a proxy that sends plain HTTP to TLS", "plain-on-tls-port", "set DERP_CERT_MODE=off", func(w *world) {
			chain := w.chain(publicRoot)
			w.manual(chain...)
			w.proxy(w.forward(toHTTPS, nil), chain...)
		}),
		broken("a proxy that sends clients to the plain port", "derp-on-plain-port", "let the proxy send them to DERP_ADDR", func(w *world) {
			chain := w.chain(publicRoot)
			w.manual(chain...)
			w.proxy(w.forward(toHTTP, nil), chain...)
		}),
		broken("a proxy that passes TLS to the plain port", "tls-on-plain-port", "remove DERP_CERT_MODE=off", func(w *world) {
			w.set("DERP_CERT_MODE=off")
			w.proxy(w.forward(toHTTPS, nil))
		}),
		broken("a port mapping from 443 to the plain port", "tls-on-plain-port", "check that the published port 443 leads to DERP_ADDR", func(w *world) {
			w.manual(w.chain(publicRoot)...)
			w.proxy(w.forward(toHTTP, nil))
		}),
	}
}
