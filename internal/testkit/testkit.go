// Package testkit holds what the tests of several packages need: waiting, free
// ports, certificates, DERP clients that exchange packets, and CPU time.
//
// Each function takes a testing.TB and fails the test by itself. The package
// imports nothing of the product, so that a test never checks the product
// against itself, and keeps no state between calls. Only tests import it: the
// image is built without it.
//
// The packages below it run whole programs: acmetest a certificate authority
// and BIND, peers real tailscaled and headscale.
package testkit
