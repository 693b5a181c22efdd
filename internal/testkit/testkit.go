// Package testkit contains helpers for the tests of several packages: waiting, free
// ports, certificates, files, DERP clients that exchange packets, and CPU time.
//
// Its functions fail the test themselves, and keep no state between calls. The
// package imports nothing of the product, so that no test compares the product with
// itself. Only tests and cmd/torture import the package, so derpd does not contain it.
//
// Package acmetest runs a certificate authority and BIND. Package peers runs real
// tailscaled and headscale.
package testkit
