// Package host describes the machine that derpd runs on:
//
//   - container.go and gateway.go: the container and its gateways
//   - memory.go and files.go: the memory and the open files that derpd may use
//   - address.go: the addresses under which others reach the machine
package host
