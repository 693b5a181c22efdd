// Package host describes the machine that derpd runs on, as far as a relay
// depends on it: the container and its gateways (container.go, gateway.go),
// the memory and open files it may use (memory.go, files.go), and the
// addresses under which others reach it (address.go).
package host
