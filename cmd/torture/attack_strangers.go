//go:build linux

package main

import (
	"context"
	"crypto/x509"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() { attackers["strangers"] = attackStrangers }

// knockAgain is the pause of a stranger between two connections.
const knockAgain = 20 * time.Millisecond

// attackStrangers lets AtOnce clients connect again and again, each time with a new key.
func attackStrangers(ctx context.Context, l load, c *counts) error {
	certificate, err := x509.ParseCertificate(l.Certificate)
	if err != nil {
		return err
	}
	to := testrelay.Target{HTTPS: l.HTTPS, Certificate: certificate}
	g, ctx := errgroup.WithContext(ctx)
	for i := range l.AtOnce {
		g.Go(func() error {
			for ctx.Err() == nil {
				client, err := testrelay.Dial(ctx, to, key.NewNode(), l.from(i))
				switch {
				case err == nil:
					c.add("admitted", 1)
					client.Close()
				case ctx.Err() == nil:
					c.add("refused", 1)
				}
				_ = testrelay.Wait(ctx, knockAgain)
			}
			return nil
		})
	}
	return g.Wait()
}

// tried returns the connections of strangers that have ended.
func (t tally) tried() int64 { return t.counts["admitted"] + t.counts["refused"] }
