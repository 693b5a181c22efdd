//go:build !linux

package stun

// useBatches reports false: only Linux has recvmmsg and sendmmsg.
func (s *Server) useBatches() bool { return false }
