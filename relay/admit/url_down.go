package admit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http/httptrace"
	"net/netip"
	"sync"
	"syscall"
)

// isDown reports whether the server of a URL is plainly down: it refuses connections,
// has no route, or its name does not exist. A timeout may be the fault of this relay.
func isDown(err error) bool {
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return dns.IsNotFound
	}
	return !isExhausted(err) && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH))
}

// isExhausted reports whether this host lacks descriptors or memory for a question.
func isExhausted(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// attempts are the connections that one question tried. For a name with several
// addresses, [net.Dialer] returns the error of one address only.
type attempts struct {
	mu    sync.Mutex
	host  string               // the name that was looked up; guarded by mu
	addrs map[netip.Addr]error // the last error, by address; guarded by mu
}

// trace returns ctx for a question whose connections are recorded.
func (a *attempts) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart: func(info httptrace.DNSStartInfo) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.host = info.Host
		},
		ConnectDone: func(_, addr string, err error) {
			at, _ := netip.ParseAddrPort(addr)
			a.mu.Lock()
			defer a.mu.Unlock()
			if err == nil { // before a redirect
				delete(a.addrs, at.Addr().Unmap())
				return
			}
			if a.addrs == nil {
				a.addrs = make(map[netip.Addr]error)
			}
			a.addrs[at.Addr().Unmap()] = err
		},
	})
}

// confirm returns err, which [isDown], if that is true of every address of the host.
// Otherwise it returns another error. The first lookup may lack the addresses of one
// family, because the relay had no descriptor to ask for them.
func (a *attempts) confirm(ctx context.Context, strict *net.Resolver, err error) error {
	a.mu.Lock()
	host, tried := a.host, maps.Clone(a.addrs)
	a.mu.Unlock()
	for addr, other := range tried {
		if !isDown(other) && !lacksIPv6(addr, other) {
			return fmt.Errorf("connecting to one of its addresses: %w", other)
		}
	}
	if host == "" {
		return err // no name was looked up
	}
	found := 0
	for _, family := range []string{"ip4", "ip6"} { // one failure may hide behind the other family
		addrs, failure := strict.LookupNetIP(ctx, family, host)
		if _, none := errors.AsType[*net.AddrError](failure); failure != nil && !none && !isDown(failure) {
			return fmt.Errorf("looking up its addresses again: %w", failure)
		}
		for _, addr := range addrs {
			if _, ok := tried[addr.Unmap()]; !ok {
				return fmt.Errorf("%s is another of its addresses, which was not tried", addr)
			}
		}
		found += len(addrs)
	}
	if found == 0 && len(tried) > 0 {
		return errors.New("its name has no address any longer")
	}
	return err
}

// lacksIPv6 reports whether a connection to an IPv6 address failed because this host or
// container has no IPv6. That says nothing about the server.
func lacksIPv6(addr netip.Addr, err error) bool {
	return addr.Is6() && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT))
}
