package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// adminTimeout is longer than a round of checks may take.
const adminTimeout = 5 * time.Second

// healthcheck is the command `derpd healthcheck`, which a container without a
// shell runs as its HEALTHCHECK.
func healthcheck(ctx context.Context, args, env []string, stdout io.Writer) error {
	if len(args) > 0 {
		return noStart{fmt.Errorf("healthcheck: unexpected argument %q", args[0])}
	}
	// Not the whole configuration: what is wrong with it is the running
	// relay's to say.
	l, _ := loadEnvironment(env)
	res, err := askAdmin(ctx, l.Admin, "/readyz")
	if err != nil {
		return fmt.Errorf("no relay answers on DERP_ADMIN_ADDR %s: %w", l.Admin, err)
	}
	defer func() { _ = res.Body.Close() }()
	if _, err := io.Copy(stdout, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return errQuiet
	}
	return nil
}

// askAdmin asks the admin listener of the relay in this container. The caller
// closes the body.
func askAdmin(ctx context.Context, addr, path string) (*http.Response, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, http.NoBody)
	if err != nil {
		cancel()
		return nil, err
	}
	// A proxy from the environment has no business here.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		cancel()
		return nil, errors.Unwrap(err)
	}
	res.Body = cancelOnClose{res.Body, cancel}
	return res, nil
}

// cancelOnClose ends the request's context with its body.
type cancelOnClose struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (c cancelOnClose) Close() error {
	defer c.cancel()
	return c.ReadCloser.Close()
}
