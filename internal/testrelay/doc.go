// Package testrelay runs derpd, or upstream's derper, as a process, and connects
// clients to it. Commands that measure or attack a server use it on loopback.
package testrelay
