package relay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	"tailscale.com/derp"
	"tailscale.com/net/tsaddr"
)

// port is what connections of a listener begin with, after a PROXY header.
type port int

const (
	tlsPort   port = iota // TLS
	relayPort             // HTTP to the relay, from a proxy that ends TLS
	plainPort             // HTTP of [Relay.ServePlain]
)

// arrived inspects the first bytes of a connection. It changes nothing about the
// connection. The bytes may end anywhere.
func (r *Relay) arrived(at port, first []byte, peer net.Addr) {
	if payload, ok := cutProxyHeader(first); ok {
		r.arrivedProxied(payload, peer)
	} else if !r.config.ProxyProtocol {
		r.arrivedWith(at, first, peer)
	}
}

// arrivedProxied inspects a connection that begins with a PROXY header. Evidence of
// a misdirected client is a peer in a private network, or a client's payload, or a
// peer that sends headers for minutes.
func (r *Relay) arrivedProxied(payload []byte, peer net.Addr) {
	kind, addr := UnexpectedProxyHeader, peerAddr(peer)
	if r.config.ProxyProtocol {
		if contains(r.config.TrustedProxies, addr) {
			return
		}
		kind = UntrustedProxyHeader
	}
	client := isPrivate(addr)
	if name, ok := serverName(payload); ok {
		client = client || r.names.dialed(name)
	} else if request, ok := parseRequest(payload); ok {
		client = client || isDERP(request)
	}
	r.misdirected.note(kind, client, peer.String())
}

// arrivedWith inspects the bytes after the PROXY header, if there was one.
// Evidence of a client is one of the names of this relay in the TLS handshake, or
// its request to /derp.
func (r *Relay) arrivedWith(at port, first []byte, peer net.Addr) {
	isTLS := len(first) > 0 && first[0] == recordTypeHandshake
	if at == tlsPort {
		// A handshake is no request, and its parsing would take 4 KiB for each connection.
		if isTLS {
			return
		}
		if request, ok := parseRequest(first); ok {
			r.misdirected.note(PlainOnTLSPort, isDERP(request), peer.String())
		}
		return
	}
	if !isTLS {
		return
	}
	name, ok := serverName(first)
	// Scanners try TLS without a name on every port. Clients without a name are
	// expected on the relay's own port alone.
	client := ok && r.names.dialed(name) && (name != "" || at == relayPort)
	r.misdirected.note(TLSOnPlainPort, client, peer.String())
}

// isDERP reports whether a DERP client has sent the request. A proxy may have
// removed Upgrade. derphttp sends the User-Agent of package http and no Accept;
// browsers name the protocol of their WebSocket.
func isDERP(r *http.Request) bool {
	if r.URL.Path != "/derp" || r.Method != http.MethodGet {
		return false
	}
	return r.Header.Get(derp.FastStartHeader) != "" || r.Header.Get(derp.IdealNodeHeader) != "" ||
		strings.EqualFold(r.Header.Get("Upgrade"), "derp") ||
		strings.Contains(r.Header.Get("Sec-Websocket-Protocol"), "derp") ||
		strings.HasPrefix(r.Header.Get("User-Agent"), "Go-http-client/") && r.Header.Get("Accept") == ""
}

// isProxied reports whether there is a sign of a proxy between client and relay.
// Clients always use TLS and HTTP/1.1, so a request without TLS, or of HTTP/1.0 as
// nginx sends by default, has passed a proxy.
func isProxied(r *http.Request) bool {
	if r.TLS == nil || !r.ProtoAtLeast(1, 1) {
		return true
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && isPrivate(peer.Addr()) ||
		slices.ContainsFunc([]string{"X-Forwarded-For", "Forwarded", "Via", "Cf-Ray"}, func(field string) bool { return r.Header.Get(field) != "" })
}

// isPrivate reports whether addr is an address of this machine or of a private
// network.
func isPrivate(addr netip.Addr) bool {
	addr = addr.Unmap()
	return addr.IsLoopback() || addr.IsPrivate() || addr.IsLinkLocalUnicast() || tsaddr.CGNATRange().Contains(addr)
}

func peerAddr(peer net.Addr) netip.Addr {
	ap, _ := netip.ParseAddrPort(peer.String()) // the zero value on error
	return ap.Addr()
}

// parseRequest reads an HTTP request without a body.
func parseRequest(first []byte) (*http.Request, bool) {
	request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(first)))
	return request, err == nil
}

// recordTypeHandshake is the first byte of a TLS connection (RFC 8446 §5.1).
const recordTypeHandshake = 22

// serverName returns the server name in a ClientHello (RFC 6066 §3), or "" if the
// client sends none. It is not ok without a ClientHello, and when the bytes end
// before the answer.
func serverName(first []byte) (name string, ok bool) {
	const recordHeader, handshakeHeader, version, random, extensionsLength = 5, 4, 2, 32, 2
	if len(first) < recordHeader || first[0] != recordTypeHandshake {
		return "", false
	}
	whole := len(first)-recordHeader >= int(binary.BigEndian.Uint16(first[recordHeader-2:]))
	s := cryptobyte.String(first)
	var session, suites, compression cryptobyte.String
	if !s.Skip(recordHeader+handshakeHeader+version+random) || !s.ReadUint8LengthPrefixed(&session) ||
		!s.ReadUint16LengthPrefixed(&suites) || !s.ReadUint8LengthPrefixed(&compression) || !s.Skip(extensionsLength) {
		return "", false
	}
	for {
		var kind, listLength uint16
		var nameType uint8
		var extension, host cryptobyte.String
		if !s.ReadUint16(&kind) || !s.ReadUint16LengthPrefixed(&extension) {
			return "", whole
		}
		if kind == 0 { // server_name, with one name of type host_name
			ok := extension.ReadUint16(&listLength) && extension.ReadUint8(&nameType) && nameType == 0 && extension.ReadUint16LengthPrefixed(&host)
			return string(host), ok
		}
	}
}

// cutProxyHeader returns the bytes after a PROXY header (HAProxy's
// doc/proxy-protocol.txt §2). It does not validate the header.
func cutProxyHeader(first []byte) (after []byte, found bool) {
	if bytes.HasPrefix(first, []byte("PROXY ")) {
		_, after, _ = bytes.Cut(first, []byte("\r\n"))
		return after, true
	}
	const header = 16 // signature, version, family, and the length of the rest
	if !bytes.HasPrefix(first, []byte("\r\n\r\n\x00\r\nQUIT\n")) {
		return nil, false
	}
	if len(first) < header {
		return nil, true
	}
	length := int(binary.BigEndian.Uint16(first[header-2:]))
	return first[min(header+length, len(first)):], true
}
